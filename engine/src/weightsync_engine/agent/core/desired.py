"""Which word of the operator counts: terms and epochs only go up, and what they go up to is durable first."""

from dataclasses import replace

from weightsync_contract.messages import Desired, Nack, Released
from weightsync_contract.reasons import RefusalCode
from weightsync_engine.agent.core.effects import Effects, SendNack, WriteJournal
from weightsync_engine.agent.core.journal import Seen
from weightsync_engine.agent.core.state import DesiredSide, State


def receive(state: State, desired: Desired) -> tuple[State, Effects]:
    """Take a Desired, or refuse it with a Nack that names the highest term that was seen."""
    side = state.desired
    seen = state.journal.durable.of(desired.weightsync.uid)
    refusal = _refusal(side, seen, desired)
    if refusal is not None:
        return state, (SendNack(refusal),)
    for known in (side.taken, side.pending):
        if known and _place(known) == _place(desired):
            return state, ()
    epoch = max(seen.epoch, desired.group.epoch if desired.group else 0)
    if desired.term > seen.term or epoch > seen.epoch:
        entry = Seen(desired.weightsync.uid, desired.term, epoch)
        return replace(state, desired=replace(side, pending=desired)), (WriteJournal(entry),)
    return _take(state, desired), ()


def durable(state: State, seen: Seen) -> State:
    """The journal holds a higher term or epoch: take what brought it."""
    journal = replace(state.journal, durable=state.journal.durable.add(seen))
    state = replace(state, journal=journal)
    pending = state.desired.pending
    if pending is None or pending.weightsync.uid != seen.weightsync or pending.term > seen.term:
        return state
    if pending.group and pending.group.epoch > seen.epoch:
        return state
    return _take(state, pending)


def failed(state: State, seen: Seen) -> State:
    """The journal could not be written: what brought the entry is not taken; the operator says it again."""
    pending = state.desired.pending
    if pending is None or pending.weightsync.uid != seen.weightsync:
        return state
    return replace(state, desired=replace(state.desired, pending=None))


def release(state: State, released: Released) -> tuple[State, Effects]:
    """Nobody wants this pod any more, unless somebody with a higher term does."""
    taken = state.desired.taken
    highest = state.journal.durable.of(taken.weightsync.uid).term if taken else 0
    if released.term < highest:
        message = f"released by term {released.term}, but term {highest} was obeyed"
        return state, (SendNack(Nack(highest, 0, RefusalCode.STALE_TERM, message)),)
    return replace(state, desired=DesiredSide(released=True, session=state.desired.session)), ()


def _take(state: State, desired: Desired) -> State:
    return replace(state, desired=DesiredSide(taken=desired, session=state.desired.session))


def _place(desired: Desired) -> tuple[str, int, int]:
    return desired.weightsync.uid, desired.term, desired.seq


def _refusal(side: DesiredSide, seen: Seen, desired: Desired) -> Nack | None:
    last = max(
        (
            known.seq
            for known in (side.taken, side.pending)
            if known and _place(known)[:2] == _place(desired)[:2]
        ),
        default=0,
    )
    if desired.term < seen.term:
        code, message = RefusalCode.STALE_TERM, f"term {desired.term}, but term {seen.term} was obeyed"
    elif desired.seq < last:
        code, message = RefusalCode.STALE_SEQ, f"sequence {desired.seq}, but {last} was obeyed"
    elif desired.group and desired.group.epoch < seen.epoch:
        code, message = RefusalCode.STALE_EPOCH, f"epoch {desired.group.epoch}, but {seen.epoch} was joined"
    else:
        return None
    return Nack(seen.term, last, code, message)
