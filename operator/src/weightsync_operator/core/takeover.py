"""Becoming the leader of a WeightSync, and going on where the last one stopped."""

from collections import Counter

from weightsync_contract.messages import TransferState, VersionId
from weightsync_contract.reasons import Outcome, Reason
from weightsync_operator.core import group
from weightsync_operator.core.actions import refuse_unknown
from weightsync_operator.core.facts import Facts, State
from weightsync_operator.core.goal import pinned, rejected
from weightsync_operator.core.membership import Member, Standing, established
from weightsync_operator.core.memory import FailedRollout, Memory
from weightsync_operator.core.model import CurrentVersion, VersionTarget, World
from weightsync_operator.core.outcome import begin
from weightsync_operator.core.source import target
from weightsync_operator.core.waves import park_again

IN_HAND = (TransferState.RECEIVING, TransferState.STAGED)


def term_to_write(world: World, memory: Memory) -> int | None:
    """The term that must be written before anything is said: a higher one than anybody has heard of.

    None when ours is written. An agent that heard a higher term obeys nobody with ours, so ours goes up.
    """
    refused = max((view.nacked_term for view in world.agents.values()), default=0)
    if memory.term == 0:
        reported = [refused, *(view.hello.term for view in world.agents.values())]
        reported += [view.observed.highest_term for view in world.agents.values() if view.observed]
        return max(world.status.term, *reported) + 1
    if refused >= memory.term:
        return refused + 1
    # The status was replaced from outside: ours goes back into it before anything is said.
    return memory.term if world.status.term < memory.term else None


def missing(world: World) -> list[str]:
    """Names of the last group's pods that are still there and have not come back to this leader."""
    pods = {pod.uid: pod for pod in (*world.trainers, *world.members) if not pod.finished}
    names = []
    for each in group.roster(world.status.group):
        view = world.agents.get(each.uid)
        back = view is not None and view.connected and view.observed is not None
        if each.uid in pods and each.uid not in world.claims and not back:
            names.append(each.name)
    if _in_waves(world):
        # Whoever is not heard of may be one of those that have the new version: they are counted, not guessed.
        known = set(names)
        names += [
            pod.name
            for uid, pod in pods.items()
            if uid not in world.claims
            and pod in world.members
            and pod.name not in known
            and ((view := world.agents.get(uid)) is None or view.observed is None)
        ]
    return names


def _in_waves(world: World) -> bool:
    """Whether a canary is under way, or may be: a status that is lost does not say."""
    rollout = world.status.rollout
    if rollout is None:
        return bool(world.spec.waves) and world.status.current is None
    return rollout.outcome is Outcome.IN_PROGRESS and rollout.step_index is not None


def adopt(facts: Facts, state: State) -> State:
    """Take over what the last leader left: its group, what may be served, and a rollout under way."""
    lost = _lost_status(facts, state)
    state = state if lost is state else refuse_unknown(facts, lost)
    state = state.remember(
        adopted=True,
        epoch=group.inherit(facts, state),
        highest_epoch=group.highest(facts.world, state),
        allowed=_allowed(facts, state),
        failed=_failed(facts, state),
    )
    scope = [member for member in facts.members.values() if _takes_part(member)]
    written = _written(facts, state)
    if written is not None and scope:
        # Never further than was written: in waves it pauses again where it stood.
        assert state.status.rollout is not None
        step, paused = state.status.rollout.step_index, bool(state.status.rollout.pause_time)
        state = begin(
            facts, state, written, scope, catch_up=False, frozen=True, wave=step or 0, back=step is None
        )
        return park_again(facts, state) if paused else state
    under_way = _under_way(facts, state)
    if under_way is None:
        return state
    return begin(facts, state, under_way, scope, catch_up=False, frozen=True)


def _written(facts: Facts, state: State) -> VersionTarget | None:
    """A rollout in waves, or one that goes back, which the status has as under way: it was asked for."""
    rollout = state.status.rollout
    if rollout is None or rollout.outcome is not Outcome.IN_PROGRESS or state.current is None:
        return None
    version = VersionId(rollout.run, rollout.version)
    other_run = version.run != state.current.run and rejected(state, state.current)
    back = not state.after(version) or other_run
    if version == state.current or (rollout.step_index is None and not back):
        return None
    return None if _unwanted(facts, state, version) else _target(facts, version)


def _unwanted(facts: Facts, state: State, version: VersionId) -> bool:
    """Whether the spec names another version, or somebody rolled back from this one."""
    if facts.world.spec.pin is not None:
        return pinned(facts, state) != version
    return rejected(state, version) and state.after(version)


def _takes_part(member: Member) -> bool:
    return member.standing is Standing.READY or established(member)


def _lost_status(facts: Facts, state: State) -> State:
    """A status that says nothing of any version, while members serve one: most of them are right."""
    if state.status.current is not None or state.status.rollout is not None:
        return state
    served = Counter(
        (member.serving.version, member.serving.digest)
        for member in facts.members.values()
        if established(member) and member.serving.version is not None
    )
    if not served:
        return state
    (version, digest), _ = served.most_common(1)[0]
    assert version is not None
    if facts.world.spec.waves:
        # A canary may have been under way, of however many: it is not promoted by having grown beyond half.
        known = [(_is_latest_run(facts, each), each.version, each, seen) for each, seen in served]
        *_, version, digest = min(known, key=lambda row: row[:2])
    return state.write(current=CurrentVersion(version.run, version.version, digest, facts.world.wall))


def _is_latest_run(facts: Facts, version: VersionId) -> bool:
    latest = facts.source.latest
    return latest is not None and version.run == latest.version.run


def _allowed(facts: Facts, state: State) -> tuple[VersionId, ...]:
    allowed = [state.current] if state.current else []
    rollout = state.status.rollout
    if state.current and rollout and rollout.outcome is Outcome.SUCCEEDED and _settled(facts, state):
        return tuple(allowed)
    for member in facts.members.values():
        version = member.serving.version
        if established(member) and version is not None and version not in allowed:
            allowed.append(version)
    return tuple(allowed)


def _settled(facts: Facts, state: State) -> bool:
    """Whether no rollout after the last written one shows in what the members have."""
    return _under_way(facts, state) is None


def _failed(facts: Facts, state: State) -> FailedRollout | None:
    rollout = state.status.rollout
    if rollout is None or rollout.outcome is not Outcome.FAILED:
        return None
    progressing = next((each for each in state.status.conditions if each.type == "Progressing"), None)
    return FailedRollout(
        VersionId(rollout.run, rollout.version),
        _reason(progressing.reason if progressing else ""),
        progressing.message if progressing else "it failed under the last leader",
        state.status.observed_generation,
        tuple(sorted(facts.members)),
    )


def _reason(text: str) -> Reason:
    known = {reason.value for reason in Reason}
    return Reason(text) if text in known else Reason.TRANSFER_FAILED


def go_forward(facts: Facts, state: State) -> State | None:
    """Members serve a later version than this leader knows of: the last one's word reached them after it was
    gone. It was verified like any other, so all are brought to it."""
    if state.round is not None or state.memory.parked is not None or facts.world.spec.paused:
        return None
    known = state.memory.allowed
    if not any(established(each) and each.serving.version not in known for each in facts.members.values()):
        return None
    under_way = _under_way(facts, state)
    if under_way is None or not any(each.has(under_way.version) for each in facts.members.values()):
        return None
    scope = [member for member in facts.members.values() if _takes_part(member)]
    return begin(facts, state, under_way, scope, catch_up=False, frozen=True)


def _under_way(facts: Facts, state: State) -> VersionTarget | None:
    """The version that members have in hand or already serve, and that the status does not know yet."""
    rollout = state.status.rollout
    failed = (
        VersionId(rollout.run, rollout.version) if rollout and rollout.outcome is Outcome.FAILED else None
    )
    began: Counter[VersionId] = Counter()
    for member in facts.members.values():
        version = _in_hand(member)
        if version is None or version in (state.current, failed) or not state.after(version):
            continue
        if _unwanted(facts, state, version):
            continue
        switched = member.serving.version == version or member.applies(version)
        # One that began to switch outweighs all that have only received.
        began[version] += len(facts.members) + 1 if switched else 1
    if not began:
        return None
    return _target(facts, max(began, key=lambda version: (began[version], version.version)))


def _in_hand(member: Member) -> VersionId | None:
    if established(member) and not member.applies(member.transfer.version or VersionId("", -1)):
        served = member.serving.version
        if member.transfer.state in IN_HAND and member.transfer.version != served:
            return member.transfer.version
        return served
    return member.transfer.version if member.transfer.state in IN_HAND else None


def _target(facts: Facts, version: VersionId) -> VersionTarget | None:
    """From the source if it still keeps the version, else from members that agree on its bytes."""
    published = facts.source.retains(version)
    if published is not None:
        return target(published)
    digests, layout, size = set(), "", 0
    for member in facts.members.values():
        if member.serving.version == version and established(member):
            digests.add(member.serving.digest)
        if member.transfer.state is TransferState.STAGED and member.transfer.version == version:
            digests.add(member.transfer.digest)
            layout, size = member.transfer.checked, member.transfer.total_bytes
    if len(digests) != 1 or "" in digests:
        return None
    return VersionTarget(version, layout, digests.pop(), size)
