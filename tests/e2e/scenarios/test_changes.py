"""What happens to every fleet: versions, more and fewer pods, pods and containers that end and come back.

In real pods on real nodes, each scenario under steady requests to every server. One fleet goes through all of them;
each begins with everybody on the newest version. A transfer is held to some seconds, so that there is a middle.
"""

from concurrent.futures import ThreadPoolExecutor

import pytest
from pod_fleet import TRANSFERRING, WEIGHTSYNC, PodFleet
from scenario_table import Table

from weightsync_demo.answers import RefusedError
from weightsync_demo.waiting import wait_for

pytestmark = pytest.mark.timeout(1200)
CALM = "everybody is on the newest version"


def test_first_sync(started: PodFleet, table: Table) -> None:
    first = tuple(started.engines)
    for name in first:
        with pytest.raises(RefusedError):
            started.ask(name)
    with started.scene("first sync", "the first version is published", first) as scene:
        scene.begin("servers are up and answer nothing")
        started.wait_served(started.publish())
        scene.end()
        started.namespace.wait(f"weightsync/{WEIGHTSYNC}", "Ready", 60)
    table.add(scene)
    for name in first:
        started.namespace.wait(f"pod/{name}", "Ready", 60)


def test_next_version(synced: PodFleet, table: Table) -> None:
    with synced.scene("next version", "a version is published") as scene:
        scene.begin(CALM)
        synced.wait_served(synced.publish())
        scene.end()
    table.add(scene)


def test_scale_up_and_down(synced: PodFleet, table: Table) -> None:
    with synced.scene("scale up", "a third server is added", ("engine-2",)) as scene:
        scene.begin(CALM)
        synced.namespace.kubectl("scale", "statefulset/engine", "--replicas=3")
        synced.watch("engine-2")
        synced.wait_served(synced.version)
        scene.end()
    table.add(scene)

    synced.forget("engine-2")
    with synced.scene("scale down", "the third server is taken away, then a version is published") as scene:
        synced.namespace.kubectl("scale", "statefulset/engine", "--replicas=2")
        scene.begin(CALM)
        synced.wait_served(synced.publish())
        scene.end()
    table.add(scene)
    wait_for(lambda: synced.status()["members"]["total"] == 2, 60, "two members in the status")


def test_inference_pod_killed_in_mid_transfer(synced: PodFleet, table: Table) -> None:
    with synced.scene("inference pod killed", "engine-1 is deleted without grace", ("engine-1",)) as scene:
        version = synced.publish_into_transfer()
        synced.kill_pod("engine-1")
        scene.begin(synced.moment(version))
        synced.wait_served(version, seconds=synced.up_seconds)
        scene.end()
    table.add(scene)


def test_engine_container_restarted(synced: PodFleet, table: Table) -> None:
    before = synced.pods()["engine-0"].restarts
    with synced.scene("engine container restarted", "engine-0's engine is killed", ("engine-0",)) as scene:
        synced.kill_engine("engine-0")
        scene.begin(CALM)
        wait_for(lambda: synced.pods()["engine-0"].restarts > before, 60, "the kubelet to restart it")
        synced.wait_served(synced.version, seconds=synced.up_seconds)
        scene.end()
    table.add(scene)


def test_agent_container_restarted(synced: PodFleet, table: Table) -> None:
    before = synced.pods()["engine-1"].restarts
    with synced.scene("agent container restarted", "engine-1's agent is killed") as scene:
        synced.kill_container("engine-1", "weightsync_engine.agent")
        scene.begin(CALM)
        # Away for five seconds, its server is left out of a rollout that began meanwhile, and answers nothing until it
        # has caught up; and on a machine with much else to do an agent takes that long to start.
        wait_for(lambda: synced.back("engine-1", before), 120, "its agent to be back")
        synced.wait_served(synced.publish())
        scene.end()
    table.add(scene)


def test_trainer_pod_replaced(synced: PodFleet, table: Table) -> None:
    with synced.scene("trainer pod replaced", "trainer-0 is deleted without grace") as scene:
        scene.begin(CALM)
        synced.replace_trainer()
        synced.wait_served(synced.publish())
        scene.end()
    table.add(scene)


@pytest.mark.parametrize(
    "phases",
    [("Grouping", "Checking", TRANSFERRING), (TRANSFERRING,), ("Committing", "Complete")],
    ids="-".join,
)
def test_operator_killed(synced: PodFleet, table: Table, phases: tuple[str, ...]) -> None:
    kill = synced.killer(synced.leader(), "weightsync_operator", synced.release)
    with (
        synced.scene("operator killed", "the leader of two replicas is killed") as scene,
        ThreadPoolExecutor(1) as pool,
    ):
        # Some phases are over within milliseconds: who kills looks on before there is anything to be seen.
        killing = pool.submit(synced.wait_rollout, synced.next_version, *phases, then=kill)
        version = synced.publish()
        scene.begin(f"as of {killing.result(90)}")
        synced.wait_served(version)
        scene.end()
    table.add(scene)
    synced.wait_operator()
