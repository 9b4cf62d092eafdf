"""Which version is wanted, and whom it may be taken from: a version goes back only if spec or action said so."""

from weightsync_contract.messages import ServingState, VersionId
from weightsync_operator.core.facts import Facts, State
from weightsync_operator.core.membership import Member
from weightsync_operator.core.model import RejectedStatus, VersionTarget
from weightsync_operator.core.source import target

_RUNS = 8
"""Runs of which a version given up is remembered: those that a trainer still keeps a copy of are fewer."""


def pinned(facts: Facts, state: State) -> VersionId | None:
    """The version that the spec names, in the fleet's run unless it names that too. None with policy Latest, or
    while there is no run that it could be of."""
    pin = facts.world.spec.pin
    if pin is None:
        return None
    latest = facts.source.latest
    run = pin.run or (state.current.run if state.current else latest.version.run if latest else "")
    return VersionId(run, pin.version) if run else None


def rejected(state: State, version: VersionId) -> bool:
    """Whether somebody rolled back from this version, or gave its rollout up."""
    return any(each.run == version.run and version.version <= each.version for each in state.status.rejected)


def reject(state: State, version: VersionId) -> State:
    """It, and what came before it in its run, is not brought by itself any more."""
    if rejected(state, version):
        return state
    others = tuple(each for each in state.status.rejected if each.run != version.run)
    return state.write(rejected=(*others, RejectedStatus(version.run, version.version))[-_RUNS:])


def goal(facts: Facts, state: State) -> VersionTarget | None:
    """What the spec asks for now, if it can be had from the source."""
    if facts.world.spec.pin is not None:
        version = pinned(facts, state)
        published = facts.source.retains(version) if version else None
        return target(published) if published else None
    latest = facts.source.latest
    return None if latest is None or rejected(state, latest.version) else target(latest)


def goes_back(state: State, version: VersionId) -> bool:
    """Whether bringing it takes the fleet back within its run."""
    return not state.after(version) and version != state.current


def missing_pin(facts: Facts, state: State) -> VersionId | None:
    """The pinned version, if the fleet is not at it and nobody keeps a copy."""
    version = pinned(facts, state)
    if version is None or version == state.current or not facts.source.usable:
        return None
    return version if facts.source.retains(version) is None else None


def _may_leave(facts: Facts, state: State, held: VersionId, to: VersionId) -> bool:
    round_ = state.round
    if round_ is not None and round_.back and round_.target.version == to:
        return True
    return pinned(facts, state) == to or (rejected(state, held) and held != to)


def ahead(facts: Facts, state: State, member: Member, version: VersionId) -> bool:
    """Whether a member holds a later version of the run and may not be taken back to this one."""
    held = member.serving.version
    return held is not None and member.beyond(version) and not _may_leave(facts, state, held, version)


def retreats(facts: Facts, state: State, member: Member) -> bool:
    """Whether a member holds what was given up, and is to get the current version instead."""
    held, current = member.serving.version, state.current
    if current is None or held is None or held == current:
        return False
    if member.serving.state not in (ServingState.SERVING, ServingState.WITHHELD):
        return False
    if state.memory.parked is not None and state.memory.parked.round.target.version == held:
        return False
    pin_is_current = pinned(facts, state) == current
    return rejected(state, held) or (pin_is_current and member.beyond(current))


def at_home(facts: Facts, state: State, member: Member) -> bool:
    """Whether a member serves what it may go on serving."""
    served = any(member.serves(version) for version in state.memory.allowed)
    return served and not retreats(facts, state, member)


def forget_versions(facts: Facts, state: State) -> State | None:
    """What was given up is not allowed any more once nobody holds it."""
    if state.round is not None or state.memory.parked is not None or state.current is None:
        return None
    held = {member.serving.version for member in facts.members.values()}
    pin_is_current = pinned(facts, state) == state.current
    kept = tuple(
        each
        for each in state.memory.allowed
        if each == state.current or each in held or not (rejected(state, each) or pin_is_current)
    )
    return None if kept == state.memory.allowed else state.remember(allowed=kept)
