"""Leaving members out, for how long, and when that is too many."""

from dataclasses import replace
from math import inf

from weightsync_contract.messages import VersionId
from weightsync_contract.reasons import Reason
from weightsync_operator.core.facts import Facts, State
from weightsync_operator.core.goal import at_home
from weightsync_operator.core.limits import BACKOFF, BACKOFF_LIMIT, TRIES
from weightsync_operator.core.membership import Member
from weightsync_operator.core.memory import Exclusion


def exclude(
    facts: Facts, state: State, member: Member, reason: Reason, message: str, lasting: bool = False
) -> State:
    """Leave a member out of the present round. The group that it is in is not used again."""
    assert state.round is not None
    before = state.memory.exclusion(member.uid)
    if before is not None and before.active:
        return state
    tries = before.tries + 1 if before else 1
    exclusion = Exclusion(
        member.uid,
        reason,
        message,
        state.round.target.version,
        member.serving.boot,
        member.incarnation,
        inf if lasting else facts.now + backoff(tries),
        tries,
    )
    others = tuple(each for each in state.memory.exclusions if each.uid != member.uid)
    epoch = state.epoch
    if epoch is not None and any(each.uid == member.uid for each in epoch.participants):
        state = state.remember(epoch=None)
    state = state.remember(exclusions=(*others, exclusion)).change(reason=reason, message=message)
    return state.note(Reason.EXCLUDED, f"{message} ({reason})", warning=True)


def backoff(tries: int) -> float:
    """Seconds until a member is tried again that was left out so many times in a row."""
    return min(BACKOFF * 2.0 ** (tries - 1), BACKOFF_LIMIT)


def blocked(facts: Facts, exclusion: Exclusion, version: VersionId) -> bool:
    """Whether it is too early to try the member again. One that restarted is tried at once, a few times."""
    if not exclusion.active:
        return False
    if exclusion.until == inf and exclusion.version != version:
        return False
    member = facts.members.get(exclusion.uid)
    restarted = member is not None and (
        (member.serving.boot not in ("", exclusion.boot)) or (member.incarnation != exclusion.incarnation)
    )
    if restarted and exclusion.tries < TRIES:
        return False
    if exclusion.until == inf:
        return not restarted
    return facts.now < exclusion.until


def open_to(facts: Facts, state: State, member: Member, version: VersionId) -> bool:
    """Whether a member may be tried now."""
    exclusion = state.memory.exclusion(member.uid)
    return exclusion is None or not blocked(facts, exclusion, version)


def readmit(state: State, uids: set[str]) -> State:
    """These take part again; how often each was tried is kept."""
    if not any(each.active and each.uid in uids for each in state.memory.exclusions):
        return state
    return state.remember(
        exclusions=tuple(
            replace(each, active=False) if each.uid in uids else each for each in state.memory.exclusions
        )
    )


def forgive(facts: Facts, state: State) -> State:
    """Forget exclusions of members that are gone, or that have what was wanted of them."""
    kept = tuple(each for each in state.memory.exclusions if not _over(facts, state, each))
    return state if kept == state.memory.exclusions else state.remember(exclusions=kept)


def _over(facts: Facts, state: State, exclusion: Exclusion) -> bool:
    member = facts.members.get(exclusion.uid)
    if member is None:
        return True
    wanted = state.round.target.version if state.round else None
    if wanted is not None and exclusion.uid in (state.round.scope if state.round else ()):
        return member.serves(wanted)
    return at_home(facts, state, member)


def left_out(facts: Facts, state: State) -> list[Member]:
    """Members that the present round has left out."""
    assert state.round is not None
    return [member for member in facts.scope(state.round) if state.memory.excluded(member.uid)]


def too_many(facts: Facts, state: State) -> bool:
    """Whether a rollout has lost more members than it may. A catch-up can't: nobody serves less for it."""
    assert state.round is not None
    out = {member.uid for member in left_out(facts, state)}
    version = state.round.target.version
    out |= {
        uid for uid in state.round.fallen if uid in facts.members and not facts.members[uid].serves(version)
    }
    return not state.round.catch_up and len(out) > facts.limit
