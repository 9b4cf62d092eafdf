"""With no round under way: what would be worth one, and whether it may begin."""

from weightsync_contract.messages import VersionId
from weightsync_operator.core import group
from weightsync_operator.core.exclusion import open_to
from weightsync_operator.core.facts import Facts, State
from weightsync_operator.core.goal import ahead, goal, goes_back, retreats
from weightsync_operator.core.limits import BATCH, RECONNECT
from weightsync_operator.core.membership import Member, Standing, established
from weightsync_operator.core.model import VersionTarget
from weightsync_operator.core.outcome import begin
from weightsync_operator.core.source import target


def close_lost(facts: Facts, state: State) -> State | None:
    """A group that can't be used again is not kept open."""
    if state.round is not None or state.epoch is None or not group.lost(facts, state.epoch):
        return None
    return state.remember(epoch=None)


def failed_before(facts: Facts, state: State, version: VersionId) -> bool:
    """Whether the version failed, and neither the spec nor the membership is another since."""
    failed = state.memory.failed
    return (
        failed is not None
        and failed.version == version
        and failed.generation == facts.world.generation
        and failed.members == tuple(sorted(facts.members))
    )


def wanted(facts: Facts, state: State) -> VersionTarget | None:
    """A version that the fleet is to be brought to, and is not at."""
    asked = goal(facts, state)
    if asked is None or asked.version == state.current:
        return None
    if facts.world.spec.pin is None and not state.after(asked.version):
        return None
    return None if failed_before(facts, state, asked.version) else asked


def start_rollout(facts: Facts, state: State) -> State | None:
    """A new version: to all that can take it or that would be withheld without it."""
    new = wanted(facts, state)
    if state.round is not None or state.memory.parked is not None:
        return None
    if new is None or facts.world.spec.paused or not facts.source.usable:
        return None
    scope = [member for member in facts.members.values() if _concerned(facts, state, member, new)]
    if not any(member.connected for member in scope):
        return None
    if coming(facts):
        return None
    if in_waves(facts, state, new) and _catchable(facts, state):
        # A wave may stand for hours: who serves nothing gets the current version first.
        return None
    if not any(established(member) for member in scope) and _delayed(facts, state):
        return _wait(facts, state)
    return begin(facts, state, new, scope, catch_up=False)


def start_catch_up(facts: Facts, state: State) -> State | None:
    """Late, restarted and formerly excluded members get the current version."""
    current = current_target(facts, state)
    if state.round is not None or current is None or facts.world.spec.paused:
        return None
    new = wanted(facts, state)
    soon = new is not None and state.memory.parked is None and not in_waves(facts, state, new)
    if soon and facts.source.usable:
        # A rollout is about to begin; it brings them more.
        return None
    needy = _catchable(facts, state)
    if not needy or coming(facts):
        return None
    if _delayed(facts, state) and not all(member.holds(current, facts.verify) for member in needy):
        return _wait(facts, state)
    return begin(facts, state, current, needy, catch_up=True)


def in_waves(facts: Facts, state: State, new: VersionTarget) -> bool:
    """Whether a rollout of it would go in waves."""
    return bool(facts.world.spec.waves) and state.current is not None and not goes_back(state, new.version)


def _catchable(facts: Facts, state: State) -> list[Member]:
    """Members that need the current version and can have it."""
    current = current_target(facts, state)
    needy = behind(facts, state, current) if current else []
    if current and facts.source.retains(current.version) is None:
        return [member for member in needy if member.holds(current, facts.verify)]
    return needy


def current_target(facts: Facts, state: State) -> VersionTarget | None:
    """The current version, with what the source or else the status knows of it."""
    if state.current is None or state.status.current is None:
        return None
    published = facts.source.retains(state.current)
    return (
        target(published) if published else VersionTarget(state.current, "", state.status.current.digest, 0)
    )


def behind(facts: Facts, state: State, current: VersionTarget) -> list[Member]:
    """Members that could serve the current version and serve nothing that is allowed."""
    return [member for member in facts.members.values() if is_behind(facts, state, member, current)]


def is_behind(facts: Facts, state: State, member: Member, current: VersionTarget) -> bool:
    """Whether a member could serve the current version and serves nothing that is allowed."""
    if member.standing is Standing.READY and retreats(facts, state, member):
        return open_to(facts, state, member, current.version)
    return (
        member.standing is Standing.READY
        and not ahead(facts, state, member, current.version)
        and not any(member.has(version) or member.applies(version) for version in state.memory.allowed)
        and open_to(facts, state, member, current.version)
    )


def coming(facts: Facts) -> bool:
    """Whether agents may still be on their way to an operator that has just begun to lead."""
    return facts.now < facts.world.leading_since + RECONNECT and any(
        member.view is None or member.view.observed is None for member in facts.members.values()
    )


def _concerned(facts: Facts, state: State, member: Member, new: VersionTarget) -> bool:
    if member.standing is Standing.ABSENT:
        return established(member)
    if member.has(new.version) or member.holds(new, facts.verify) or member.applies(new.version):
        return True
    return member.standing is Standing.READY and open_to(facts, state, member, new.version)


def _delayed(facts: Facts, state: State) -> bool:
    """Whether it pays to wait a little: others are about to come up."""
    pending = any(member.standing is Standing.PENDING for member in facts.members.values())
    since = state.memory.waiting_since
    return pending and (since is None or facts.now < since + BATCH)


def _wait(facts: Facts, state: State) -> State | None:
    return state.remember(waiting_since=facts.now) if state.memory.waiting_since is None else None
