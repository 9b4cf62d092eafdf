"""Epochs: who is which rank, whether a group can be used again, and how it is written down.

An epoch's rank map never changes; another membership is another epoch, and its number was never used before.
"""

from collections.abc import Iterable

from weightsync_contract.messages import Transfer, TransferState, VersionId
from weightsync_operator.core.facts import Facts, State
from weightsync_operator.core.membership import Member
from weightsync_operator.core.memory import Epoch
from weightsync_operator.core.model import GroupStatus, Participant, World

IN_GROUP = (
    TransferState.JOINED,
    TransferState.CHECKING,
    TransferState.RECEIVING,
    TransferState.STAGED,
    TransferState.SENDING,
    TransferState.SENT,
)


def highest(world: World, state: State) -> int:
    """The highest epoch that anybody knows of."""
    known = [state.memory.highest_epoch, state.status.group.epoch if state.status.group else 0]
    for view in world.agents.values():
        if view.observed:
            failure = view.observed.transfer.failure
            known += [view.observed.transfer.epoch, failure.epoch if failure else 0]
    return max(known)


def propose(facts: Facts, state: State, members: Iterable[Member]) -> Epoch:
    """A new epoch of the trainer and ``members``."""
    trainer, world = facts.source.trainer, facts.world
    assert trainer is not None
    participants = [Participant(trainer.pod.uid, trainer.pod.name, 0, 1)]
    incarnations = [trainer.view.hello.incarnation]
    rank = 1
    for member in sorted(members, key=lambda member: (member.name, member.uid)):
        participants.append(Participant(member.uid, member.name, rank, member.ranks))
        incarnations.append(member.incarnation)
        rank += member.ranks
    return Epoch(
        highest(world, state) + 1,
        world.nonce,
        tuple(participants),
        tuple(incarnations),
        world.spec.transport,
        world.spec.timeouts,
        world.generation,
    )


def in_epoch(transfer: Transfer, epoch: Epoch) -> bool:
    """Whether an agent speaks of this epoch."""
    return transfer.epoch == epoch.number and transfer.nonce == epoch.nonce


def joined(transfer: Transfer, epoch: Epoch) -> bool:
    """Whether an agent is a rank of this epoch."""
    return in_epoch(transfer, epoch) and transfer.state in IN_GROUP


def transfer_of(facts: Facts, uid: str) -> Transfer | None:
    """What a participant's agent last told of its transfer side; None when the pod is gone."""
    trainer = facts.source.trainer
    if trainer and trainer.pod.uid == uid:
        return trainer.transfer
    member = facts.members.get(uid)
    return member.transfer if member else None


def incarnation_of(facts: Facts, uid: str) -> str:
    """The participant's agent process."""
    trainer = facts.source.trainer
    if trainer and trainer.pod.uid == uid:
        return trainer.view.hello.incarnation
    member = facts.members.get(uid)
    return member.incarnation if member else ""


def whole(facts: Facts, epoch: Epoch) -> bool:
    """Whether every participant is a rank of it at this moment."""
    if facts.source.uid != epoch.participants[0].uid or not facts.source.usable:
        return False
    for each, incarnation in zip(epoch.participants, epoch.incarnations, strict=True):
        transfer = transfer_of(facts, each.uid)
        if transfer is None or not joined(transfer, epoch) or incarnation_of(facts, each.uid) != incarnation:
            return False
        member = facts.members.get(each.uid)
        if member is not None and (not member.connected or member.ranks not in (0, each.ranks)):
            return False
    return True


def lost(facts: Facts, epoch: Epoch) -> bool:
    """Whether an idle group can never be used again, so that nobody need keep its place in it.

    A session that is gone says nothing about the group.
    """
    for each, incarnation in zip(epoch.participants, epoch.incarnations, strict=True):
        transfer = transfer_of(facts, each.uid)
        if transfer is None:
            return True
        if incarnation_of(facts, each.uid) != incarnation:
            return True
        if not joined(transfer, epoch):
            return True
    return False


def usable(facts: Facts, epoch: Epoch, members: Iterable[Member], version: VersionId) -> bool:
    """Whether ``members`` can get ``version`` over this group: it is exactly theirs, and the version has not
    gone round in it yet, or is just going round."""
    if epoch.generation != facts.world.generation or not whole(facts, epoch):
        return False
    wanted = {member.uid for member in members}
    sender = transfer_of(facts, epoch.participants[0].uid)
    under_way = sender is not None and sender.version == version
    if not under_way and epoch.moved == version:
        return False
    for each in epoch.participants[1:]:
        transfer = facts.members[each.uid].transfer
        receiving = transfer.state is TransferState.RECEIVING and transfer.version == version
        staged = transfer.state is TransferState.STAGED and transfer.version == version
        if each.uid in wanted:
            if under_way and not receiving:
                return False
            wanted.remove(each.uid)
        elif not (under_way and (staged or receiving)):
            return False
    return not wanted


def rows(epoch: Epoch) -> tuple[str, ...]:
    """The rank map as the status holds it."""
    return tuple(f"{each.rank}:{each.ranks}:{each.name}:{each.uid}" for each in epoch.participants)


def persisted(epoch: Epoch) -> GroupStatus:
    """The epoch as the status holds it."""
    return GroupStatus(epoch.number, epoch.world_size, epoch.endpoint, rows(epoch))


def roster(status: GroupStatus | None) -> tuple[Participant, ...]:
    """The rank map that the status holds; rows that nobody of ours wrote are left out."""
    found = []
    for row in status.members if status else ():
        parts = row.split(":")
        if len(parts) == 4 and parts[0].isdigit() and parts[1].isdigit():
            found.append(Participant(parts[3], parts[2], int(parts[0]), int(parts[1])))
    return tuple(found)


def inherit(facts: Facts, state: State) -> Epoch | None:
    """The last leader's group, if all that is written of it is still true."""
    written, participants = state.status.group, roster(state.status.group)
    if written is None or not written.endpoint or len(participants) < 2:
        return None
    first = transfer_of(facts, participants[0].uid)
    if first is None or not first.nonce:
        return None
    world = facts.world
    epoch = Epoch(
        written.epoch,
        first.nonce,
        participants,
        tuple(incarnation_of(facts, each.uid) for each in participants),
        world.spec.transport,
        world.spec.timeouts,
        world.generation,
        written.endpoint,
        first.version or state.current,
    )
    return epoch if whole(facts, epoch) else None
