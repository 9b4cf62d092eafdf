"""Settling who takes part in the next transfer of a round, and over which group.

A round comes back to it whenever an epoch was lost, and when there is nothing left to be moved.
"""

from dataclasses import dataclass, field

from weightsync_contract.reasons import Outcome, Reason
from weightsync_operator.core import group, waves
from weightsync_operator.core.exclusion import exclude, left_out, open_to, readmit
from weightsync_operator.core.facts import Facts, State
from weightsync_operator.core.goal import ahead
from weightsync_operator.core.limits import GRACE, RECONNECT
from weightsync_operator.core.membership import Member, Standing, absent_since, names
from weightsync_operator.core.memory import Round, Step
from weightsync_operator.core.outcome import enter, fail, status_of


@dataclass(slots=True)
class Muster:
    """A round's members, by what is to be done with each."""

    serving: list[Member] = field(default_factory=list)
    """Have the version, or a later one."""
    holding: list[Member] = field(default_factory=list)
    """Have it staged, or are just switching to it."""
    need: list[Member] = field(default_factory=list)
    """Can get it now."""
    away: list[Member] = field(default_factory=list)
    """Their session is gone."""
    unfit: list[Member] = field(default_factory=list)
    """Can't get it now: their engine or agent is not up to it."""
    waiting: list[Member] = field(default_factory=list)
    """Left out, and to be tried again later."""
    out: list[Member] = field(default_factory=list)
    """Left out, and nothing but a restart or another version will change that."""


def muster(facts: Facts, state: State, round_: Round) -> Muster:
    """Sort the round's members."""
    found = Muster()
    for member in facts.scope(round_):
        _place(facts, state, round_, member, found)
    return found


def _place(facts: Facts, state: State, round_: Round, member: Member, found: Muster) -> None:
    target = round_.target
    if member.has(target.version) or ahead(facts, state, member, target.version):
        found.serving.append(member)
    elif not open_to(facts, state, member, target.version):
        exclusion = state.memory.exclusion(member.uid)
        lasting = exclusion is not None and exclusion.until == float("inf")
        (found.out if lasting else found.waiting).append(member)
    elif member.applies(target.version) or member.holds(target, facts.verify):
        found.holding.append(member)
    elif member.standing is Standing.READY:
        found.need.append(member)
    elif state.memory.excluded(member.uid):
        found.waiting.append(member)
    elif member.standing is Standing.ABSENT:
        found.away.append(member)
    else:
        found.unfit.append(member)


def gather(facts: Facts, state: State) -> State | None:
    """GATHERING: exclude who can't come, wait for who may, then open a group, commit or end."""
    round_ = state.round
    if round_ is None or round_.step is not Step.GATHERING:
        return None
    found = muster(facts, state, round_)
    if round_.wave < len(round_.waves) and len(found.serving) >= waves.size(facts, round_):
        return None if facts.world.spec.paused else waves.done(facts, state)
    if found.unfit:
        member = found.unfit[0]
        reason = Reason.FENCED if member.standing is Standing.FENCED else Reason.AGENT_MISSING
        return exclude(facts, state, member, reason, f"{member.name}: {member.message}")
    if found.away:
        return _away(facts, state, round_, found)
    if facts.world.spec.paused:
        return None
    if found.holding:
        # Who was left out and is back is caught up afterwards; those who have it don't wait for that.
        found.need = [member for member in found.need if not state.memory.excluded(member.uid)]
    if found.need:
        return _need(facts, state, round_, found)
    if found.holding:
        chosen = waves.chosen(facts, round_, found.serving, found.holding)
        return _commit(facts, state, chosen) if chosen else waves.done(facts, state)
    if found.serving and len(found.serving) + len(left_out(facts, state)) >= len(facts.scope(round_)):
        return waves.done(facts, state)
    if found.waiting:
        return None
    return fail(facts, state, round_.reason, round_.message or "nobody is left to bring it to")


def _away(facts: Facts, state: State, round_: Round, found: Muster) -> State | None:
    """Agents come back within seconds if they are alive. Without those that the rollout can spare it goes on
    then; for others it waits as long as for anybody to join."""
    spare = round_.catch_up or len(left_out(facts, state)) + len(found.away) <= facts.limit
    patience = RECONNECT if spare else max(RECONNECT, facts.world.spec.timeouts.join)
    late = [
        member
        for member in found.away
        if facts.now >= absent_since(member, facts.world) + patience or (round_.loss and spare)
    ]
    if not late:
        return None
    return exclude(facts, state, late[0], Reason.JOIN_TIMEOUT, f"{late[0].name}: {late[0].message}")


def _need(facts: Facts, state: State, round_: Round, found: Muster) -> State | None:
    version = round_.target.version
    if facts.source.retains(version) is None:
        return _no_copy(facts, state, round_, found)
    state = readmit(state, {member.uid for member in found.need})
    state = state.remember(source=facts.source.uid)
    epoch = state.epoch
    if epoch is not None and group.usable(facts, epoch, found.need, version):
        return enter(facts, state, Step.CHECKING, epoch.timeouts.join)
    fresh = group.propose(facts, state, found.need)
    if round_.loss:
        message = f"epoch {fresh.number}: {names(found.need)} without those that were lost"
        state = state.note(Reason.GROUPING, message)
    state = state.remember(epoch=fresh, highest_epoch=fresh.number)
    return enter(facts, state, Step.LISTENING, fresh.timeouts.join)


def _no_copy(facts: Facts, state: State, round_: Round, found: Muster) -> State | None:
    """The trainer may come back; once it can't, or not in time, those who have no copy do without."""
    trainer = facts.source.trainer
    gone = trainer is None or trainer.pod.finished
    dropped = facts.source.usable
    if not gone and not dropped and facts.now < round_.deadline + GRACE:
        return None
    version = round_.target.version
    if dropped:
        reason, why = Reason.VERSION_NOT_RETAINED, f"no trainer keeps a copy of {version} any more"
    else:
        reason, why = Reason.TRANSFER_FAILED, f"the trainer was lost before everybody had {version}"
    if not found.holding and not found.serving:
        return fail(facts, state, reason, why)
    for member in found.need:
        state = exclude(facts, state, member, reason, f"{member.name}: {why}")
    return state


def _commit(facts: Facts, state: State, chosen: list[Member]) -> State:
    assert state.round is not None
    uids = {member.uid for member in chosen}
    state = readmit(state, uids)
    state = enter(facts, state, Step.COMMITTING, facts.world.spec.timeouts.commit)
    state = state.change(
        frozen=True,
        committed=tuple(member.uid for member in chosen),
        stale=tuple((member.uid, member.serving.failure) for member in chosen),
    )
    assert state.round is not None
    if state.round.waves or state.round.back:
        # Before the first of them is told: the next leader goes on from here, and no further.
        state = state.write(rollout=status_of(state.round, Outcome.IN_PROGRESS))
    return state


def regroup(facts: Facts, state: State) -> State:
    """The epoch is lost: begin again, with whoever is left."""
    state = state.remember(epoch=None)
    state = enter(facts, state, Step.GATHERING, facts.world.spec.timeouts.join)
    return state.change(loss=True)
