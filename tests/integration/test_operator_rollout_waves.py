"""Waves, checks, pins and actions: the operator's process at a real API server, asked as users ask, with kubectl."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from cluster_objects import ClusterObjects
from fake_agents import FakeAgent
from kubernetes import client
from operated import SOON, Operated, operated, row

from weightsync_contract.messages import VersionId
from weightsync_contract.names import ANNOTATION_ACTION, PLURAL
from weightsync_demo.kube.apiserver import ApiServer

pytestmark = pytest.mark.usefixtures("crds")

V1, V2, V3 = (VersionId("run-1", number) for number in (1, 2, 3))
BY_HAND = {"strategy": {"steps": [{"members": 1, "pause": {}}, {"members": "60%", "pause": {}}]}}


@pytest.fixture
async def world(
    apiserver: ApiServer, api_client: client.ApiClient, namespace: str, tmp_path: Path
) -> AsyncIterator[Operated]:
    async with operated(ClusterObjects(api_client, namespace), apiserver.kubeconfig, tmp_path) as made:
        yield made


class Evaluator:
    """A service that says whether a canary is good."""

    def __init__(self) -> None:
        self.state, self.asked = "bad", 0
        app = web.Application()
        app.router.add_get("/canary", self._handle)
        self.server = TestServer(app)

    async def _handle(self, request: web.Request) -> web.Response:
        self.asked += 1
        return web.json_response({"scores": [{"state": self.state}]})


@pytest.fixture
async def evaluator() -> AsyncIterator[Evaluator]:
    evaluator = Evaluator()
    await evaluator.server.start_server()
    yield evaluator
    await evaluator.server.close()


async def serving_v1(world: Operated, spec: dict[str, Any]) -> tuple[FakeAgent, list[FakeAgent]]:
    """Three members that serve version 1."""
    await asyncio.to_thread(world.objects.weightsync, **spec)
    await world.start(*SOON)
    trainer, agents = await world.trainer(), await world.members(3)
    for each in agents:
        await each.until(lambda agent: agent.desired is not None)
    trainer.publish(1)
    await asyncio.gather(*(each.until_serving(V1) for each in agents))
    await world.until_status(lambda s: s["rollout"]["outcome"] == "Succeeded")
    return trainer, agents


def served(agents: list[FakeAgent]) -> list[int]:
    return [each.serving.version.version if each.serving and each.serving.version else 0 for each in agents]


async def say(apiserver: ApiServer, world: Operated, action: str) -> dict[str, Any]:
    """Annotate with kubectl; answers the condition that answers it."""
    arguments = (
        PLURAL,
        "policy",
        f"{ANNOTATION_ACTION}={action}",
        "-n",
        world.objects.namespace,
        "--overwrite",
    )
    await asyncio.to_thread(apiserver.kubectl, "annotate", *arguments)
    status = await world.until_status(lambda s: row(s, "ActionTaken")["message"].startswith(f"{action}: "))
    return row(status, "ActionTaken")


async def test_a_canary_goes_on_when_somebody_promotes_it_and_survives_its_operator(
    apiserver: ApiServer, world: Operated
) -> None:
    trainer, agents = await serving_v1(world, BY_HAND)
    trainer.publish(2)
    message = await world.until_condition("Progressing", "CanaryPaused")
    assert "run-1/2 is served by 1 of 3 members, step 1 of 2" in message
    assert "weightsync.dev/action=promote@run-1/2" in message
    assert served(agents) == [2, 1, 1]
    assert (await world.status())["rollout"]["stepIndex"] == 0
    assert "pauseTime" in (await world.status())["rollout"]

    answer = await say(apiserver, world, "promote@run-1/2")
    assert (answer["status"], answer["reason"]) == ("True", "Accepted")
    await world.until_status(lambda s: s["rollout"]["stepIndex"] == 1 and s["rollout"]["pauseTime"])
    assert served(agents) == [2, 2, 1]

    world.operators[0].kill()
    await world.start(*SOON)
    term = (await world.status())["term"]
    await world.until_status(lambda s: s["term"] > term or s["term"] == 2)
    await agents[2].until(lambda agent: agent.terms[-1] == 2)
    await asyncio.to_thread(world.objects.patch, {"metadata": {"labels": {"touched": "1"}}})
    status = await world.until_status(lambda s: row(s, "Progressing")["reason"] == "CanaryPaused")
    assert status["rollout"]["stepIndex"] == 1
    assert served(agents) == [2, 2, 1], "a new leader promoted it"

    refused = await say(apiserver, world, "promote@run-1/1")
    assert (refused["status"], refused["reason"]) == ("False", "Stale")
    await say(apiserver, world, "promote@run-1/2#2")
    await agents[2].until_serving(V2)
    await world.until_status(
        lambda s: s["rollout"]["outcome"] == "Succeeded" and s["current"]["version"] == 2
    )


async def test_a_check_holds_the_rollout_until_it_passes_and_describe_says_why(
    apiserver: ApiServer, world: Operated, evaluator: Evaluator
) -> None:
    url = str(evaluator.server.make_url("/canary"))
    check = {
        "http": {"url": url, "json": {"path": "scores.0.state", "equals": "good"}},
        "intervalSeconds": 1,
        "deadlineSeconds": 600,
    }
    trainer, agents = await serving_v1(world, {"strategy": {"steps": [{"members": 1, "check": check}]}})
    trainer.publish(2)
    await world.until_status(
        lambda s: "scores.0.state is bad, expected good" in row(s, "Progressing")["message"]
    )
    text = await asyncio.to_thread(
        apiserver.kubectl, "describe", PLURAL, "policy", "-n", world.objects.namespace
    )
    words = " ".join(text.split())
    assert "Reason: CanaryChecking" in words
    assert "scores.0.state is bad, expected good" in words
    assert "within 600 s, asked each 1 s" in words
    assert served(agents) == [2, 1, 1]
    before = evaluator.asked
    evaluator.state = "good"
    await asyncio.gather(*(each.until_serving(V2) for each in agents))
    assert evaluator.asked == before + 1
    await world.until_status(lambda s: s["rollout"]["outcome"] == "Succeeded")


async def test_a_check_that_fails_rolls_back_by_itself(
    apiserver: ApiServer, world: Operated, evaluator: Evaluator
) -> None:
    check = {
        "http": {"url": str(evaluator.server.make_url("/canary")), "status": 204},
        "intervalSeconds": 1,
        "deadlineSeconds": 2,
    }
    strategy = {"onFailure": "Rollback", "steps": [{"members": 1, "check": check}]}
    trainer, agents = await serving_v1(world, {"strategy": strategy})
    trainer.publish(2)
    await agents[0].until_serving(V2)
    status = await world.until_status(lambda s: row(s, "Progressing")["reason"] == "CheckFailed")
    assert status["rollout"]["outcome"] == "Failed"
    await agents[0].until_serving(V1)
    status = await world.until_status(lambda s: row(s, "Ready")["reason"] == "Synced")
    assert status["rejected"] == [{"run": "run-1", "version": 2}]
    assert "HTTP 200, expected 204" in row(status, "Progressing")["message"]
    assert served(agents) == [1, 1, 1]


async def test_a_fleet_is_rolled_back_by_one_word_and_pinned_by_the_spec(
    apiserver: ApiServer, world: Operated
) -> None:
    trainer, agents = await serving_v1(world, {})
    trainer.publish(2)
    await asyncio.gather(*(each.until_serving(V2) for each in agents))
    await world.until_status(lambda s: s["current"]["version"] == 2)

    answer = await say(apiserver, world, "rollback@run-1/7")
    assert answer["reason"] == "Stale"
    answer = await say(apiserver, world, "rollback@run-1/1")
    assert (answer["status"], answer["reason"]) == ("True", "Accepted")
    await asyncio.gather(*(each.until_serving(V1) for each in agents))
    await world.until_condition("Progressing", "RolledBack")

    pin = {"spec": {"target": {"policy": "Pinned", "version": 2}}}
    await asyncio.to_thread(world.objects.patch, pin)
    await asyncio.gather(*(each.until_serving(V2) for each in agents))
    trainer.publish(3)
    message = await world.until_condition("Progressing", "Complete")
    assert "spec.target names run-1/2" in message

    await asyncio.to_thread(world.objects.patch, {"spec": {"target": {"version": 1}}})
    message = await world.until_condition("SourceAvailable", "VersionNotRetained")
    assert "run-1/1" in message
    assert served(agents) == [2, 2, 2]
    await asyncio.to_thread(world.objects.patch, {"spec": {"target": {"policy": "Latest", "version": None}}})
    await asyncio.gather(*(each.until_serving(V3) for each in agents))
