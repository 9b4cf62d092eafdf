"""The runner: one owner of the state, effects in their order, failures as events."""

import asyncio

import pytest

from weightsync_contract.messages import ServingState
from weightsync_contract.reasons import FailureCode, Role
from weightsync_engine.agent.core import start
from weightsync_engine.agent.core.effects import Apply, Report, Resume, WriteJournal, WritePermit
from weightsync_engine.agent.core.events import (
    ApplyFailed,
    DesiredReceived,
    EngineSeen,
    ResumeEnded,
    SessionOpened,
)
from weightsync_engine.agent.core.journal import Journal
from weightsync_engine.agent.runner import Runner

SECONDS = 5.0


class Hands:
    """Carries out effects by remembering them."""

    def __init__(self):
        self.did = []
        self.broken = ()
        self.runner = None
        self.changed = asyncio.Event()

    async def perform(self, effect):
        await asyncio.sleep(0)
        self.did.append(effect)
        self.changed.set()
        if isinstance(effect, self.broken):
            raise OSError(28, "no space left on device")

    async def until(self, kind):
        async with asyncio.timeout(SECONDS):
            while not isinstance(self.did[-1] if self.did else None, kind):
                self.changed.clear()
                await self.changed.wait()


@pytest.fixture
async def hands():
    hands = Hands()
    hands.runner = Runner(start(Role.INFERENCE, Journal(), None), hands.perform)
    task = asyncio.create_task(hands.runner.run())
    yield hands
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


@pytest.fixture
def staged(member):
    """A core with a version staged, to start a runner from."""
    return member.join().check().stage()


def run(bench):
    hands = Hands()
    hands.runner = Runner(bench.state, hands.perform, lambda: bench.now)
    return hands, asyncio.create_task(hands.runner.run())


async def test_events_are_taken_in_order_and_reported(hands):
    hands.runner.post(SessionOpened())
    hands.runner.post(EngineSeen("b1", 1))
    assert await hands.runner.until(lambda state: state.serving.state is ServingState.INITIAL, SECONDS)
    await asyncio.sleep(0.05)
    assert hands.did[-1].observed.serving.boot == "b1"


async def test_a_wait_ends_with_its_time(hands):
    assert not await hands.runner.until(lambda state: False, 0.05)


async def test_what_rests_on_the_journal_comes_after_it(staged, kit):
    hands, task = run(staged)
    staged.seq += 1
    commit = kit.replace(staged.state.desired.taken, seq=staged.seq, commit=kit.V1)
    hands.runner.post(DesiredReceived(commit))
    hands.runner.post(SessionOpened())
    await hands.until(Apply)
    did = [type(effect) for effect in hands.did if not isinstance(effect, Report)]
    assert did == [WriteJournal, WritePermit, Apply]
    task.cancel()


async def test_what_rests_on_a_permit_that_could_not_be_written_is_left_out(staged, kit):
    hands, task = run(staged)
    hands.broken = WritePermit
    commit = kit.replace(staged.state.desired.taken, seq=99, commit=kit.V1)
    hands.runner.post(DesiredReceived(commit))
    assert await hands.runner.until(lambda state: state.serving.failure, SECONDS)
    assert Apply not in [type(effect) for effect in hands.did]
    assert hands.runner.state.serving.failure.code is FailureCode.APPLY_FAILED
    task.cancel()


async def test_a_journal_that_can_not_be_written_is_an_event(staged, kit):
    hands, task = run(staged)
    hands.broken = WriteJournal
    hands.runner.post(DesiredReceived(kit.replace(staged.state.desired.taken, seq=99, commit=kit.V1)))
    assert await hands.runner.until(lambda state: state.serving.failure, SECONDS)
    assert "no space left" in hands.runner.state.serving.failure.message
    assert Apply not in [type(effect) for effect in hands.did]
    task.cancel()


async def test_any_other_failure_ends_the_agent(staged, kit):
    hands, task = run(staged)
    hands.broken = Apply
    hands.runner.post(DesiredReceived(kit.replace(staged.state.desired.taken, seq=99, commit=kit.V1)))
    with pytest.raises(OSError, match="no space"):
        await asyncio.wait_for(task, SECONDS)


async def test_deadlines_are_kept_without_any_event(member):
    member.join().check().stage().commit()
    began = asyncio.get_running_loop().time()
    hands = Hands()
    offset = 59.8 - began + member.now
    hands.runner = Runner(member.state, hands.perform, lambda: asyncio.get_running_loop().time() + offset)
    task = asyncio.create_task(hands.runner.run())
    assert await hands.runner.until(lambda state: state.serving.state is ServingState.FENCED, SECONDS)
    assert asyncio.get_running_loop().time() - began < 1.0
    task.cancel()


async def test_an_agent_at_rest_does_not_wake(hands):
    hands.runner.post(EngineSeen("b1", 1))
    await asyncio.sleep(0.3)
    assert len(hands.did) <= 2


async def test_a_clean_failure_goes_through_the_runner(member, kit):
    member.serve().stage(kit.V2).commit(kit.V2)
    hands, task = run(member)
    hands.runner.post(ApplyFailed("b1", 2, True, "refused"))
    await hands.until(Resume)
    hands.runner.post(ResumeEnded("b1"))
    assert await hands.runner.until(lambda state: state.serving.state is ServingState.SERVING, SECONDS)
    assert hands.runner.state.serving.version == kit.V1
    task.cancel()
