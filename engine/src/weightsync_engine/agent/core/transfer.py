"""The agent's place in a group: join it, let each version go round once, leave it by killing the child.

It never touches the serving side: what it brings lies staged until a commit. A group that failed is never
joined again, and a child that has to do something else than it does is not talked to but killed.
"""

from dataclasses import replace

from weightsync_contract.messages import Failure, Group, Phase, TransferState, VersionId, Wanted
from weightsync_contract.reasons import FailureCode, Role
from weightsync_engine.agent.core import check, staging
from weightsync_engine.agent.core.effects import (
    Effects,
    ExchangeManifest,
    KillChild,
    OpenChild,
    ReceiveVersion,
    SendVersion,
)
from weightsync_engine.agent.core.events import (
    ChildExited,
    ChildFailed,
    ChildListening,
    ChildProgress,
    ChildReady,
    ChildReceived,
    ChildSent,
    ChildUnmapped,
    ManifestExchanged,
    StagingAllocated,
    StagingFailed,
    StagingSealed,
)
from weightsync_engine.agent.core.journal import Journal
from weightsync_engine.agent.core.state import ABORT_SECONDS, STALL_SECONDS, StagingState, State, TransferSide

Outcome = tuple[State, Effects]
MOVING = (TransferState.RECEIVING, TransferState.SENDING)


# ----------------------------------------------------------------------------- the child's answers


def listening(state: State, event: ChildListening) -> State:
    """Rank 0 can be joined."""
    if event.child != state.transfer.child or state.transfer.state is not TransferState.JOINING:
        return state
    return _set(state, endpoint=event.endpoint)


def ready(state: State, event: ChildReady) -> State:
    """All ranks are in."""
    if event.child != state.transfer.child or state.transfer.state is not TransferState.JOINING:
        return state
    return _set(state, state=TransferState.JOINED, deadline=0.0)


def exchanged(state: State, event: ManifestExchanged) -> State:
    """The manifest went round: rank 0 is done, a member has it checked."""
    side = state.transfer
    if event.child != side.child or side.state is not TransferState.CHECKING or side.wanted is None:
        return state
    if event.layout != side.wanted.layout:
        return state
    state = _set(state, exchanged=(*side.exchanged, event.layout), wanted=None)
    if state.role is Role.TRAINER:
        state = _set(state, state=TransferState.JOINED, deadline=0.0)
        return replace(state, check=replace(state.check, layout=event.layout))
    return check.know(state, event.layout)


def progress(state: State, event: ChildProgress, now: float) -> State:
    """Bytes went through; the child says so also when none did."""
    side = state.transfer
    if event.child != side.child or side.state not in MOVING or event.bytes <= side.bytes:
        return state
    return _set(state, bytes=event.bytes, moved_at=now)


def received(state: State, event: ChildReceived, now: float) -> Outcome:
    """All bytes are here: only those that hash to what was published are kept, and sealed once that can be done."""
    side, wanted = state.transfer, state.transfer.wanted
    if event.child != side.child or side.state is not TransferState.RECEIVING or wanted is None:
        return state, ()
    state = _set(state, done=wanted.version, bytes=wanted.total_bytes)
    if side.verify and event.digest != wanted.digest:
        message = f"received {event.digest}, but {wanted.digest} was published; the memory was given back"
        return _declined(state, wanted.version, FailureCode.DIGEST_MISMATCH, message)
    state = _set(state, state=TransferState.JOINED, wanted=None, moving=False, deadline=0.0)
    sealing = replace(
        state.staging, state=StagingState.SEALING, wanted=wanted, digest=event.digest, child=event.child
    )
    return staging.await_unmapping(replace(state, staging=sealing), now), ()


def unmapped(state: State, event: ChildUnmapped) -> Outcome:
    """The child that received it can't write to it any more."""
    if not staging.mapped(state) or event.child != state.staging.child:
        return state, ()
    return staging.seal(state)


def sent(state: State, event: ChildSent) -> State:
    """Rank 0 has no more to send. Members say for themselves what they have."""
    side, wanted = state.transfer, state.transfer.wanted
    if event.child != side.child or side.state is not TransferState.SENDING or wanted is None:
        return state
    return _set(
        state, state=TransferState.JOINED, done=wanted.version, wanted=None, moving=False, deadline=0.0
    )


def child_failed(state: State, event: ChildFailed, now: float) -> Outcome:
    """The child can't go on, and with it this epoch."""
    if event.child != state.transfer.child or state.transfer.state is TransferState.ABORTING:
        return state, ()
    return _fail(state, event.code, event.message, now)


def child_exited(state: State, event: ChildExited, now: float) -> Outcome:
    """The child is gone: as told, or on its own. What it had mapped it has no more."""
    effects: Effects = ()
    if staging.mapped(state) and event.child == state.staging.child:
        state, effects = staging.seal(state)
    side = state.transfer
    if event.child != side.child:
        return state, effects
    if side.state is TransferState.ABORTING:
        return _gone(state), effects
    message = event.message or "the transfer child ended without a word"
    state, more = _fail(state, FailureCode.CHILD_FAILED, message, now)
    return _gone(state), (*effects, *(each for each in more if not isinstance(each, KillChild)))


# ---------------------------------------------------------------------------- the memory's answers


def allocated(state: State, event: StagingAllocated) -> State:
    """There is memory to receive into."""
    if event.slot != state.staging.slot or state.staging.state is not StagingState.ALLOCATING:
        return state
    return replace(state, staging=replace(state.staging, state=StagingState.WRITABLE))


def sealed(state: State, event: StagingSealed) -> State:
    """The version can be applied."""
    if event.slot != state.staging.slot or state.staging.state is not StagingState.SEALING:
        return state
    return replace(state, staging=replace(state.staging, state=StagingState.STAGED))


def staging_failed(state: State, event: StagingFailed, now: float) -> Outcome:
    """No memory. Before a transfer that is an answer; in one, the others must not be kept waiting."""
    if event.slot != state.staging.slot or state.staging.state is StagingState.STAGED:
        return state, ()
    if state.staging.state is StagingState.SEALING and state.staging.wanted:
        sealing, waited = state.staging.wanted.version, _brought_it(state)
        state, dropped = staging.drop(state)
        if not waited:
            # The group that it came from is gone or does something else: it is just not staged any more.
            return state, dropped
        return _declined(state, sealing, FailureCode.STAGING_FAILED, event.message)[0], dropped
    if state.transfer.state is TransferState.RECEIVING:
        return _fail(state, FailureCode.STAGING_FAILED, event.message, now)
    if state.transfer.state is not TransferState.CHECKING or state.transfer.wanted:
        # Nobody waits for it any more: the next manifest goes round already.
        return staging.drop(state)
    desired = state.desired.taken
    version = desired.wanted.version if desired and desired.wanted else None
    return _declined(state, version, FailureCode.STAGING_FAILED, event.message)


def arena_lost(state: State, now: float) -> Outcome:
    """Another engine runs: what lay in the memory of the one before is gone with it."""
    if not state.staging.device or state.staging.state is StagingState.NONE:
        return state, ()
    receiving = state.transfer.state is TransferState.RECEIVING
    state, dropped = staging.drop(state)
    if not receiving:
        return state, dropped
    message = "the engine restarted, and with it went the memory that the version was received into"
    state, failed = _fail(state, FailureCode.STAGING_FAILED, message, now)
    return state, (*dropped, *failed)


def _brought_it(state: State) -> bool:
    """What is being sealed is what this group brought last, not what one before it brought."""
    return state.transfer.state is TransferState.JOINED and state.transfer.child == state.staging.child


# --------------------------------------------------------------------------------------- the rules


def rules(state: State, now: float) -> Outcome:
    """One step on, if one is due. Returns the same object when nothing changes."""
    side, group = state.transfer, _wanted_group(state)
    if staging.mapped(state) and now >= state.staging.deadline:
        return _not_unmapped(state, now)
    if side.state is TransferState.ABORTING:
        return (_gone(state) if now >= side.deadline else state), ()
    if side.group and _key(side.group) != (_key(group) if group else None):
        return _leave(state, now)
    problem = _overdue(state, now)
    if problem:
        return problem
    if side.state is TransferState.IDLE:
        return _open(state, group, now)
    desired = state.desired.taken
    if side.state is TransferState.JOINED and desired and desired.wanted:
        if desired.wanted.phase is Phase.CHECK:
            return _check(state, desired.wanted, now)
        return _transfer(state, desired.wanted, now)
    if side.state is TransferState.CHECKING and side.wanted is None:
        return _checking(state, now)
    if side.state is TransferState.RECEIVING and not side.moving and side.wanted:
        return _receive(state, side.wanted, now)
    return state, ()


def wake_at(state: State) -> float | None:
    """When ``rules`` must run again though nothing happened."""
    side = state.transfer
    moments = [side.deadline] if side.deadline else []
    if side.state in MOVING and side.bytes:
        moments.append(side.moved_at + STALL_SECONDS)
    if staging.mapped(state):
        moments.append(state.staging.deadline)
    return min(moments, default=None)


def _wanted_group(state: State) -> Group | None:
    desired = state.desired.taken
    return desired.group if desired else None


def _key(group: Group) -> tuple[int, str]:
    return group.epoch, group.nonce


def _seconds(state: State, otherwise: float) -> float:
    """What the operator left of the phase, else all of it. Set once: no later word extends it."""
    desired = state.desired.taken
    return desired.remaining_ms / 1000 if desired and desired.remaining_ms > 0 else otherwise


def _open(state: State, group: Group | None, now: float) -> Outcome:
    side, desired = state.transfer, state.desired.taken
    if group is None or desired is None or _key(group) == side.broken:
        return state, ()
    if group.epoch <= Journal(seen=state.seen_before).of(desired.weightsync.uid).epoch:
        # Whoever else was in it has lost a rank when the last agent ended: say so, instead of joining them.
        message = f"the agent restarted, and epoch {group.epoch} had begun before"
        failure = Failure(FailureCode.CHILD_FAILED, message, group.epoch)
        return _set(state, failure=failure, broken=_key(group)), ()
    if group.rank != 0 and not group.endpoint:
        return state, ()
    seconds = _seconds(state, desired.timeouts.join)
    child = side.children + 1
    joining = TransferSide(
        TransferState.JOINING, group, child, children=child, deadline=now + seconds, broken=side.broken
    )
    return replace(state, transfer=joining), (OpenChild(child, group, desired.transport, seconds),)


def _leave(state: State, now: float) -> Outcome:
    """Nothing is said to the child: it may be in a call that never ends."""
    state, effects = staging.drop_unfinished(state)
    side = state.transfer
    if staging.mapped(state) and side.child == state.staging.child:
        state = staging.await_unmapping(state, now)
    if side.group:
        state = _set(state, broken=_key(side.group))
    if not side.child:
        return _gone(state), effects
    state = _set(state, state=TransferState.ABORTING, deadline=now + ABORT_SECONDS)
    return state, (KillChild(side.child), *effects)


def _gone(state: State) -> State:
    side = state.transfer
    idle = TransferSide(children=side.children, failure=side.failure, broken=side.broken)
    return replace(state, transfer=idle)


def _fail(state: State, code: FailureCode, message: str, now: float) -> Outcome:
    side = state.transfer
    version = side.wanted.version if side.wanted else None
    epoch = side.group.epoch if side.group else 0
    state = _set(state, failure=Failure(code, message, epoch, version))
    return _leave(state, now)


def _not_unmapped(state: State, now: float) -> Outcome:
    """Its end unmaps it too. One that can't even be killed may have it mapped: the kernel says so to who seals it."""
    side, memory = state.transfer, state.staging
    if side.child != memory.child or side.state is TransferState.ABORTING:
        return staging.seal(state)
    message = (
        f"the transfer child did not give up its memory in time, after it had received {memory.nbytes} bytes"
    )
    return _fail(state, FailureCode.CHILD_FAILED, message, now)


def _overdue(state: State, now: float) -> Outcome | None:
    side, wanted = state.transfer, state.transfer.wanted
    if side.state in MOVING and side.bytes and now >= side.moved_at + STALL_SECONDS:
        message = f"no byte moved for {STALL_SECONDS:.0f} s, after {side.bytes}"
        return _fail(state, FailureCode.NO_PROGRESS, message, now)
    if not side.deadline or now < side.deadline:
        return None
    match side.state:
        case TransferState.JOINING:
            return _fail(state, FailureCode.JOIN_TIMEOUT, "not all ranks joined in time", now)
        case TransferState.CHECKING if wanted is None:
            return _unchecked(state)
        case TransferState.CHECKING:
            return _fail(state, FailureCode.TRANSFER_TIMEOUT, "the manifest did not go round in time", now)
        case _:
            total = wanted.total_bytes if wanted else 0
            return _fail(state, FailureCode.TRANSFER_TIMEOUT, f"{side.bytes} of {total} bytes in time", now)


def _declined(state: State, version: VersionId | None, code: FailureCode, message: str) -> Outcome:
    """This member can't take this version, and the group is none the worse for it."""
    side = state.transfer
    failure = Failure(code, message, side.group.epoch if side.group else 0, version)
    waits = side.state in (TransferState.CHECKING, TransferState.RECEIVING)
    state = _set(
        state,
        state=TransferState.JOINED if waits else side.state,
        refused=version,
        failure=failure,
        wanted=None,
        moving=False,
        deadline=0.0,
    )
    return staging.drop_unfinished(state)


# ------------------------------------------------------------------------------------- phase CHECK


def _check(state: State, wanted: Wanted, now: float) -> Outcome:
    side, desired = state.transfer, state.desired.taken
    assert desired is not None
    if wanted.layout not in side.exchanged:
        if state.role is Role.TRAINER and not _stored(state, wanted.version):
            return _not_retained(state, wanted.version)
        seconds = _seconds(state, desired.timeouts.join)
        state = _set(
            state,
            state=TransferState.CHECKING,
            wanted=wanted,
            deadline=now + seconds,
            failure=None,
            refused=None,
        )
        return state, (ExchangeManifest(side.child, wanted, seconds),)
    if state.role is Role.TRAINER or side.refused == wanted.version or _checked(state, wanted):
        return state, ()
    seconds = _seconds(state, desired.timeouts.join)
    return _set(state, state=TransferState.CHECKING, deadline=now + seconds, failure=None), ()


def _checked(state: State, wanted: Wanted) -> bool:
    return (
        (answer := check.answer(state, wanted.layout)) is not None
        and answer[0] is None
        and _memory(state, wanted)
    )


def _memory(state: State, wanted: Wanted) -> bool:
    """There is memory for it, or it is there already."""
    side = state.staging
    if side.state in (StagingState.SEALING, StagingState.STAGED):
        return True
    return staging.writable(state, wanted.total_bytes)


def _checking(state: State, now: float) -> Outcome:
    desired = state.desired.taken
    wanted = desired.wanted if desired else None
    if wanted is None or wanted.layout not in state.transfer.exchanged or wanted.phase is not Phase.CHECK:
        return _set(state, state=TransferState.JOINED, deadline=0.0), ()
    answer = check.answer(state, wanted.layout)
    if answer is None:
        return state, ()
    code, message = answer
    if code is not None:
        return _declined(state, wanted.version, code, message)
    if _memory(state, wanted):
        return _set(state, state=TransferState.JOINED, deadline=0.0), ()
    return _have(state, wanted)


def _have(state: State, wanted: Wanted) -> Outcome:
    """One step towards memory for a version."""
    if state.staging.state is StagingState.NONE:
        return staging.allocate(state, wanted.total_bytes)
    if state.staging.state is StagingState.ALLOCATING or staging.in_use(state):
        return state, ()
    return staging.drop(state)


def _unchecked(state: State) -> Outcome:
    desired = state.desired.taken
    version = desired.wanted.version if desired and desired.wanted else None
    if state.staging.state is StagingState.ALLOCATING:
        return _declined(state, version, FailureCode.STAGING_FAILED, "memory could not be had in time")
    message = "the engine did not answer in time whether it can take the manifest"
    return _declined(state, version, FailureCode.ENGINE_UNREACHABLE, message)


# ---------------------------------------------------------------------------------- phase TRANSFER


def _transfer(state: State, wanted: Wanted, now: float) -> Outcome:
    side, desired = state.transfer, state.desired.taken
    assert desired is not None
    if wanted.version in (side.done, side.refused):
        return state, ()
    seconds = _seconds(state, desired.timeouts.transfer)
    moving = {
        "wanted": wanted,
        "bytes": 0,
        "moved_at": now,
        "deadline": now + seconds,
        "failure": None,
        "refused": None,
        "verify": desired.verify,
    }
    if state.role is Role.TRAINER:
        if not _stored(state, wanted.version):
            return _not_retained(state, wanted.version)
        state = _set(state, state=TransferState.SENDING, moving=True, **moving)
        return state, (SendVersion(side.child, wanted, desired.transport, seconds),)
    if wanted.layout not in state.check.known:
        message = f"layout {wanted.layout} is to be received, but its manifest was never checked here"
        return _fail(state, FailureCode.MANIFEST_REFUSED, message, now)
    return _set(state, state=TransferState.RECEIVING, moving=False, **moving), ()


def _receive(state: State, wanted: Wanted, now: float) -> Outcome:
    side, desired = state.transfer, state.desired.taken
    assert desired is not None
    memory = state.staging
    if staging.writable(state, wanted.total_bytes):
        seconds = max(side.deadline - now, 0.0)
        order = ReceiveVersion(side.child, memory.slot, wanted, desired.transport, seconds, side.verify)
        return _set(state, moving=True), (order,)
    if memory.state is StagingState.SEALING:
        return state, ()
    return _have(state, wanted)


def _stored(state: State, version: VersionId) -> bool:
    return any(each.version == version for each in state.source.versions)


def _not_retained(state: State, version: VersionId) -> Outcome:
    epoch = state.transfer.group.epoch if state.transfer.group else 0
    message = f"version {version} is not among the copies that are kept"
    failure = Failure(FailureCode.VERSION_NOT_RETAINED, message, epoch, version)
    return (state if state.transfer.failure == failure else _set(state, failure=failure)), ()


def _set(state: State, /, **changes: object) -> State:
    return replace(state, transfer=replace(state.transfer, **changes))  # type: ignore[arg-type]
