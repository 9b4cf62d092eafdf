"""The ordered chain that moves a fleet on: each rule says what is next, or nothing; the first one counts."""

from collections.abc import Callable
from typing import Final

from weightsync_contract.reasons import Outcome, Reason
from weightsync_operator.core.commit import commit
from weightsync_operator.core.exclusion import forgive, too_many
from weightsync_operator.core.facts import Facts, State
from weightsync_operator.core.gather import gather
from weightsync_operator.core.goal import forget_versions, goes_back
from weightsync_operator.core.idle import close_lost, in_waves, start_catch_up, start_rollout, wanted
from weightsync_operator.core.memory import REASON_OF_STEP, Round, Step
from weightsync_operator.core.outcome import drop, end, fail, status_of
from weightsync_operator.core.steps import (
    broken,
    checked,
    joined,
    listened,
    never_told,
    overdue,
    transferred,
)
from weightsync_operator.core.takeover import go_forward
from weightsync_operator.core.waves import (
    canary_died,
    checking,
    fallen,
    heard,
    parked_deserted,
    pin_moved,
    resume,
)

Rule = Callable[[Facts, State], State | None]

_MOVES: Final = 200
"""More moves than any pass needs: more would mean that two rules undo each other."""


def forgiven(facts: Facts, state: State) -> State | None:
    """Who has what was wanted is not excluded any more."""
    after = forgive(facts, state)
    return None if after is state else after


def deserted(facts: Facts, state: State) -> State | None:
    """A round whose members have all left is over."""
    if state.round is None or facts.scope(state.round):
        return None
    if state.round.catch_up:
        return drop(state)
    return end(facts, state, Outcome.ABORTED, Reason.ABORTED, "all its members have left")


def paused(facts: Facts, state: State) -> State | None:
    """While the spec says pause, the time of the rollout as a whole stands still."""
    round_ = state.round
    if round_ is None or facts.world.spec.paused == (round_.paused_at is not None):
        return None
    if round_.paused_at is None:
        return state.change(paused_at=facts.now)
    stood = facts.now - round_.paused_at
    later = round_.deadline + stood if round_.step is Step.GATHERING else round_.deadline
    return state.change(paused_at=None, progress_deadline=round_.progress_deadline + stood, deadline=later)


def superseded(facts: Facts, state: State) -> State | None:
    """Until its transfer begins, a newer version takes the place of the target."""
    round_, new = state.round, wanted(facts, state)
    if round_ is None or new is None or new.version == round_.target.version:
        return None
    asked_back = round_.back and facts.world.spec.pin is None
    if asked_back or state.memory.parked is not None or not _open_to_change(facts, round_):
        return None
    if round_.catch_up:
        # Who serves nothing gets the current version before a rollout in waves begins.
        return None if in_waves(facts, state, new) else drop(state)
    old = round_.target.version
    written = state.status.rollout
    if written is not None and (written.run, written.version) == (old.run, old.version):
        state = state.write(rollout=status_of(round_, Outcome.SUPERSEDED))
        state = state.note(Reason.SUPERSEDED, f"{old} gives way to {new.version} before it was transferred")
    kept = tuple(each for each in state.memory.allowed if each != old)
    back = goes_back(state, new.version)
    return state.remember(allowed=(*kept, new.version)).change(
        target=new,
        progress_deadline=facts.now + facts.world.spec.progress_seconds,
        frozen=False,
        back=back,
        waves=() if back else round_.waves,
    )


def _open_to_change(facts: Facts, round_: Round) -> bool:
    if not round_.frozen:
        return True
    version = round_.target.version
    if round_.step is Step.COMMITTING and round_.catch_up:
        # Those who wait for their engines can as well wait for the newer version.
        return not any(member.applies(version) for member in facts.scope(round_))
    # An epoch was lost, and nobody has the old one: the next transfer may as well bring the new one.
    return (
        round_.step is Step.GATHERING
        and round_.loss
        and not any(
            member.has(version) or member.applies(version) or member.holds(round_.target, facts.verify)
            for member in facts.scope(round_)
        )
    )


def out_of_members(facts: Facts, state: State) -> State | None:
    """More members are lost than the spec lets go: the rollout has failed, and nobody is withheld."""
    if state.round is None or not too_many(facts, state):
        return None
    return fail(facts, state, state.round.reason, state.round.message)


def out_of_time(facts: Facts, state: State) -> State | None:
    """The rollout as a whole took too long. A commit has its own deadline and is never cut short."""
    round_ = state.round
    if round_ is None or round_.paused_at is not None or round_.step is Step.COMMITTING:
        return None
    if facts.now < round_.progress_deadline:
        return None
    reason = round_.reason if round_.message else REASON_OF_STEP[round_.step]
    why = round_.message or f"it was still {round_.step.value.lower()}"
    return fail(facts, state, reason, f"not done within progressSeconds: {why}")


RULES: Final[tuple[Rule, ...]] = (
    forgiven,
    deserted,
    paused,
    fallen,
    canary_died,
    superseded,
    out_of_members,
    out_of_time,
    listened,
    joined,
    checked,
    transferred,
    broken,
    never_told,
    overdue,
    gather,
    commit,
    close_lost,
    parked_deserted,
    pin_moved,
    heard,
    checking,
    resume,
    forget_versions,
    go_forward,
    start_rollout,
    start_catch_up,
)


def settle(facts: Facts, state: State) -> State:
    """Apply the rules until none has anything to say."""
    for _ in range(_MOVES + 8 * len(facts.members)):
        for rule in RULES:
            after = rule(facts, state)
            if after is not None:
                state = after
                break
        else:
            return state
    raise AssertionError(f"the rules do not come to rest: {state.round}")
