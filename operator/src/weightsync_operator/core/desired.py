"""What each agent is told: everything that is wanted of it, each time anew."""

from weightsync_contract.messages import (
    Desired,
    Fleet,
    Group,
    Phase,
    Rollout,
    Timeouts,
    Transport,
    VersionId,
    Wanted,
)
from weightsync_contract.reasons import Outcome, Reason, Role
from weightsync_operator.core.facts import Facts, State
from weightsync_operator.core.goal import pinned, rejected
from weightsync_operator.core.idle import current_target
from weightsync_operator.core.membership import Member
from weightsync_operator.core.memory import REASON_OF_STEP, Epoch, Step
from weightsync_operator.core.model import InitialWeights, Participant, VersionTarget
from weightsync_operator.core.waves import what_next

_PHASE = {
    Step.CHECKING: Phase.CHECK,
    Step.TRANSFERRING: Phase.TRANSFER,
    Step.COMMITTING: Phase.TRANSFER,
}
_REASONS = {
    Outcome.SUCCEEDED: Reason.COMPLETE,
    Outcome.SUPERSEDED: Reason.SUPERSEDED,
    Outcome.ABORTED: Reason.ABORTED,
}
_TIMED = (Step.LISTENING, Step.JOINING, Step.CHECKING, Step.TRANSFERRING)


def desired(facts: Facts, state: State) -> dict[str, Desired]:
    """By pod uid, for every agent of the fleet that has a session."""
    told = fleet(facts, state)
    found = {
        pod.uid: _trainer(facts, state, pod.uid, told)
        for pod in facts.world.trainers
        if pod.uid not in facts.world.claims
        and (view := facts.world.agents.get(pod.uid))
        and view.connected
        and view.hello.role is Role.TRAINER
    }
    initial = _serve_initial(facts, state)
    for member in facts.members.values():
        if member.connected and member.view and member.view.hello.role is Role.INFERENCE:
            found[member.uid] = _member(facts, state, member, told, initial)
    return found


def _trainer(facts: Facts, state: State, uid: str, told: Fleet) -> Desired:
    round_, wanted = state.round, None
    if round_ is not None and uid == facts.source.uid and facts.source.retains(round_.target.version):
        phase = _PHASE.get(round_.step, Phase.TRANSFER if round_.frozen else None)
        wanted = _wanted(round_.target, phase) if phase else None
    return _base(facts, state, uid, told, wanted)


def _member(facts: Facts, state: State, member: Member, told: Fleet, initial: bool) -> Desired:
    round_, commit, digest = state.round, None, ""
    committing = round_ is not None and round_.step is Step.COMMITTING and member.uid in round_.committed
    if round_ is not None and committing and not state.memory.excluded(member.uid):
        commit = round_.target.version
        digest = round_.target.digest if facts.verify else ""
    return _base(
        facts,
        state,
        member.uid,
        told,
        _member_wanted(facts, state, member),
        commit,
        digest,
        state.memory.allowed,
        initial,
    )


def _member_wanted(facts: Facts, state: State, member: Member) -> Wanted | None:
    """The version of the round; and what a member holds is named as long as it may still be committed."""
    round_, epoch = state.round, state.epoch
    inside = epoch is not None and any(each.uid == member.uid for each in epoch.participants)
    if round_ is not None and member.uid in round_.scope:
        if member.holds(round_.target, facts.verify):
            return _wanted(round_.target, Phase.TRANSFER)
        if inside and round_.step in _PHASE and not state.memory.excluded(member.uid):
            return _wanted(round_.target, _PHASE[round_.step])
        return None
    parked = state.memory.parked
    if parked is not None and member.holds(parked.round.target, facts.verify):
        return _wanted(parked.round.target, Phase.TRANSFER)
    current = current_target(facts, state)
    if current is None or inside or not member.holds(current, facts.verify):
        return None
    return _wanted(current, Phase.TRANSFER)


def _wanted(target: VersionTarget, phase: Phase) -> Wanted:
    return Wanted(target.version, target.layout, target.digest, target.total_bytes, phase)


def _base(
    facts: Facts,
    state: State,
    uid: str,
    told: Fleet,
    wanted: Wanted | None,
    commit: VersionId | None = None,
    commit_digest: str = "",
    allowed: tuple[VersionId, ...] = (),
    serve_initial: bool = False,
) -> Desired:
    world, epoch, round_ = facts.world, state.epoch, state.round
    place = next((each for each in epoch.participants if each.uid == uid), None) if epoch else None
    group = _group(epoch, place) if epoch and place else None
    transport: Transport = epoch.transport if epoch and place else world.spec.transport
    timeouts: Timeouts = epoch.timeouts if epoch and place else world.spec.timeouts
    timed = place is not None and round_ is not None and round_.step in _TIMED
    left = max(1, int((round_.deadline - facts.now) * 1000)) if timed and round_ else 0
    return Desired(
        weightsync=world.ref,
        term=state.memory.term,
        seq=0,
        group=group,
        wanted=wanted,
        commit=commit,
        commit_digest=commit_digest,
        allowed=allowed,
        serve_initial=serve_initial,
        in_flight=world.spec.in_flight,
        verify=world.spec.verify,
        transport=transport,
        timeouts=timeouts,
        remaining_ms=left,
        retained_versions=world.spec.retained_versions,
        keep=_keep(facts, state) if uid == facts.source.uid else (),
        fleet=told,
    )


def _keep(facts: Facts, state: State) -> tuple[VersionId, ...]:
    """What somebody is still to get, though it may have become an old version by then."""
    round_, parked, pin = state.round, state.memory.parked, pinned(facts, state)
    found = (
        round_.target.version if round_ else None,
        parked.round.target.version if parked else None,
        pin if facts.world.spec.pin else None,
    )
    return tuple(dict.fromkeys(each for each in found if each is not None))


def _group(epoch: Epoch, place: Participant) -> Group | None:
    """Members get theirs once rank 0 listens, and once that is written."""
    if place.rank != 0 and not epoch.endpoint:
        return None
    return Group(epoch.number, epoch.nonce, place.rank, place.ranks, epoch.world_size, epoch.endpoint)


def _serve_initial(facts: Facts, state: State) -> bool:
    """Only while no version exists anywhere."""
    if facts.world.spec.initial_weights is not InitialWeights.SERVE:
        return False
    if state.current or state.memory.allowed or state.status.rollout:
        return False
    published = any(
        view.observed and view.observed.source and view.observed.source.versions
        for view in facts.world.agents.values()
    )
    return not published and not any(member.serving.version for member in facts.members.values())


def fleet(facts: Facts, state: State) -> Fleet:
    """How the fleet stands, for who waits in publish()."""
    return Fleet(state.current, _rollout(state), len(facts.members), synced(facts, state))


def _rollout(state: State) -> Rollout | None:
    round_, failed, last = state.round, state.memory.failed, state.status.rollout
    if round_ is not None and not round_.catch_up:
        return Rollout(round_.target.version, Outcome.IN_PROGRESS, REASON_OF_STEP[round_.step])
    if state.memory.parked is not None:
        parked = state.memory.parked
        return Rollout(
            parked.round.target.version, Outcome.IN_PROGRESS, Reason.CANARY_PAUSED, what_next(parked)
        )
    if last is None:
        return None
    version = VersionId(last.run, last.version)
    if last.outcome is Outcome.FAILED and failed is not None and failed.version == version:
        return Rollout(version, Outcome.FAILED, failed.reason, failed.message)
    return Rollout(version, last.outcome, _REASONS.get(last.outcome, Reason.DEGRADED))


def reference(state: State) -> VersionId | None:
    """What members are counted against: the version being rolled out, or that failed, or the current one."""
    if state.round is not None and not state.round.catch_up:
        return state.round.target.version
    if state.memory.parked is not None:
        return state.memory.parked.round.target.version
    failed = state.memory.failed
    if failed is not None and not rejected(state, failed.version):
        return failed.version
    return state.current


def synced(facts: Facts, state: State) -> int:
    """How many members serve the version that they are to serve."""
    version = reference(state)
    return sum(member.serves(version) for member in facts.members.values()) if version else 0
