"""What people read: conditions, each with a reason from the one list and a message that can be acted on."""

from collections.abc import Iterable
from math import inf

from weightsync_contract.messages import VersionId
from weightsync_contract.reasons import Condition, Outcome, Reason
from weightsync_operator.core.exclusion import backoff
from weightsync_operator.core.facts import Facts, State
from weightsync_operator.core.goal import missing_pin, pinned, rejected
from weightsync_operator.core.idle import behind, current_target, failed_before, is_behind, wanted
from weightsync_operator.core.limits import NAMES
from weightsync_operator.core.membership import HEALTH_OF_STANDING, Member, Standing, names, unguarded
from weightsync_operator.core.memory import REASON_OF_STEP, Exclusion, Parked, Round, Step
from weightsync_operator.core.model import ConditionStatus, InitialWeights
from weightsync_operator.core.spec import describe
from weightsync_operator.core.waves import down, size, wave_of, what_next

Row = tuple[str, Reason, str]
"""Status, reason, message."""

YES, NO, UNKNOWN = "True", "False", "Unknown"


def conditions(facts: Facts, state: State) -> tuple[ConditionStatus, ...]:
    """All four, keeping the time of those whose status did not change."""
    rows = {
        Condition.READY: ready(facts, state),
        Condition.PROGRESSING: progressing(facts, state),
        Condition.SOURCE_AVAILABLE: source(facts, state),
        Condition.MEMBERS_HEALTHY: members(facts, state),
    }
    return merge(facts, state.status.conditions, rows)


def merge(
    facts: Facts, before: tuple[ConditionStatus, ...], rows: dict[Condition, Row]
) -> tuple[ConditionStatus, ...]:
    """Put rows in place of those of their type; others stay."""
    world = facts.world
    found = {each.type: each for each in before}
    for type_, (status, reason, message) in rows.items():
        old = found.get(type_.value)
        time = old.last_transition_time if old and old.status == status else world.wall
        found[type_.value] = ConditionStatus(
            type_.value, status, reason.value, message, time, world.generation
        )
    return tuple(found.values())


def why(facts: Facts, state: State, member: Member) -> str:
    """Why a member is not as it should be; empty when it is."""
    exclusion = state.memory.exclusion(member.uid)
    if exclusion is not None and exclusion.active:
        return f"{exclusion.message}; {_tried_again(exclusion)}"
    if member.message:
        return f"{member.name}: {member.message}"
    current = current_target(facts, state)
    if current and state.round is None and is_behind(facts, state, member, current):
        kept = facts.source.retains(current.version) is not None or member.holds(current, facts.verify)
        lacks = "" if kept else ", of which no trainer keeps a copy: publish again"
        return f"{member.name}: it needs {current.version}{lacks}"
    if unguarded(member):
        return f"{member.name}: its engine answers without a permit: start it with weightsync's middleware"
    return ""


def _tried_again(exclusion: Exclusion) -> str:
    if exclusion.until == inf:
        return f"tried again once its engine restarts, or with another version than {exclusion.version}"
    return f"tried again {backoff(exclusion.tries):.0f} s after that, or once it restarts"


# ---------------------------------------------------------------------------- Ready


def ready(facts: Facts, state: State) -> Row:
    """Whether every member serves a version that the spec allows."""
    everyone = list(facts.members.values())
    if not everyone:
        return YES, Reason.NO_MEMBERS, f"no pod matches the inference selector {_selector(facts)}"
    version, round_ = state.current, state.round
    lacking = [member for member in everyone if not _served(state, member)]
    parked = state.memory.parked
    if parked is not None:
        return NO if lacking else YES, Reason.ROLLING_OUT, _rolling(parked.round, lacking)
    if round_ is not None and not round_.catch_up:
        return NO if lacking else YES, Reason.ROLLING_OUT, _rolling(round_, lacking)
    if state.memory.failed is not None and _failing(facts, state):
        failed = state.memory.failed
        return NO, Reason.DEGRADED, f"{failed.version} failed ({failed.reason}): {failed.message}"
    if version is None:
        return _first(facts, state, everyone)
    if lacking:
        return NO, Reason.DEGRADED, _lacking(facts, state, lacking)
    return YES, Reason.SYNCED, f"all {len(everyone)} members serve {version}"


def _served(state: State, member: Member) -> bool:
    return any(member.serves(version) for version in state.memory.allowed)


def _failing(facts: Facts, state: State) -> bool:
    """Whether the last rollout failed and there is nothing else that could be tried."""
    latest = facts.source.latest
    failed = state.memory.failed
    if failed is None or rejected(state, failed.version):
        # Given up: who has it is taken back, and the fleet is as it was.
        return False
    return latest is None or failed_before(facts, state, latest.version)


def _rolling(round_: Round, lacking: list[Member]) -> str:
    serving = "all members serve meanwhile" if not lacking else f"not serving: {names(lacking)}"
    return f"{round_.target.version} is being rolled out; {serving}"


def _first(facts: Facts, state: State, everyone: list[Member]) -> Row:
    latest = facts.source.latest
    if latest is not None and rejected(state, latest.version):
        message = f"{latest.version} was given up, and no other version is served yet"
        return NO, Reason.WAITING_FOR_FIRST_VERSION, message
    if latest is not None:
        waiting = [member for member in everyone if member.standing is not Standing.READY]
        message = f"{latest.version} waits for {names(waiting) or 'its rollout'}"
        return NO, Reason.ROLLING_OUT, message
    if facts.world.spec.initial_weights is InitialWeights.SERVE:
        status = YES if all(member.standing is Standing.READY for member in everyone) else NO
        return status, Reason.WAITING_FOR_FIRST_VERSION, "members serve the weights that they started with"
    message = "members answer no request before the trainer has published a version"
    return NO, Reason.WAITING_FOR_FIRST_VERSION, message


def _lacking(facts: Facts, state: State, lacking: list[Member]) -> str:
    reasons = [why(facts, state, member) or f"{member.name}: {_state(member)}" for member in lacking]
    return f"{len(lacking)} of {len(facts.members)} do not serve {state.current}: {_some(reasons)}"


def _state(member: Member) -> str:
    serving = member.serving
    return f"{serving.state}{f' {serving.version}' if serving.version else ''}"


# ---------------------------------------------------------------------------- Progressing


def progressing(facts: Facts, state: State) -> Row:
    """What is being done, or why nothing is."""
    round_, parked = state.round, state.memory.parked
    if parked is not None:
        return _between(facts, state, parked)
    if round_ is not None:
        return _under_way(facts, state, round_)
    failed = state.memory.failed
    if failed is not None and _failing(facts, state):
        what = f"{failed.version}: {failed.message}"
        return NO, failed.reason, f"{what}; {_not_again(failed.version)}"
    return _waiting(facts, state) or _at_rest(facts, state)


def _waiting(facts: Facts, state: State) -> Row | None:
    """What is to be moved, and what it waits for."""
    new, current = wanted(facts, state), current_target(facts, state)
    late = behind(facts, state, current) if current else []
    if facts.world.spec.paused and (new or late):
        what = f"{new.version} waits" if new else f"{names(late)} wait"
        return NO, Reason.PAUSED, f"{what} until spec.paused is false"
    if not facts.members:
        return NO, Reason.NO_MEMBERS, "there is nobody to bring a version to"
    if new is not None:
        return YES, Reason.GROUPING, f"{new.version} waits: {_for_what(facts, late)}"
    return None


def _not_again(version: VersionId) -> str:
    return (
        f"not tried again before another version, spec or member comes, or somebody annotates retry@{version}"
    )


def _for_what(facts: Facts, late: list[Member]) -> str:
    """What keeps a rollout from its beginning."""
    if not facts.source.usable:
        return facts.source.message
    if late and facts.world.spec.waves:
        return f"{names(late)} get the current version first"
    away = [member for member in facts.members.values() if member.standing is not Standing.READY]
    if away:
        return "; ".join(f"{member.name}: {member.message}" for member in away[:NAMES])
    return "for the agents to come back to this operator"


def _at_rest(facts: Facts, state: State) -> Row:
    """Why nothing is to be moved."""
    missing = missing_pin(facts, state)
    if missing is not None:
        return NO, Reason.VERSION_NOT_RETAINED, _not_retained(facts, missing)
    latest = facts.source.latest
    if state.current is None and latest is not None and rejected(state, latest.version):
        return _given_up(state, latest.version)
    if state.current is None:
        return NO, Reason.WAITING_FOR_FIRST_VERSION, "the trainer has not published yet"
    if pinned(facts, state) == state.current:
        newest = f"; the newest is {latest.version}" if latest and latest.version != state.current else ""
        return YES, Reason.COMPLETE, f"spec.target names {state.current}{newest}"
    if latest is not None and latest.version != state.current and rejected(state, latest.version):
        return _given_up(state, latest.version)
    return YES, Reason.COMPLETE, f"{state.current} is the newest version"


def _not_retained(facts: Facts, version: VersionId) -> str:
    trainer = facts.source.trainer
    kept = ", ".join(str(each.version) for each in trainer.source.versions) if trainer else ""
    return (
        f"spec.target names {version}, of which the trainer keeps no copy (it keeps {kept or 'none'}): "
        "publish it, name another version, or raise spec.trainer.retainedVersions before it is dropped"
    )


def _given_up(state: State, version: VersionId) -> Row:
    last, failed = state.status.rollout, state.memory.failed
    stays = f"{state.current} stays" if state.current else "no version is brought"
    goes_on = f"{stays} until a newer version is published, or somebody annotates retry@{version}"
    if failed is not None and failed.version == version:
        return NO, failed.reason, f"{version}: {failed.message}; {goes_on}"
    aborted = last is not None and last.outcome is Outcome.ABORTED
    reason = Reason.ABORTED if aborted else Reason.ROLLED_BACK
    return NO, reason, f"{version} was given up; {goes_on}"


def _between(facts: Facts, state: State, parked: Parked) -> Row:
    """Between two waves of a rollout."""
    round_ = parked.round
    version, scope = round_.target.version, facts.scope(round_)
    count = sum(member.serves(version) for member in scope)
    what = f"{version} is served by {count} of {len(scope)} members, step {round_.wave + 1} of "
    what += f"{len(round_.waves)}; {what_next(parked)}"
    out = down(facts, round_)
    if out:
        what += f"; {names(out)} served it and restarted"
    newest = wanted(facts, state)
    if newest is not None and newest.version != version:
        what += f"; {newest.version} waits for its end"
    wave = wave_of(parked)
    if facts.world.spec.paused:
        return NO, Reason.PAUSED, f"{what}; and not before spec.paused is false"
    if parked.failed:
        return NO, Reason.CHECK_FAILED, what
    if parked.check_began is not None and not parked.passed:
        return YES, Reason.CANARY_CHECKING, what
    by_hand = wave.pause is not None and wave.pause.seconds is None
    return NO if by_hand else YES, Reason.CANARY_PAUSED, what


def _under_way(facts: Facts, state: State, round_: Round) -> Row:
    version, scope = round_.target.version, facts.scope(round_)
    what = f"{version} goes to {names(scope)}"
    if round_.waves:
        step = min(round_.wave, len(round_.waves)) + 1
        what += f", {size(facts, round_)} of them by step {step} of {len(round_.waves) + 1}"
    out = [member for member in scope if state.memory.excluded(member.uid)]
    if out:
        what += f"; left out: {_some(why(facts, state, member) for member in out)}"
    if facts.world.spec.paused:
        return NO, Reason.PAUSED, f"{what}; it goes on when spec.paused is false"
    return YES, REASON_OF_STEP[round_.step], f"{what}; {_until(facts, round_)}"


def _until(facts: Facts, round_: Round) -> str:
    """What the step ends with, and when it is given up."""
    timeouts = facts.world.spec.timeouts
    match round_.step:
        case Step.GATHERING:
            return f"those who are away are waited for up to {timeouts.join:.0f} s"
        case Step.LISTENING | Step.JOINING:
            return f"all are to have joined within {timeouts.join:.0f} s"
        case Step.CHECKING:
            return f"their engines are to say within {timeouts.join:.0f} s whether they can take it"
        case Step.TRANSFERRING:
            return f"all are to have received it within {timeouts.transfer:.0f} s"
        case _:
            return f"each is to have switched within {timeouts.commit:.0f} s"


# ---------------------------------------------------------------------------- SourceAvailable


def source(facts: Facts, state: State) -> Row:
    """Whether versions can be had."""
    seen, current = facts.source, current_target(facts, state)
    lacking = behind(facts, state, current) if current and state.round is None else []
    needy = [member for member in lacking if current and not member.holds(current, facts.verify)]
    if needy and current and seen.usable and seen.retains(current.version) is None:
        message = f"{names(needy)} need {current.version}, of which the trainer keeps no copy: publish again"
        return NO, Reason.VERSION_NOT_RETAINED, message
    missing = missing_pin(facts, state)
    if missing is not None:
        return NO, Reason.VERSION_NOT_RETAINED, _not_retained(facts, missing)
    return YES if seen.reason is Reason.CONNECTED else NO, seen.reason, seen.message


# ---------------------------------------------------------------------------- MembersHealthy


def members(facts: Facts, state: State) -> Row:
    """Whether every member is as it should be; the gravest reason first, all of them in the message."""
    found: dict[Reason, list[str]] = {}
    pods = {pod.uid: pod for pod in (*facts.world.members, *facts.world.trainers)}
    for uid, owner in facts.world.claims.items():
        if uid in pods:
            message = f"{pods[uid].name} belongs to WeightSync {owner.name}: change one of the selectors"
            found.setdefault(Reason.CONFLICT, []).append(message)
    for member in facts.members.values():
        reason = _health(state, member)
        if reason is not None:
            found.setdefault(reason, []).append(why(facts, state, member))
    if not found:
        return YES, Reason.ALL_HEALTHY, f"all {len(facts.members)} members are healthy"
    order = (
        Reason.CONFLICT,
        Reason.FENCED,
        Reason.EXCLUDED,
        Reason.CAPABILITY_MISSING,
        Reason.AGENT_MISSING,
    )
    messages = [message for reason in order for message in found.get(reason, ())]
    return NO, next(reason for reason in order if reason in found), _some(messages)


def _health(state: State, member: Member) -> Reason | None:
    if member.standing is Standing.FENCED:
        return Reason.FENCED
    if state.memory.excluded(member.uid):
        return Reason.EXCLUDED
    if unguarded(member):
        return Reason.CAPABILITY_MISSING
    return HEALTH_OF_STANDING.get(member.standing)


# ---------------------------------------------------------------------------- words


def _some(messages: Iterable[str]) -> str:
    every = list(messages)
    more = len(every) - NAMES
    return "; ".join(every[:NAMES]) + (f"; and {more} more" if more > 0 else "")


def _selector(facts: Facts) -> str:
    return f"{describe(facts.world.spec.inference)} in namespace {facts.world.ref.namespace}"


def unsupported(facts: Facts) -> dict[Condition, Row]:
    """The rows of a spec that asks for what is not there yet."""
    fields = ", ".join(facts.world.spec.unsupported)
    message = f"not supported yet: {fields}; nothing is moved until the spec asks for something else"
    return {
        Condition.READY: (NO, Reason.UNSUPPORTED, message),
        Condition.PROGRESSING: (NO, Reason.UNSUPPORTED, message),
    }


def waiting_for_roster(absent: list[str]) -> dict[Condition, Row]:
    """The rows of a leader that waits for the agents of the last one."""
    message = f"waiting for the agents of {', '.join(absent[:NAMES])} to come back to this operator"
    return {Condition.PROGRESSING: (UNKNOWN, Reason.WAITING_FOR_ROSTER, message)}
