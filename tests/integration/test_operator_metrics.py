"""``/metrics`` of operators that run rollouts at a real API server."""

import asyncio
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from cluster_objects import ClusterObjects
from kubernetes import client
from operated import Operated, operated
from operator_process import OperatorProcess
from prometheus_client.parser import text_string_to_metric_families

from weightsync_demo.kube.apiserver import ApiServer
from weightsync_operator.metrics import table

pytestmark = pytest.mark.usefixtures("crds")

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


@pytest.fixture
async def world(
    apiserver: ApiServer, api_client: client.ApiClient, namespace: str, tmp_path: Path
) -> AsyncIterator[Operated]:
    async with operated(ClusterObjects(api_client, namespace), apiserver.kubeconfig, tmp_path) as made:
        yield made


async def scrape(operator: OperatorProcess) -> Samples:
    def read() -> str:
        url = f"http://127.0.0.1:{operator.ports['metrics']}/metrics"
        with urllib.request.urlopen(url, timeout=5) as answer:
            return str(answer.read().decode())

    text = await asyncio.to_thread(read)
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(samples: Samples, name: str, **labels: str) -> float | None:
    return samples.get((name, frozenset(labels.items())))


async def test_a_rollout_is_seen_on_the_leader_alone(world: Operated) -> None:
    await asyncio.to_thread(world.objects.weightsync)
    operators = [await world.start() for _ in range(2)]
    trainer, agents = await world.trainer(), await world.members(2)
    for each in (trainer, *agents):
        await each.until(lambda agent: agent.desired is not None)
    for number in (1, 2):
        version = trainer.publish(number)
        await asyncio.gather(*(each.until_serving(version, 20) for each in agents))
        await world.until_status(lambda s, n=number: s["current"]["version"] == n and s["synced"] == "2/2")
    own: dict[str, Any] = {"namespace": world.objects.namespace, "weightsync": "policy"}
    leader, follower = [await scrape(each) for each in operators]
    if value(leader, "weightsync_leader") != 1.0:
        leader, follower = follower, leader
    assert (value(leader, "weightsync_leader"), value(follower, "weightsync_leader")) == (1.0, 0.0)
    assert value(leader, "weightsync_sessions") == 3.0
    assert value(leader, "weightsync_rollouts_total", **own, outcome="Succeeded") == 2.0
    for pod in ("vllm-0", "vllm-1"):
        assert value(leader, "weightsync_member_version", **own, pod=pod, run="run-1") == 2.0
    for name in ("current", "target"):
        assert value(leader, f"weightsync_{name}_version", **own, run="run-1") == 2.0
    assert value(leader, "weightsync_members", **own, state="Serving") == 2.0
    assert (
        value(leader, "weightsync_condition", **own, condition="Ready", status="True", reason="Synced") == 1.0
    )
    assert (value(leader, "weightsync_reconcile_total", result="ok") or 0) >= 4
    # Both versions' bytes, to both members.
    assert (
        value(leader, "weightsync_received_bytes_total", **own) == 4 * trainer.source.versions[0].total_bytes
    )
    assert not [name for name, labels in follower if dict(labels).get("weightsync")]


async def test_every_metric_of_the_table_is_there(world: Operated) -> None:
    await asyncio.to_thread(world.objects.weightsync)
    operator = await world.start()
    trainer = await world.trainer()
    (agent,) = await world.members(1)
    version = trainer.publish(1)
    await agent.until_serving(version, 20)
    await world.until_status(lambda s: s["synced"] == "1/1" and s["rollout"]["outcome"] == "Succeeded")
    names = {name for name, _ in await scrape(operator)}
    wanted = {each.name + ("_count" if each.kind is table.Kind.HISTOGRAM else "") for each in table.METRICS}
    assert wanted <= names
