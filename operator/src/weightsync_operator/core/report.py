"""The status as it is written, and not more often than it must be; the live view; and Events of what holds.

Writes grow with steps that take time and with failures, not with members: while a round goes on, the status
shows a step only once it has lasted, and counts only at its ends.
"""

from dataclasses import replace

from weightsync_contract.fleetview import FleetView, MemberView
from weightsync_contract.messages import Source, Transfer, VersionId
from weightsync_contract.reasons import Condition, Outcome, Reason, Role
from weightsync_operator.core.conditions import conditions, progressing, why
from weightsync_operator.core.desired import reference, synced
from weightsync_operator.core.facts import Facts, State
from weightsync_operator.core.limits import QUIET
from weightsync_operator.core.membership import Standing
from weightsync_operator.core.model import MemberCounts, Status
from weightsync_operator.core.outcome import status_of


def written(facts: Facts, state: State) -> State:
    """The state with the status that is to be written now."""
    round_ = state.round
    if round_ is None:
        return _idle(facts, state.remember(shown=()))
    key = _key(state)
    if key == state.memory.shown or facts.now < round_.step_began + QUIET:
        return state
    if not round_.catch_up:
        state = state.write(rollout=status_of(round_, Outcome.IN_PROGRESS))
    return replace(state.remember(shown=key, shown_at=facts.now), status=_full(facts, state))


def _key(state: State) -> tuple[str, ...]:
    round_, epoch = state.round, state.epoch
    assert round_ is not None
    number = str(epoch.number) if epoch else ""
    paused = "paused" if round_.paused_at is not None else ""
    return (
        round_.step,
        str(round_.wave),
        str(round_.target.version),
        number,
        paused,
        *sorted(state.active_exclusions()),
    )


def _idle(facts: Facts, state: State) -> State:
    before, after = facts.world.status, _full(facts, state)
    if after == before:
        return replace(state, status=after)
    soon = facts.now < state.memory.shown_at + QUIET
    if soon and _skeleton(after) == _skeleton(before):
        return replace(state, status=before)
    return replace(state.remember(shown_at=facts.now), status=after)


def _skeleton(status: Status) -> Status:
    """What must be written at once: everything but wording and counts. Which word was answered is no wording."""
    rows = tuple(
        each if each.type == Condition.ACTION_TAKEN else replace(each, message="")
        for each in status.conditions
    )
    return replace(status, conditions=rows, members=MemberCounts(), synced="")


def _full(facts: Facts, state: State) -> Status:
    everyone = facts.members.values()
    counts = MemberCounts(
        len(everyone),
        synced(facts, state),
        sum(member.standing is Standing.FENCED for member in everyone),
        sum(state.memory.excluded(member.uid) for member in everyone),
    )
    return replace(
        state.status,
        observed_generation=facts.world.generation,
        synced=f"{counts.synced}/{counts.total}",
        members=counts,
        conditions=conditions(facts, state),
    )


# ---------------------------------------------------------------------------- Events


def noted(facts: Facts, state: State) -> State:
    """Tell once of what is so and wants somebody's attention."""
    holds: dict[tuple[str, ...], tuple[Reason, str]] = {}
    for member in facts.members.values():
        if member.standing is Standing.FENCED:
            fence = ("fenced", member.uid, member.serving.boot)
            holds[fence] = (Reason.FENCED, f"{member.name}: {member.message}")
    pods = {pod.uid: pod for pod in (*facts.world.members, *facts.world.trainers)}
    for uid, owner in facts.world.claims.items():
        if uid in pods:
            message = f"{pods[uid].name} belongs to WeightSync {owner.name}"
            holds["conflict", uid, owner.uid] = (Reason.CONFLICT, message)
    if facts.source.reason in (Reason.TRAINER_CONFLICT, Reason.VERSION_CONFLICT):
        holds["source", facts.source.reason, facts.source.message] = (
            facts.source.reason,
            facts.source.message,
        )
    for key, (reason, message) in holds.items():
        if key not in state.memory.noted:
            state = state.note(reason, message, warning=True)
    if holds.keys() == state.memory.noted:
        return state
    return state.remember(noted=frozenset(holds))


# ---------------------------------------------------------------------------- the view


def view(facts: Facts, state: State) -> FleetView:
    """The live fleet."""
    _, reason, message = progressing(facts, state)
    return fleet_view(facts, state, reason, message)


def fleet_view(facts: Facts, state: State, reason: Reason, message: str) -> FleetView:
    """The live fleet, with what it is said to do."""
    world, epoch = facts.world, state.epoch
    ranks = {each.uid: each.rank for each in epoch.participants} if epoch else {}
    rows = []
    for pod in world.trainers:
        agent = world.agents.get(pod.uid)
        observed = agent.observed if agent else None
        rows.append(
            MemberView(
                pod.name,
                pod.uid,
                Role.TRAINER,
                bool(agent and agent.connected),
                observed.ranks if observed else 0,
                ranks.get(pod.uid, -1),
                observed.transfer if observed else Transfer(),
                source=(observed.source if observed else None) or Source(),
                message="" if agent and agent.connected else f"{pod.name}: no agent is connected",
            )
        )
    for member in facts.members.values():
        rows.append(
            MemberView(
                member.name,
                member.uid,
                Role.INFERENCE,
                member.connected,
                member.ranks,
                ranks.get(member.uid, -1),
                member.transfer,
                serving=member.serving,
                message=why(facts, state, member),
            )
        )
    round_ = state.round
    target: VersionId | None = round_.target.version if round_ else reference(state)
    return FleetView(
        world.ref.namespace,
        world.ref.name,
        state.memory.term,
        epoch.number if epoch else 0,
        epoch.world_size if epoch else 0,
        reason,
        message,
        target,
        state.current,
        tuple(rows),
    )
