"""The annotation ``weightsync.dev/action: <verb>@<run>/<version>``: one word of somebody's, answered once.

It is answered in the condition ActionTaken, in the same write as what it changes. What names a version that is
not the one in hand is refused, so that a word that was left lying, or that comes late, does nothing. To say the
same again, add ``#`` and anything, or remove the annotation first.
"""

import re
from dataclasses import dataclass
from typing import Final

from weightsync_contract.messages import VersionId
from weightsync_contract.reasons import Condition, Outcome, Reason
from weightsync_operator.core.conditions import NO, YES, Row, merge
from weightsync_operator.core.facts import Facts, State
from weightsync_operator.core.goal import pinned, reject, rejected, retreats
from weightsync_operator.core.idle import coming, failed_before
from weightsync_operator.core.membership import Member, Standing, established, names
from weightsync_operator.core.memory import REASON_OF_STEP
from weightsync_operator.core.outcome import begin, end, status_of
from weightsync_operator.core.source import target
from weightsync_operator.core.waves import ask_again, promote, unpark

_FORM: Final = re.compile(r"(abort|retry|promote|rollback)@([A-Za-z0-9._-]{1,63})/(\d{1,18})(#.*)?")
HELP: Final = "write abort, retry, promote or rollback, then @<run>/<version>, such as promote@run-1/42"


@dataclass(frozen=True, slots=True)
class Action:
    """A verb and the version that it is about."""

    verb: str
    version: VersionId


def parse(text: str) -> Action | None:
    """Read the annotation; None for what has another form."""
    match = _FORM.fullmatch(text)
    return Action(match[1], VersionId(match[2], int(match[3]))) if match else None


def answered(state: State) -> str:
    """The annotation that the status has an answer to."""
    row = next((each for each in state.status.conditions if each.type == Condition.ACTION_TAKEN), None)
    return row.message.partition(": ")[0] if row else ""


def act(facts: Facts, state: State) -> State:
    """Do what the annotation says, once."""
    text = facts.world.action
    if not text:
        return _forget(state)
    if text == state.memory.action or coming(facts):
        return state
    if _shown(text) == answered(state):
        return state.remember(action=text)
    action = parse(text)
    if action is None:
        return _answer(facts, state, text, (NO, Reason.INVALID, HELP))
    after, row = _VERBS[action.verb](facts, state, action.version)
    return _answer(facts, after, text, row)


def refuse_unknown(facts: Facts, state: State) -> State:
    """The status is lost, and with it whether this was done: nobody knows, so it is not done again."""
    text = facts.world.action
    if not text:
        return state
    message = "the status was lost, and with it whether this was done: remove the annotation and set it again"
    return _answer(facts, state, text, (NO, Reason.STALE, message))


def _shown(text: str) -> str:
    return text[:128].replace(": ", ":_")


def _forget(state: State) -> State:
    state = state if not state.memory.action else state.remember(action="")
    kept = tuple(each for each in state.status.conditions if each.type != Condition.ACTION_TAKEN)
    return state if kept == state.status.conditions else state.write(conditions=kept)


def _answer(facts: Facts, state: State, text: str, row: Row) -> State:
    status, reason, message = row
    shown = (status, reason, f"{_shown(text)}: {message}")
    rows = merge(facts, state.status.conditions, {Condition.ACTION_TAKEN: shown})
    state = state.remember(action=text).write(conditions=rows)
    return state.note(reason, shown[2], warning=status == NO)


# ---------------------------------------------------------------------------- verbs

Done = tuple[State, Row]


def _refused(state: State, reason: Reason, message: str) -> Done:
    return state, (NO, reason, message)


def _done(state: State, message: str) -> Done:
    return state, (YES, Reason.ACCEPTED, message)


def in_hand(state: State) -> VersionId | None:
    """The version of the rollout that is under way or paused."""
    if state.memory.parked is not None:
        return state.memory.parked.round.target.version
    if state.round is not None and not state.round.catch_up:
        return state.round.target.version
    return None


def _stale(state: State, version: VersionId) -> Done:
    now = in_hand(state)
    what = f"{now} is being rolled out" if now else "no rollout is under way"
    return _refused(state, Reason.STALE, f"{version} is not being rolled out: {what}")


def _promote(facts: Facts, state: State, version: VersionId) -> Done:
    if in_hand(state) != version:
        return _stale(state, version)
    parked = state.memory.parked
    if parked is None:
        assert state.round is not None
        step = REASON_OF_STEP[state.round.step]
        return _refused(
            state, Reason.NOT_PAUSED, f"{version} is not paused but {step}: promote it once it is"
        )
    wave = parked.round.wave
    state = _without_catch_up(state)
    return _done(
        promote(facts, state), f"{version} goes on after step {wave + 1} of {len(parked.round.waves)}"
    )


def _abort(facts: Facts, state: State, version: VersionId) -> Done:
    if in_hand(state) != version:
        return _stale(state, version)
    if pinned(facts, state) == version:
        return _refused(
            state, Reason.PINNED, f"spec.target names {version}: change spec.target, or set spec.paused"
        )
    state = _end_rollout(facts, state, "aborted by an action")
    if not state.after(version):
        # A rollback was given up: what it went back from is wanted again.
        state = reject(state.write(rejected=()), version)
        return _done(state, f"the rollback to {version} has ended; {state.current} stays")
    state = reject(state, version)
    back = [member for member in facts.members.values() if retreats(facts, state, member)]
    told = f"; {names(back)} go back to {state.current}" if back else ""
    return _done(state, f"{version} is given up{told}; retry@{version} or a newer version starts again")


def _retry(facts: Facts, state: State, version: VersionId) -> Done:
    parked = state.memory.parked
    if parked is not None and parked.round.target.version == version:
        if parked.round.waves[parked.round.wave].check is None:
            return _refused(state, Reason.STALE, f"{version} waits for no check: promote it, or abort it")
        return _done(ask_again(facts, state), f"the check of {version} is asked anew")
    if in_hand(state) is not None:
        return _stale(state, version)
    if version == state.current:
        return _refused(state, Reason.STALE, f"{version} is the current version")
    if not (rejected(state, version) or failed_before(facts, state, version)):
        return _refused(state, Reason.STALE, f"{version} neither failed nor was given up")
    latest = facts.source.latest
    pin = pinned(facts, state)
    wanted = pin if facts.world.spec.pin else latest.version if latest else None
    if wanted != version:
        return _refused(state, Reason.STALE, f"{version} is not what is wanted now: that is {wanted}")
    if facts.source.retains(version) is None:
        return _refused(state, Reason.VERSION_NOT_RETAINED, _not_kept(facts, version))
    exclusions = tuple(each for each in state.memory.exclusions if each.version != version)
    state = state.remember(failed=None, exclusions=exclusions)
    if rejected(state, version):
        state = state.write(rejected=())
    return _done(state, f"{version} is tried again")


def _rollback(facts: Facts, state: State, version: VersionId) -> Done:
    if facts.world.spec.pin is not None:
        pin = pinned(facts, state)
        return _refused(state, Reason.PINNED, f"spec.target names {pin}: change spec.target instead")
    current, now = state.current, in_hand(state)
    if current is None:
        return _refused(state, Reason.STALE, "no version is current yet")
    if version == current:
        if now is None and not any(_elsewhere(state, each) for each in facts.members.values()):
            return _refused(
                state, Reason.STALE, f"{version} is the current version, and nothing else is served"
            )
        return _to_current(facts, state, now)
    if state.after(version) and version.run == current.run:
        return _refused(state, Reason.STALE, f"{version} is later than {current}: publish it, or retry it")
    published = facts.source.retains(version)
    if published is None:
        return _refused(state, Reason.VERSION_NOT_RETAINED, _not_kept(facts, version))
    if now == version:
        return _refused(state, Reason.STALE, f"{version} is being rolled out already")
    if now is not None:
        state = _end_rollout(facts, state, f"rolled back to {version}")
    state = _without_catch_up(state)
    state = reject(state, current)
    if facts.source.latest is not None:
        state = reject(state, facts.source.latest.version)
    scope = [each for each in facts.members.values() if each.standing is Standing.READY or established(each)]
    if not scope:
        return _refused(state, Reason.NO_MEMBERS, "there is nobody to bring it to")
    state = begin(facts, state.remember(failed=None), target(published), scope, catch_up=False, back=True)
    assert state.round is not None
    state = state.write(rollout=status_of(state.round, Outcome.IN_PROGRESS))
    return _done(
        state, f"all go from {current} to {version}; a version published from now on is brought as usual"
    )


def _to_current(facts: Facts, state: State, now: VersionId | None) -> Done:
    """Who has anything else goes back to the current version."""
    if now is not None:
        state = _end_rollout(facts, state, f"rolled back to {state.current}")
        state = reject(state, now)
    for version in state.memory.allowed:
        if version != state.current:
            state = reject(state, version)
    back = [member for member in facts.members.values() if retreats(facts, state, member)]
    told = f"{names(back)} go back to it" if back else "nobody had anything else"
    return _done(state, f"{state.current} stays; {told}")


def _elsewhere(state: State, member: Member) -> bool:
    return member.serving.version not in (None, state.current)


def _end_rollout(facts: Facts, state: State, why: str) -> State:
    if state.memory.parked is not None:
        state = unpark(facts, _without_catch_up(state))
    return end(facts, state, Outcome.ABORTED, Reason.ABORTED, why)


def _without_catch_up(state: State) -> State:
    """A catch-up begins again by itself if it is still needed."""
    return state.remember(round=None) if state.round is not None and state.round.catch_up else state


def _not_kept(facts: Facts, version: VersionId) -> str:
    trainer = facts.source.trainer
    if trainer is None or not facts.source.usable:
        return f"no trainer's agent is connected that could have a copy of {version}: {facts.source.message}"
    kept = ", ".join(str(each.version) for each in trainer.source.versions) or "none"
    return f"{trainer.pod.name} keeps no copy of {version}; it keeps {kept}"


_VERBS: Final = {"promote": _promote, "abort": _abort, "retry": _retry, "rollback": _rollback}
