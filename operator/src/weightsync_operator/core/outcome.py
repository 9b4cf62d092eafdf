"""How rounds begin and end, in memory, status and Events."""

from weightsync_contract.messages import VersionId
from weightsync_contract.reasons import Outcome, Reason
from weightsync_operator.core.exclusion import exclude, forgive, readmit
from weightsync_operator.core.facts import Facts, State
from weightsync_operator.core.goal import goes_back, reject
from weightsync_operator.core.membership import Member
from weightsync_operator.core.memory import FailedRollout, Round, Step
from weightsync_operator.core.model import (
    CurrentVersion,
    OnFailure,
    RolloutStatus,
    SourceStatus,
    VersionTarget,
)


def begin(
    facts: Facts,
    state: State,
    target: VersionTarget,
    scope: list[Member],
    catch_up: bool,
    frozen: bool = False,
    wave: int = 0,
    back: bool = False,
) -> State:
    """Start to bring ``target`` to ``scope``: in waves, unless there is nothing to compare with, or it goes back."""
    now, spec = facts.now, facts.world.spec
    back = back or (not catch_up and goes_back(state, target.version))
    at_once = catch_up or back or state.current is None
    round_ = Round(
        target,
        tuple(member.uid for member in scope),
        catch_up,
        now,
        facts.world.wall,
        now + spec.progress_seconds,
        Step.GATHERING,
        now,
        now + spec.timeouts.join,
        frozen,
        paused_at=now if spec.paused else None,
        back=back,
        waves=() if at_once else spec.waves,
        wave=wave,
        reached=tuple(uid for uid, each in facts.members.items() if each.serving.version == target.version),
    )
    allowed = state.memory.allowed
    if not catch_up and target.version not in allowed:
        allowed = (*allowed, target.version)
    # Who is in the scope may be tried now, whatever it was left out of before.
    state = readmit(state, {member.uid for member in scope})
    return state.remember(round=round_, allowed=allowed, waiting_since=None)


def enter(facts: Facts, state: State, step: Step, seconds: float) -> State:
    """Go on to a step that may take ``seconds``."""
    return state.change(step=step, step_began=facts.now, deadline=facts.now + seconds, told_at=None)


def follow(facts: Facts, state: State, run: str) -> State:
    """The fleet follows the source that is seen now, in this run."""
    if facts.source.trainer is None:
        return state
    source = SourceStatus(run, facts.source.trainer.pod.name)
    return state.remember(source=facts.source.uid).write(source=source)


def succeed(facts: Facts, state: State) -> State:
    """Everybody who was not left out serves the target."""
    round_ = state.round
    assert round_ is not None
    version, serving = round_.target.version, _serving(facts, round_)
    state = forgive(facts, state)
    if round_.catch_up:
        return state.remember(round=None)
    before = state.status.current
    current = CurrentVersion(version.run, version.version, round_.target.digest, facts.world.wall)
    same = before is not None and (before.run, before.version) == (current.run, current.version)
    state = state.write(
        current=current,
        previous=state.status.previous if same else before,
        rollout=status_of(round_, Outcome.SUCCEEDED),
    )
    if not round_.back:
        state = state.write(rejected=())
    state = follow(facts, state, version.run).remember(round=None, allowed=(version,), failed=None)
    left = len(round_.scope) - serving
    missing = f"; {left} left out" if left > 0 else ""
    seconds = facts.now - round_.began
    return state.note(
        Reason.COMPLETE,
        f"{version} is served by {serving} of {len(facts.members)} members after {seconds:.1f} s{missing}",
    )


def fail(facts: Facts, state: State, reason: Reason, message: str) -> State:
    """Give the round up. Nobody is withheld for it: all go on serving what they have."""
    round_ = state.round
    assert round_ is not None
    version = round_.target.version
    if round_.catch_up:
        for member in facts.scope(round_):
            if not member.serves(version):
                state = exclude(facts, state, member, reason, f"{member.name}: {message}")
        return state.remember(round=None, epoch=None)
    failed = FailedRollout(version, reason, message, facts.world.generation, tuple(sorted(facts.members)))
    state = state.write(rollout=status_of(round_, Outcome.FAILED))
    if facts.world.spec.on_failure is OnFailure.ROLLBACK and state.current and not round_.back:
        state = reject(state, version)
    state = forgive(facts, state.remember(round=None, failed=failed))
    begun = any(member.has(version) or member.applies(version) for member in facts.members.values())
    if round_.step is not Step.COMMITTING and not begun:
        # Nobody was told to switch to it.
        state = state.remember(allowed=tuple(each for each in state.memory.allowed if each != version))
    if round_.step is not Step.COMMITTING:
        state = state.remember(epoch=None)
    return state.note(reason, f"the rollout of {version} failed: {message}", warning=True)


def end(facts: Facts, state: State, outcome: Outcome, reason: Reason, why: str) -> State:
    """A rollout that somebody or something ended. Who has its version goes on serving it until it is taken from
    them; nobody else is told to switch to it."""
    round_ = state.round
    assert round_ is not None
    version = round_.target.version
    state = forgive(facts, state.write(rollout=status_of(round_, outcome)).remember(round=None))
    begun = any(member.has(version) or member.applies(version) for member in facts.members.values())
    if not begun and round_.step is not Step.COMMITTING and version != state.current:
        state = state.remember(allowed=tuple(each for each in state.memory.allowed if each != version))
    return state.note(reason, f"the rollout of {version} has ended: {why}")


def drop(state: State) -> State:
    """End the round without an outcome."""
    return state.remember(round=None)


def _serving(facts: Facts, round_: Round) -> int:
    return sum(
        facts.members[uid].serves(round_.target.version) for uid in round_.scope if uid in facts.members
    )


def status_of(round_: Round, outcome: Outcome) -> RolloutStatus:
    """The rollout as the status holds it."""
    version: VersionId = round_.target.version
    step = min(round_.wave, len(round_.waves)) if round_.waves else None
    return RolloutStatus(version.run, version.version, outcome, round_.began_wall, step)
