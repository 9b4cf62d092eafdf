"""The same with real vLLM on the CPU, in pods: the first five of what happens to every fleet."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from pod_fleet import UP_SECONDS, PodFleet, Release
from pod_manifests import vllm_command
from scenario_table import Table

from weightsync_cluster.cluster import Cluster
from weightsync_demo.answers import RefusedError
from weightsync_demo.waiting import wait_for

pytestmark = [pytest.mark.timeout(1200), pytest.mark.full, pytest.mark.vllm]
CALM = "everybody is on the newest version"
VLLM_SECONDS = 2 * UP_SECONDS
"""For a server of vLLM, from the wish for it to its first answer, on two cores."""


@pytest.fixture(scope="module")
def servers(own_cluster: Cluster, release: Release, model: Path) -> Iterator[PodFleet]:
    """A trainer and two vLLM servers, up and without any version."""
    made = PodFleet(own_cluster, "vllm", release, model)
    made.create(*vllm_command(), label="vLLM ")
    try:
        made.watch("engine-0", "engine-1", seconds=VLLM_SECONDS)
        made.namespace.wait("pod/trainer-0", "Ready", UP_SECONDS)
        yield made
    finally:
        made.close()


def test_vllm_first_sync_and_next_version(servers: PodFleet, table: Table) -> None:
    first = tuple(servers.engines)
    for name in first:
        with pytest.raises(RefusedError):
            servers.ask(name)
    with servers.scene("first sync", "the first version is published", first) as scene:
        scene.begin("servers are up and answer nothing")
        servers.wait_served(servers.publish())
        scene.end()
    table.add(scene)
    with servers.scene("next version", "a version is published") as scene:
        scene.begin(CALM)
        servers.wait_served(servers.publish())
        scene.end()
    table.add(scene)


def test_vllm_pod_killed_in_mid_transfer(servers: PodFleet, table: Table) -> None:
    with servers.scene("inference pod killed", "engine-1 is deleted without grace", ("engine-1",)) as scene:
        version = servers.publish_into_transfer()
        servers.kill_pod("engine-1")
        scene.begin("in mid-transfer")
        servers.wait_served(version, seconds=VLLM_SECONDS)
        scene.end()
    table.add(scene)


def test_vllm_trainer_pod_replaced(servers: PodFleet, table: Table) -> None:
    with servers.scene("trainer pod replaced", "trainer-0 is deleted without grace") as scene:
        scene.begin(CALM)
        servers.replace_trainer()
        servers.wait_served(servers.publish())
        scene.end()
    table.add(scene)


def test_vllm_scale_up(servers: PodFleet, table: Table) -> None:
    with servers.scene("scale up", "a third server is added", ("engine-2",)) as scene:
        scene.begin(CALM)
        servers.namespace.kubectl("scale", "statefulset/engine", "--replicas=3")
        servers.watch("engine-2", seconds=VLLM_SECONDS)
        servers.wait_served(servers.version)
        scene.end()
    table.add(scene)
    servers.forget("engine-2")
    servers.namespace.kubectl("scale", "statefulset/engine", "--replicas=2")
    wait_for(lambda: servers.status()["members"]["total"] == 2, 60, "two members in the status")
