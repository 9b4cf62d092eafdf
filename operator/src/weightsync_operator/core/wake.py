"""When decide must run again though nothing happens."""

from collections.abc import Iterator

from weightsync_operator.core.facts import Facts, State
from weightsync_operator.core.limits import BATCH, GRACE, QUIET, RECONNECT, SETTLE
from weightsync_operator.core.membership import Standing, absent_since
from weightsync_operator.core.memory import Step
from weightsync_operator.core.waves import bake_end, wave_of

_EPSILON = 0.001
"""Later by this than the moment itself, so that rounding never wakes us before it."""


def requeue_after(facts: Facts, state: State) -> float | None:
    """Seconds until the next moment at which time alone changes the decision; None if there is none."""
    later = [moment for moment in _moments(facts, state) if facts.now < moment < float("inf")]
    return min(later) - facts.now + _EPSILON if later else None


def _moments(facts: Facts, state: State) -> Iterator[float]:
    memory, round_ = state.memory, state.round
    yield facts.world.leading_since + RECONNECT
    if round_ is None:
        if memory.shown_at:
            yield memory.shown_at + QUIET
        if memory.waiting_since is not None:
            yield memory.waiting_since + BATCH
    else:
        yield round_.deadline + GRACE
        yield round_.progress_deadline
        yield round_.step_began + QUIET
        if round_.step is Step.COMMITTING:
            yield round_.step_began + RECONNECT
        if round_.told_at is not None:
            yield round_.told_at + SETTLE
    if memory.parked is not None:
        parked = memory.parked
        check = wave_of(parked).check
        yield bake_end(parked)
        if check is not None and parked.check_began is not None and not parked.failed:
            yield parked.check_began + check.deadline
            yield parked.ask_at
    for exclusion in memory.exclusions:
        if exclusion.active:
            yield exclusion.until
    for member in facts.members.values():
        if member.standing is Standing.ABSENT:
            since = absent_since(member, facts.world)
            yield since + RECONNECT
            yield since + max(RECONNECT, facts.world.spec.timeouts.join)
