"""What happens to some fleets on a bad day: nodes, wires, one operator only, edits and upgrades in mid-rollout.

In the pods of test_changes.py, and under the same requests.
"""

import json

import pytest
from pod_fleet import WEIGHTSYNC, PodFleet
from pod_manifests import weightsync
from scenario_table import Table

from weightsync_demo.waiting import wait_for

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.full,
    pytest.mark.parametrize("fleet", ["reference"], indirect=True, scope="session"),
]
CALM = "everybody is on the newest version"
APART_SECONDS = 120.0
"""Others go on once the transfer that waits for the one cut off has had its time."""
CUT = ("engine-1",)
"""Back, it is behind, and answers nothing until it has caught up."""


def test_only_operator_killed(synced: PodFleet, table: Table) -> None:
    synced.release.kubectl("scale", "deployment/weightsync-operator", "--replicas=1")
    synced.wait_operator()
    leader = synced.leader()
    try:
        with synced.scene("operator killed", "the only replica is killed") as scene:
            version = synced.publish_into_transfer()
            synced.kill_container(leader, "weightsync_operator", synced.release)
            scene.begin(synced.moment(version))
            synced.wait_served(version)
            scene.end()
        table.add(scene)
    finally:
        synced.release.kubectl("scale", "deployment/weightsync-operator", "--replicas=2")
        synced.wait_operator()


def test_agent_cut_off_from_the_operator(synced: PodFleet, table: Table) -> None:
    agent = synced.pods()["engine-1"].ip
    operators = [pod["status"]["podIP"] for pod in synced.release.read("pods")["items"]]
    with synced.scene("partition", "engine-1 and the operator can't reach each other", CUT) as scene:
        synced.cluster.partition([agent], operators)
        try:
            version = synced.publish()
            scene.begin(CALM)
            # The others do not wait for ever; who is cut off serves what it has.
            synced.wait_served(version, ["engine-0"], APART_SECONDS)
        finally:
            synced.cluster.heal()
        synced.wait_served(version)
        scene.end()
    table.add(scene)


def test_ranks_cut_off_from_each_other(synced: PodFleet, table: Table) -> None:
    pods = synced.pods()
    with synced.scene("partition", "trainer-0 and engine-1 can't reach each other", CUT) as scene:
        version = synced.publish_into_transfer()
        synced.cluster.partition([pods["trainer-0"].ip], [pods["engine-1"].ip])
        try:
            scene.begin(synced.moment(version))
            synced.wait_served(version, ["engine-0"], APART_SECONDS)
        finally:
            synced.cluster.heal()
        synced.wait_served(version, seconds=APART_SECONDS)
        scene.end()
    table.add(scene)


def test_weightsync_edited_in_mid_rollout(synced: PodFleet, table: Table) -> None:
    with synced.scene("WeightSync edited", "spec.timeouts is changed") as scene:
        version = synced.publish_into_transfer()
        patch = {"spec": {"timeouts": {"transferSeconds": 50}}}
        synced.namespace.kubectl(
            "patch", "weightsync", WEIGHTSYNC, "--type=merge", f"--patch={json.dumps(patch)}"
        )
        scene.begin(synced.moment(version))
        synced.wait_served(version)
        scene.end()
    table.add(scene)


def test_weightsync_deleted_in_mid_rollout_and_made_again(synced: PodFleet, table: Table) -> None:
    with synced.scene("WeightSync deleted", "it is deleted, and applied again") as scene:
        version = synced.publish_into_transfer()
        synced.namespace.kubectl("delete", "weightsync", WEIGHTSYNC, timeout=60)
        scene.begin("after its transfer began")
        # Nobody says otherwise: they serve what they have.
        for name in synced.engines:
            assert synced.ask(name).version in (version - 1, version)
        synced.apply(weightsync())
        synced.wait_served(version)
        scene.end()
    table.add(scene)


def test_helm_upgrade_in_mid_rollout(synced: PodFleet, table: Table) -> None:
    before = {name: (pod.uid, pod.restarts) for name, pod in synced.pods().items()}
    with synced.scene("helm upgrade", "the operator's log format is changed") as scene:
        version = synced.publish_into_transfer()
        synced.upgrade(logFormat="text")
        scene.begin(synced.moment(version))
        synced.wait_served(version)
        scene.end()
    table.add(scene)
    synced.wait_operator()
    # No workload was restarted.
    assert {name: (pod.uid, pod.restarts) for name, pod in synced.pods().items()} == before


def test_operator_goes_to_different_nodes_and_to_one_where_no_other_takes_it(synced: PodFleet) -> None:
    first, second = synced.cluster.nodes
    assert synced.operator_nodes() == [first, second]
    # As before a node is drained.
    synced.cluster.kubectl("cordon", second)
    try:
        there = f"--field-selector=spec.nodeName={second}"
        synced.release.kubectl("delete", "pods", there)
        synced.wait_operator()
        assert synced.operator_nodes() == [first, first]
    finally:
        synced.cluster.kubectl("uncordon", second)
    synced.release.kubectl("rollout", "restart", "deployment/weightsync-operator")
    synced.wait_operator()
    assert synced.operator_nodes() == [first, second]


def test_node_killed(synced: PodFleet, table: Table) -> None:
    # Nothing would move while both were on the one that is gone.
    assert synced.operator_nodes() == synced.cluster.nodes
    node = synced.cluster.nodes[1]
    there = tuple(name for name, pod in synced.pods("engine").items() if pod.node == node)
    assert there, "servers are on both nodes"
    stays = [name for name in synced.engines if name not in there]
    with synced.scene("node killed", f"{node} is cut off from power, and started again", there) as scene:
        synced.cluster.kill_node(node)
        scene.begin(CALM)
        version = synced.publish()
        synced.wait_served(version, stays, APART_SECONDS)
        synced.cluster.start_node(node)
        wait_for(lambda: all(synced.up(name) for name in there), synced.up_seconds, f"{there} to be back")
        synced.wait_served(version, seconds=synced.up_seconds)
        scene.end()
    table.add(scene)
