"""The reference engine's thread: pauses, and what they do to requests under way."""

import queue
import threading
import time

import pytest

from weightsync_engine.reference.core import Core, Request, Step
from weightsync_engine.reference.llama import Config, Llama
from weightsync_engine.reference.model_files import TINY, random_weights

CONFIG = Config(64, 2, 4, 2, 32, 1e-6, 10000.0, False, 2048, 2, 320)
PROMPT = (5, 6, 7, 80)


@pytest.fixture(scope="module")
def core():
    core = Core(Llama(CONFIG, random_weights(TINY, 1)))
    core.start()
    return core


@pytest.fixture(autouse=True)
def going(core):
    """Each test leaves the core unpaused and on the first weights."""
    yield
    core.call(lambda: core.model.load(random_weights(TINY, 1).items())).result(10)
    core.resume().result(10)


class Asked:
    def __init__(self, core: Core, tokens: int, prompt=PROMPT) -> None:
        self._steps: queue.Queue[Step] = queue.Queue()
        self.got: list[int] = []
        self.finish = None
        self.request = Request(prompt, tokens, True, 0, self._steps.put)
        core.submit(self.request)

    def take(self, count: int = 1) -> list[int]:
        for _ in range(count):
            step = self._steps.get(timeout=20)
            if step.token is not None:
                self.got.append(step.token)
            self.finish = step.finish
        return self.got

    def all(self) -> list[int]:
        while not self.finish:
            self.take()
        return self.got

    def nothing(self, seconds=0.15) -> bool:
        try:
            self._steps.get(timeout=seconds)
        except queue.Empty:
            return True
        return False

    def drain(self) -> None:
        while not self._steps.empty():
            self.take()


def other_weights(core):
    return core.call(lambda: core.model.load(random_weights(TINY, 2).items()))


def test_requests_take_turns_and_do_not_meet(core):
    alone = [Asked(core, 20, (number, 9)).all() for number in (10, 20, 30)]
    together = [Asked(core, 20, (number, 9)) for number in (10, 20, 30)]
    assert [asked.all() for asked in together] == alone


def test_keep_stands_still_and_goes_on_with_the_new_weights(core):
    asked = Asked(core, 200)
    asked.take(5)
    core.pause("keep").result(10)
    asked.drain()
    assert asked.nothing()
    late = Asked(core, 3)
    other_weights(core).result(10)
    assert late.nothing()
    before = len(asked.got)
    core.resume().result(10)
    asked.all()
    assert (asked.finish, len(asked.got)) == ("length", 200)
    # The context was computed anew: what follows is what a fresh request with it gets.
    fresh = Asked(core, 200 - before, (*PROMPT, *asked.got[:before]))
    assert fresh.all() == asked.got[before:]
    assert late.all() == Asked(core, 3).all()


def test_wait_ends_what_runs_and_starts_nothing(core):
    asked = Asked(core, 60)
    asked.take(3)
    done = core.pause("wait")
    late = Asked(core, 3)
    done.result(20)
    assert len(asked.request.made) == 60
    asked.all()
    assert late.nothing()
    core.resume().result(10)
    assert late.all()


def test_wait_with_nothing_running_is_done_at_once(core):
    core.pause("wait").result(5)


def test_abort_ends_what_runs(core):
    asked = Asked(core, 1000)
    asked.take(3)
    core.pause("abort").result(10)
    assert len(asked.all()) < 1000
    assert asked.finish == "abort"


def test_a_cancelled_request_costs_no_more_steps(core):
    asked = Asked(core, 1500)
    asked.take(2)
    asked.request.cancelled = True
    until = time.monotonic() + 10
    while core.running:
        assert time.monotonic() < until
        threading.Event().wait(0.01)


def test_a_call_between_steps_may_fail_and_the_core_lives_on(core):
    def fail():
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        core.call(fail).result(10)
    assert Asked(core, 2).all()


def test_a_request_that_fails_is_told_and_the_core_lives_on(core):
    asked = Asked(core, 3, (100_000,))
    asked.all()
    assert asked.finish == "error"
    assert Asked(core, 2).all()
