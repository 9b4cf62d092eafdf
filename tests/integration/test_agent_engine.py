"""A real trainer's agent, a real member's agent and a real engine: what users are answered, and when they are not.

The operator is scripted; everything else is what runs in pods, the engine on its own weights at first.
"""

import os
import threading
import time

import pytest

from weightsync_contract.messages import Phase, ServingState
from weightsync_contract.reasons import FailureCode

if os.environ.get("CI") != "true":
    pytest.importorskip("torch", reason="the reference engine is torch")

from agent_fleet import SECONDS, eventually, run_pair
from engine_server import EngineServer, tokens_of

from weightsync_engine.agent.core.journal import Record
from weightsync_engine.agent.journal import JournalFile
from weightsync_engine.reference.model_files import TINY, random_weights, write_checkpoint

WEIGHTS = {version: random_weights(TINY, 20 + version) for version in (1, 2)}


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """Tokens of a server that was started from a version's own checkpoint."""
    found = {}
    for version, weights in WEIGHTS.items():
        home = tmp_path_factory.mktemp(f"expected-{version}")
        write_checkpoint(home / "model", TINY, 0, weights)
        found[version] = tokens_of(home / "model", home)
    assert found[1] != found[2]
    return found


@pytest.fixture
async def engine(tmp_path):
    write_checkpoint(tmp_path / "model", TINY, seed=7)
    server = EngineServer("reference", tmp_path / "model", tmp_path / "engine")
    server.start()
    yield server
    server.stop()


@pytest.fixture
async def fleet(tmp_path, engine):
    async with run_pair(tmp_path, engine) as fleet:
        yield fleet


class Asking(threading.Thread):
    """A user who asks all the time, and remembers what was answered."""

    def __init__(self, engine: EngineServer) -> None:
        super().__init__(daemon=True)
        self.engine, self.stopping, self.answers = engine, False, []

    def run(self) -> None:
        while not self.stopping:
            try:
                answer = self.engine.complete()
            except OSError:
                self.answers.append("gone")
                time.sleep(0.05)
                continue
            self.answers.append(tuple(answer.tokens) if answer.status == 200 else "refused")

    def stop(self) -> list:
        self.stopping = True
        self.join(60)
        return self.answers


async def test_answers_come_from_exactly_one_version_and_none_before_the_first(fleet, engine, expected):
    assert engine.complete().status >= 400, "an engine on its own weights has no permit"
    first = await fleet.publish(1, tensors=WEIGHTS[1])
    await fleet.group()
    await fleet.bring(first)
    assert engine.complete().tokens == expected[1]
    user = Asking(engine)
    user.start()
    second = await fleet.publish(2, tensors=WEIGHTS[2])
    await fleet.bring(second)
    assert engine.complete().tokens == expected[2]
    answers = user.stop()
    one, two = tuple(expected[1]), tuple(expected[2])
    # Nobody is refused: who asks during the commit waits for its end. The one answer that was begun before it and
    # ended after it is neither version's: its labels say so, which other tests look at.
    other = [answer for answer in answers if answer not in (one, two)]
    assert len(other) <= 1, other
    assert "refused" not in other
    assert "gone" not in other
    assert answers.index(two) > max(number for number, answer in enumerate(answers) if answer == one)


async def test_an_agent_that_is_killed_and_started_again_is_not_noticed(fleet, engine, expected):
    published = await fleet.publish(1, tensors=WEIGHTS[1])
    await fleet.group()
    await fleet.bring(published)
    user = Asking(engine)
    user.start()
    await fleet.agents["member"].kill()
    fleet.operator.pod("member").reports.clear()
    await fleet.agents["member"].start()
    await fleet.operator.until(
        "member", lambda told: told.serving.state is ServingState.SERVING, "serving again", SECONDS
    )
    assert set(user.stop()) == {tuple(expected[1])}
    # Not for a moment does it say that its engine is away: it would be left out of a rollout that begins then.
    assert {told.serving.state for told in fleet.operator.pod("member").reports} == {ServingState.SERVING}


async def test_a_restarted_engine_answers_nobody_until_it_was_brought_up_again(fleet, engine, expected):
    published = await fleet.publish(1, tensors=WEIGHTS[1])
    await fleet.group()
    await fleet.bring(published)
    boot = engine.boot
    engine.stop()
    await fleet.operator.until(
        "member", lambda told: told.serving.state is ServingState.UNREACHABLE, "unreachable", SECONDS
    )
    engine.start()
    assert engine.boot != boot
    assert engine.complete().status >= 400
    await fleet.operator.until(
        "member", lambda told: told.serving.state is ServingState.INITIAL, "initial", SECONDS
    )
    assert engine.complete().status >= 400
    await fleet.group()
    await fleet.bring(published)
    assert engine.complete().tokens == expected[1]


async def test_a_manifest_that_the_model_can_not_take_is_refused_by_name(fleet, engine, expected):
    first = await fleet.publish(1, tensors=WEIGHTS[1])
    await fleet.group()
    await fleet.bring(first)
    name, tensor = next(iter(WEIGHTS[2].items()))
    other = await fleet.publish(2, tensors={**WEIGHTS[2], name: tensor[:1]})
    await fleet.phase(other, Phase.CHECK, list(fleet.agents))
    told = await fleet.operator.until("member", lambda told: told.transfer.failure, "refusing", SECONDS)
    assert told.transfer.failure.code is FailureCode.MANIFEST_REFUSED
    assert name in told.transfer.failure.message
    assert engine.complete().tokens == expected[1]


async def test_a_fenced_engine_ends(fleet, engine, expected):
    """What an agent that was killed in the middle of an apply leaves: nobody knows what the engine holds."""
    published = await fleet.publish(1, tensors=WEIGHTS[1])
    await fleet.group()
    await fleet.check(published, list(fleet.agents))
    await fleet.phase(published, Phase.TRANSFER, list(fleet.agents))
    await fleet.staged("member", published)
    await fleet.agents["member"].kill()
    journal = JournalFile(fleet.agents["member"].state / "journal")
    journal.write(Record(ServingState.APPLYING, engine.boot, published.version, published.digest))
    journal.close()
    await fleet.agents["member"].start()
    await eventually(lambda: not engine.process.alive, "the engine ended", 30)
    told = await fleet.operator.until("member", lambda told: told.serving.fences, "fenced", SECONDS)
    assert told.serving.state is ServingState.FENCED
    engine.start()
    await fleet.operator.until(
        "member", lambda told: told.serving.state is ServingState.INITIAL, "initial", SECONDS
    )
