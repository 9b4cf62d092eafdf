"""What a kubelet is told."""

import pytest
from aiohttp.test_utils import TestClient, TestServer

from weightsync_engine.agent.core.events import ApplyDone, EngineGone, EngineSeen
from weightsync_engine.agent.health import application, ready


def test_a_pod_is_ready_while_its_engine_may_answer(member, kit):
    assert ready(member.state) == (False, "no permit: Initial")
    member.join().check().stage().commit()
    assert ready(member.state)[0], "requests wait for the end of a commit, and that is soon"
    member.send(ApplyDone("b1", 1))
    assert ready(member.state) == (True, "serving run/1")
    member.send(EngineGone())
    assert ready(member.state) == (False, "the engine does not answer")
    member.send(EngineSeen("b2", 1))
    assert ready(member.state) == (False, "no permit: Initial")


def test_initial_weights_are_ready_when_they_may_be_served(member):
    member.desire(serve_initial=True)
    assert ready(member.state) == (True, "serving initial weights")


def test_a_trainers_pod_is_ready(trainer):
    assert ready(trainer.state)[0]


@pytest.fixture
async def client(member):
    async with TestClient(TestServer(application(lambda: member.state))) as client:
        yield client


async def test_it_is_served(client, member):
    assert (await client.get("/healthz")).status == 200
    answer = await client.get("/readyz")
    assert (answer.status, await answer.text()) == (503, "no permit: Initial\n")
    member.serve()
    assert (await client.get("/readyz")).status == 200
    observed = await (await client.get("/observed")).json()
    assert observed["serving"]["state"] == "Serving"
    assert observed["serving"]["version"] == {"run": "run", "version": 1}
