"""A rollout in waves: whom a wave is of, the pause after it, and when the next one begins.

Between two waves the rollout is parked: nothing is moved for it, and who comes late gets the current version.
Only time, a check or a promotion moves it on; a new leader begins the pause anew, and promotes nobody.
"""

from dataclasses import replace

from weightsync_contract.messages import ServingState
from weightsync_contract.reasons import Outcome, Reason
from weightsync_operator.core.facts import Facts, State
from weightsync_operator.core.goal import pinned
from weightsync_operator.core.limits import CRASHES
from weightsync_operator.core.membership import Member, Standing, established, names
from weightsync_operator.core.memory import Parked, Round, Step
from weightsync_operator.core.model import Probe, RolloutStatus, Wave
from weightsync_operator.core.outcome import end, enter, fail, status_of, succeed
from weightsync_operator.core.strategy import wave_size


def size(facts: Facts, round_: Round) -> int:
    """How many members may serve the target at the end of the present wave."""
    total = len(facts.scope(round_))
    if round_.wave >= len(round_.waves):
        return total
    return wave_size(round_.waves[round_.wave].members, total)


def chosen(facts: Facts, round_: Round, serving: list[Member], holding: list[Member]) -> list[Member]:
    """Of those who hold the target staged, the ones that the present wave is of.

    Nobody takes the place of one that had the target and lost it, before the last wave: else a version of which
    engines die would go from one to the next.
    """
    if round_.wave >= len(round_.waves):
        return holding
    had = {*round_.reached, *round_.fallen} & facts.members.keys()
    lost = had - {member.uid for member in serving}
    again = [member for member in holding if member.uid in lost]
    others = [member for member in holding if member.uid not in lost]
    room = size(facts, round_) - len(serving) - len(lost)
    others.sort(key=lambda each: not each.applies(round_.target.version))
    return again + others[: max(0, room)]


def done(facts: Facts, state: State) -> State:
    """The wave is over: everybody has it, or the rollout pauses, or the next wave begins."""
    round_ = state.round
    assert round_ is not None
    if round_.wave >= len(round_.waves):
        return succeed(facts, state)
    version, scope = round_.target.version, facts.scope(round_)
    wave = round_.waves[round_.wave]
    if wave.pause is None and wave.check is None:
        return _next(facts, state)
    state = _park(facts, state)
    parked = state.memory.parked
    assert parked is not None
    count = sum(member.serves(version) for member in scope)
    return state.note(
        Reason.CANARY_PAUSED,
        f"{version} is served by {count} of {len(scope)} members after step {round_.wave + 1} of "
        f"{len(round_.waves)}; {what_next(parked)}",
    )


def _park(facts: Facts, state: State) -> State:
    assert state.round is not None
    parked = Parked(state.round, facts.now, facts.world.wall)
    return state.remember(round=None, parked=parked).write(rollout=parked_status(parked))


def park_again(facts: Facts, state: State) -> State:
    """A new leader leaves a paused rollout paused, for the whole time of the pause; whatever the strategy says now
    counts from then on. If there is no such step any more, the spec has taken the pause away."""
    round_ = state.round
    assert round_ is not None
    if round_.wave >= len(round_.waves):
        return state
    wave = round_.waves[round_.wave]
    return state if wave.pause is None and wave.check is None else _park(facts, state)


def _next(facts: Facts, state: State) -> State:
    """The next wave: what the spec says now counts for it, and who has joined since is in it."""
    round_, spec = state.round, facts.world.spec
    assert round_ is not None
    others = (
        member.uid
        for member in facts.members.values()
        if member.uid not in round_.scope and (member.standing is Standing.READY or established(member))
    )
    state = state.change(
        scope=(*round_.scope, *others), waves=spec.waves, wave=round_.wave + 1, committed=(), loss=False
    )
    state = enter(facts, state, Step.GATHERING, spec.timeouts.join)
    assert state.round is not None
    # Before anybody of it is told: a new leader must not begin at an earlier wave than was promoted to.
    return state.write(rollout=status_of(state.round, Outcome.IN_PROGRESS))


def parked_status(parked: Parked) -> RolloutStatus:
    """The paused rollout as the status holds it."""
    return replace(status_of(parked.round, Outcome.IN_PROGRESS), pause_time=parked.since_wall)


def unpark(facts: Facts, state: State) -> State:
    """The parked rollout is the present one again; the time that it stood does not count."""
    parked = state.memory.parked
    assert parked is not None
    round_ = parked.round
    stood = facts.now - parked.since
    round_ = replace(
        round_,
        progress_deadline=round_.progress_deadline + stood,
        paused_at=facts.now if facts.world.spec.paused else None,
    )
    return state.remember(round=round_, parked=None)


def promote(facts: Facts, state: State) -> State:
    """Go on to the next wave, whatever holds it."""
    return _next(facts, unpark(facts, state))


def ask_again(facts: Facts, state: State) -> State:
    """The check begins anew, as the spec has it now."""
    parked, spec = state.memory.parked, facts.world.spec
    assert parked is not None
    round_ = parked.round
    if len(spec.waves) == len(round_.waves):
        round_ = replace(round_, waves=spec.waves)
    return state.remember(
        parked=replace(
            parked,
            round=round_,
            asked=parked.asked + 1,
            ask_at=facts.now,
            check_began=facts.now,
            passed=False,
            failed=False,
            verdict="",
        )
    )


# ---------------------------------------------------------------------------- rules


def pin_moved(facts: Facts, state: State) -> State | None:
    """The spec names another version than the one that is paused: it is not brought any further."""
    parked = state.memory.parked
    if parked is None or state.round is not None or facts.world.spec.pin is None:
        return None
    version = pinned(facts, state)
    if version is None or version == parked.round.target.version:
        return None
    state = unpark(facts, state)
    return end(facts, state, Outcome.SUPERSEDED, Reason.SUPERSEDED, f"spec.target asks for {version}")


def fallen(facts: Facts, state: State) -> State | None:
    """A member that had the target and lost it: its engine died of it, for all that is known."""
    parked = state.memory.parked
    round_ = parked.round if parked else state.round
    if round_ is None or not round_.waves:
        return None
    version = round_.target.version
    serving = {uid for uid in round_.scope if uid in facts.members and facts.members[uid].serves(version)}
    if not serving <= {*round_.reached}:
        round_ = replace(round_, reached=tuple(sorted({*round_.reached, *serving})))
        return (
            state.remember(parked=replace(parked, round=round_)) if parked else state.remember(round=round_)
        )
    lost = [
        uid
        for uid in round_.reached
        if uid not in round_.fallen
        and (member := facts.members.get(uid)) is not None
        and member.connected
        and member.serving.state in (ServingState.INITIAL, ServingState.FENCED)
    ]
    if not lost:
        return None
    changed = replace(round_, fallen=(*round_.fallen, *lost))
    state = state.remember(parked=replace(parked, round=changed)) if parked else state.remember(round=changed)
    who = names(facts.members[uid] for uid in lost)
    return state.note(Reason.CANARY_LOST, f"{who} served {version} and restarted", warning=True)


def down(facts: Facts, round_: Round) -> list[Member]:
    """Who lost the target and does not serve it again."""
    found = (facts.members.get(uid) for uid in round_.fallen)
    return [member for member in found if member and not member.serves(round_.target.version)]


def canary_died(facts: Facts, state: State) -> State | None:
    """A version on which engines die stops before it takes the fleet."""
    parked = state.memory.parked
    round_ = parked.round if parked else state.round
    if round_ is None or (parked is not None and state.round is not None):
        return None
    if parked is None and (not round_.waves or round_.step is not Step.GATHERING):
        return None
    lost = down(facts, round_)
    serving = [member for member in facts.scope(round_) if member.serves(round_.target.version)]
    if not lost or (len(lost) <= facts.limit and len(lost) < CRASHES and serving):
        return None
    why = f"{names(lost)} served it and restarted: their engines may have died of it"
    return fail(facts, unpark(facts, state) if parked else state, Reason.CANARY_LOST, why)


def parked_deserted(facts: Facts, state: State) -> State | None:
    """All members of a paused rollout have left."""
    parked = state.memory.parked
    if parked is None or state.round is not None or facts.scope(parked.round):
        return None
    return end(facts, unpark(facts, state), Outcome.ABORTED, Reason.ABORTED, "all its members have left")


def heard(facts: Facts, state: State) -> State | None:
    """Take what came of the check that was asked."""
    parked, verdict = state.memory.parked, facts.world.verdict
    if parked is None or parked.passed or parked.failed or verdict is None:
        return None
    if verdict.key != probe_key(state, parked):
        return None
    check = wave_of(parked).check
    assert check is not None
    changed = replace(
        parked, asked=parked.asked + 1, ask_at=facts.now + check.interval, passed=verdict.passed
    )
    if verdict.passed or not parked.verdict or facts.now >= parked.verdict_at + SHOWN_SECONDS:
        changed = replace(changed, verdict=verdict.message, verdict_at=facts.now)
    return state.remember(parked=changed)


SHOWN_SECONDS = 60.0
"""A failing check's words are written at most this often."""


def checking(facts: Facts, state: State) -> State | None:
    """The check begins once the time of the pause is over, and ends at its deadline."""
    parked = state.memory.parked
    if parked is None or state.round is not None or facts.world.spec.paused:
        return None
    check = wave_of(parked).check
    if check is None or parked.passed or parked.failed:
        return None
    if parked.check_began is None:
        if facts.now < bake_end(parked):
            return None
        return state.remember(parked=replace(parked, check_began=facts.now, ask_at=facts.now))
    if facts.now < parked.check_began + check.deadline:
        return None
    version, why = parked.round.target.version, parked.verdict or "it was not answered"
    text = f"the check after step {parked.round.wave + 1} did not pass in {check.deadline:.0f} s: {why}"
    if facts.world.spec.on_failure.value == "Rollback":
        return fail(facts, unpark(facts, state), Reason.CHECK_FAILED, text)
    state = state.remember(parked=replace(parked, failed=True, verdict=why))
    return state.note(Reason.CHECK_FAILED, f"{version}: {text}", warning=True)


def bake_end(parked: Parked) -> float:
    """When the time of the pause is over; at once for one that has none."""
    pause = wave_of(parked).pause
    return parked.since + (pause.seconds if pause and pause.seconds else 0.0)


def resume(facts: Facts, state: State) -> State | None:
    """The pause is over and the check has passed: the next wave begins."""
    parked = state.memory.parked
    if parked is None or state.round is not None or facts.world.spec.paused:
        return None
    wave = wave_of(parked)
    if wave.pause is not None and wave.pause.seconds is None:
        return None
    if facts.now < bake_end(parked) or (wave.check is not None and not parked.passed):
        return None
    return promote(facts, state)


# ---------------------------------------------------------------------------- checks and words


def wave_of(parked: Parked) -> Wave:
    """The wave that it is parked after."""
    return parked.round.waves[parked.round.wave]


def probe_key(state: State, parked: Parked) -> str:
    """Names one asking of one check, under one leader."""
    return (
        f"{state.memory.term}/{parked.round.target.version}/{parked.round.wave}/{parked.since}/{parked.asked}"
    )


def probe(facts: Facts, state: State) -> Probe | None:
    """The check that is to be asked now."""
    parked = state.memory.parked
    if parked is None or parked.check_began is None or parked.passed or parked.failed:
        return None
    check = wave_of(parked).check
    if check is None or facts.now < parked.ask_at or facts.world.spec.paused:
        return None
    return Probe(probe_key(state, parked), check)


def what_next(parked: Parked) -> str:
    """What ends the pause, and what comes then."""
    wave, round_ = wave_of(parked), parked.round
    after = round_.wave + 1
    to = (
        f"step {after + 1} ({round_.waves[after].members})" if after < len(round_.waves) else "all the others"
    )
    version = round_.target.version
    by_hand = f"weightsync.dev/action=promote@{version}"
    if parked.failed:
        return f"held: the check did not pass: {parked.verdict}; annotate {by_hand}, or retry@ or abort@ it"
    conditions = []
    if wave.pause is not None and wave.pause.seconds is not None:
        conditions.append(f"{wave.pause.seconds:.0f} s have passed since {parked.since_wall}")
    if wave.check is not None and not parked.passed:
        seen = f" (it says: {parked.verdict})" if parked.verdict else ""
        limit = f"within {wave.check.deadline:.0f} s, asked each {wave.check.interval:.0f} s"
        conditions.append(f"the check passes {limit}{seen}")
    if wave.pause is not None and wave.pause.seconds is None:
        conditions.append(f"somebody promotes it (annotate {by_hand})")
    return f"it goes on to {to} once {' and '.join(conditions)}"
