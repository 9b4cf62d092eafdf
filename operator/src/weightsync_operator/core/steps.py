"""The steps of a round that have a group: listen, join, check, transfer; and what happens when one fails."""

from dataclasses import replace

from weightsync_contract.messages import TransferState
from weightsync_contract.reasons import FailureCode, Reason
from weightsync_operator.core import blame, group
from weightsync_operator.core.blame import Trouble
from weightsync_operator.core.exclusion import exclude
from weightsync_operator.core.facts import Facts, State
from weightsync_operator.core.gather import regroup
from weightsync_operator.core.limits import GRACE, NAMES, RECONNECT, RETRIES, SETTLE
from weightsync_operator.core.membership import Standing, absent_since
from weightsync_operator.core.memory import Epoch, Round, Step
from weightsync_operator.core.model import Participant
from weightsync_operator.core.outcome import enter, fail, follow

WITH_GROUP = (Step.LISTENING, Step.JOINING, Step.CHECKING, Step.TRANSFERRING)


def listened(facts: Facts, state: State) -> State | None:
    """LISTENING is over once rank 0 says where; only a written epoch is given to the members."""
    round_, epoch = state.round, state.epoch
    if round_ is None or epoch is None or round_.step is not Step.LISTENING:
        return None
    transfer = group.transfer_of(facts, epoch.participants[0].uid)
    if transfer is None or not group.in_epoch(transfer, epoch) or not transfer.endpoint:
        return None
    if transfer.state not in (TransferState.JOINING, TransferState.JOINED):
        return None
    epoch = replace(epoch, endpoint=transfer.endpoint)
    state = follow(facts, state, round_.target.version.run)
    state = state.remember(epoch=epoch).write(group=group.persisted(epoch))
    return state.change(step=Step.JOINING, step_began=facts.now)


def joined(facts: Facts, state: State) -> State | None:
    """JOINING is over once every rank is in."""
    round_, epoch = state.round, state.epoch
    if round_ is None or epoch is None or round_.step is not Step.JOINING or facts.world.spec.paused:
        return None
    transfers = [group.transfer_of(facts, each.uid) for each in epoch.participants]
    if not all(transfer and group.joined(transfer, epoch) for transfer in transfers):
        return None
    return enter(facts, state, Step.CHECKING, epoch.timeouts.join)


def checked(facts: Facts, state: State) -> State | None:
    """CHECKING is over once everybody knows the layout and can take it; then the target is frozen."""
    round_, epoch = state.round, state.epoch
    if round_ is None or epoch is None or round_.step is not Step.CHECKING or facts.world.spec.paused:
        return None
    if _unchecked(facts, epoch, round_):
        return None
    version = round_.target.version
    state = state.remember(epoch=replace(epoch, moved=version))
    return enter(facts, state, Step.TRANSFERRING, epoch.timeouts.transfer).change(frozen=True)


def transferred(facts: Facts, state: State) -> State | None:
    """TRANSFERRING is over once all have it staged, with the digest of the source. That the trainer has sent
    proves nothing."""
    round_, epoch = state.round, state.epoch
    if round_ is None or epoch is None or round_.step is not Step.TRANSFERRING:
        return None
    if _unstaged(facts, epoch, round_):
        return None
    if facts.world.spec.paused:
        return None
    return enter(facts, state, Step.GATHERING, facts.world.spec.timeouts.join)


def _unchecked(facts: Facts, epoch: Epoch, round_: Round) -> list[Participant]:
    found = []
    for each in epoch.participants:
        transfer = group.transfer_of(facts, each.uid)
        known = transfer is not None and transfer.checked == round_.target.layout
        if not known or transfer is None or not group.joined(transfer, epoch):
            found.append(each)
    return found


def _unstaged(facts: Facts, epoch: Epoch, round_: Round) -> list[Participant]:
    version = round_.target.version
    return [
        each
        for each in epoch.participants[1:]
        if (member := facts.members.get(each.uid))
        and not member.holds(round_.target, facts.verify)
        and not member.has(version)
        and not member.applies(version)
    ]


# ---------------------------------------------------------------------------- failures


def broken(facts: Facts, state: State) -> State | None:
    """An epoch in which anybody is lost ends for all; the next one is without who is to blame."""
    round_, epoch = state.round, state.epoch
    if round_ is None or round_.step not in WITH_GROUP:
        return None
    if epoch is None:
        return regroup(facts, state)
    found = blame.troubles(facts, epoch, round_)
    if not found:
        return None
    culprits = [each for each in found if not each.told and not each.gone and each.participant.rank != 0]
    if culprits:
        return _without(facts, state, culprits)
    if any(each.gone for each in found):
        gone = next(each for each in found if each.gone)
        return regroup(facts, state.change(reason=gone.reason, message=gone.message))
    first = found[0]
    if any(not each.told for each in found):
        return _again(facts, state, first.reason, first.message)
    return _told(facts, state, round_, epoch, found)


def _told(facts: Facts, state: State, round_: Round, epoch: Epoch, found: list[Trouble]) -> State | None:
    """Some tell that others are lost. The lost ones mostly say so themselves, a moment later."""
    told = {each.participant.uid for each in found}
    if round_.step in (Step.LISTENING, Step.JOINING):
        suspects = [each for each in blame.silent(facts, epoch) if each.uid not in told]
    else:
        suspects = blame.suspects(facts, epoch, round_, told)
    away = [each for each in suspects if each.rank != 0 and not facts.members[each.uid].connected]
    if not away:
        if round_.told_at is None:
            return state.change(told_at=facts.now)
        if facts.now < round_.told_at + SETTLE:
            return None
    reason, message = found[0].reason, found[0].message
    blamed = [each for each in away or suspects if each.rank != 0]
    if not blamed:
        slow = [
            each for each in found if each.code is FailureCode.TRANSFER_TIMEOUT and each.participant.rank != 0
        ]
        if slow and round_.step is Step.TRANSFERRING:
            return _without(facts, state, slow)
        return _again(facts, state, reason, message)
    lost = "its agent's session is gone" if away else "it said nothing while others lost it"
    return _without(
        facts, state, [Trouble(each, reason, f"{each.name}: {lost} ({message})") for each in blamed]
    )


def _without(facts: Facts, state: State, culprits: list[Trouble]) -> State:
    for each in culprits:
        member = facts.members[each.participant.uid]
        state = exclude(facts, state, member, each.reason, each.message, each.lasting)
    messages = "; ".join(each.message for each in culprits[:NAMES])
    return regroup(facts, state.change(reason=culprits[0].reason, message=messages))


def _again(facts: Facts, state: State, reason: Reason, message: str) -> State:
    """Nobody can be blamed, or only the trainer, without whom nothing goes: another epoch, a few times. Not when
    some have the version already: those do not wait for the others."""
    assert state.round is not None
    ranks = state.epoch.participants[1:] if state.epoch else ()
    lost = [each for each in ranks if each.uid in facts.members]
    others = [each for each in facts.scope(state.round) if each.uid not in {rank.uid for rank in lost}]
    if lost and any(each.holds(state.round.target, facts.verify) for each in others):
        return _without(facts, state, [Trouble(each, reason, f"{each.name}: {message}") for each in lost])
    retries = state.round.retries + 1
    state = state.change(retries=retries, reason=reason, message=message)
    if retries > RETRIES:
        return fail(facts, state, reason, f"{retries} epochs in a row were lost: {message}")
    return regroup(facts, state)


def never_told(facts: Facts, state: State) -> State | None:
    """A broadcast waits for every rank. One whose agent's session went before it was told to receive would hold up
    all others until the transfer's deadline; while bytes move, it was told."""
    round_, epoch = state.round, state.epoch
    if round_ is None or epoch is None or round_.step is not Step.TRANSFERRING:
        return None
    transfers = {each.uid: group.transfer_of(facts, each.uid) for each in epoch.participants}
    if any(transfer and transfer.bytes for transfer in transfers.values()):
        return None
    cut_off = []
    for each in epoch.participants[1:]:
        member, transfer = facts.members.get(each.uid), transfers[each.uid]
        if member is None or member.standing is not Standing.ABSENT or transfer is None:
            continue
        waits = transfer.state is TransferState.JOINED and group.in_epoch(transfer, epoch)
        if waits and facts.now >= absent_since(member, facts.world) + RECONNECT:
            message = f"{each.name}: its agent's session went before it was told to receive"
            cut_off.append(Trouble(each, Reason.TRANSFER_FAILED, message))
    return _without(facts, state, cut_off) if cut_off else None


# ---------------------------------------------------------------------------- deadlines


def overdue(facts: Facts, state: State) -> State | None:
    """A step that took too long ends without those who did not do their part."""
    round_, epoch = state.round, state.epoch
    if round_ is None or epoch is None or round_.step not in WITH_GROUP:
        return None
    if facts.now < round_.deadline + GRACE:
        return None
    match round_.step:
        case Step.LISTENING:
            return _again(
                facts, state, Reason.JOIN_TIMEOUT, f"{epoch.participants[0].name} did not listen in time"
            )
        case Step.JOINING:
            return _late(
                facts, state, blame.silent(facts, epoch), Reason.JOIN_TIMEOUT, "it did not join in time"
            )
        case Step.CHECKING:
            late = _unchecked(facts, epoch, round_)
            why = "the engine did not say in time whether it can take the manifest"
            return _late(facts, state, late, Reason.JOIN_TIMEOUT, why) if late else None
        case _:
            late = _unstaged(facts, epoch, round_)
            why = "it did not receive the version in time"
            return _late(facts, state, late, Reason.TRANSFER_TIMEOUT, why) if late else None


def _late(facts: Facts, state: State, late: list[Participant], reason: Reason, why: str) -> State | None:
    epoch = state.epoch
    assert epoch is not None
    if not late and all(
        (transfer := group.transfer_of(facts, each.uid)) and group.joined(transfer, epoch)
        for each in epoch.participants
    ):
        # Everybody is in: only a pause holds the round up.
        return None
    if not late or any(each.rank == 0 for each in late):
        return _again(
            facts, state, reason, f"{late[0].name}: {why}" if late else "not all ranks joined in time"
        )
    return _without(facts, state, [Trouble(each, reason, f"{each.name}: {why}") for each in late])
