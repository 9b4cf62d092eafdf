"""The staged memory: had in time, sealed once verified, given back when nobody wants what is in it."""

from dataclasses import replace

from weightsync_contract.messages import ServingState, Staging, TransferState
from weightsync_engine.agent.core.effects import AllocateStaging, DropStaging, Effects, SealStaging
from weightsync_engine.agent.core.state import SEAL_SECONDS, UNMAP_RATE, StagingSide, StagingState, State


def allocate(state: State, nbytes: int) -> tuple[State, Effects]:
    """Have a new piece, of which nobody else has a mapping."""
    slot, device = state.slots + 1, on_device(state)
    staging = StagingSide(StagingState.ALLOCATING, slot, nbytes, device)
    order = AllocateStaging(slot, state.transfer.child, nbytes, device)
    return replace(state, staging=staging, slots=slot), (order,)


def on_device(state: State) -> bool:
    """Versions are to be received into the engine's own memory."""
    desired = state.desired.taken
    return desired is not None and desired.transport.staging is Staging.DEVICE


def writable(state: State, nbytes: int) -> bool:
    """There is memory of this size, of the kind that is wanted, to receive into."""
    side = state.staging
    kind = (side.nbytes, side.device) == (nbytes, on_device(state))
    return side.state is StagingState.WRITABLE and kind


def drop(state: State) -> tuple[State, Effects]:
    """Give back what there is."""
    if state.staging.state is StagingState.NONE:
        return state, ()
    return replace(state, staging=StagingSide()), (DropStaging(state.staging.slot),)


def drop_unfinished(state: State) -> tuple[State, Effects]:
    """Give back what no complete version is in."""
    if state.staging.state in (StagingState.ALLOCATING, StagingState.WRITABLE):
        return drop(state)
    return state, ()


def await_unmapping(state: State, now: float) -> State:
    """Give the child that has it mapped its time, or the kernel the time to end that child."""
    deadline = now + SEAL_SECONDS + state.staging.nbytes / UNMAP_RATE
    return replace(state, staging=replace(state.staging, deadline=deadline))


def mapped(state: State) -> bool:
    """It is complete, and is sealed when its child has no mapping of it any more."""
    return state.staging.state is StagingState.SEALING and state.staging.deadline > 0


def seal(state: State) -> tuple[State, Effects]:
    """Nobody has it mapped, as far as is known; the kernel refuses if somebody has."""
    staging = replace(state.staging, deadline=0.0)
    return replace(state, staging=staging), (SealStaging(staging.slot),)


def in_use(state: State) -> bool:
    """The engine reads it, or is about to."""
    commit = state.serving.commit
    return commit is not None and commit.slot != 0 and commit.slot == state.staging.slot


def tidy(state: State) -> tuple[State, Effects]:
    """Give back what was committed, and what the operator no longer names."""
    staging, desired = state.staging, state.desired.taken
    if staging.state is StagingState.NONE or in_use(state):
        return state, ()
    if staging.state is StagingState.STAGED and staging.wanted:
        serving, version = state.serving, staging.wanted.version
        committed = serving.version == version and serving.state in (
            ServingState.SERVING,
            ServingState.WITHHELD,
        )
        named = desired is not None and version in (
            desired.commit,
            desired.wanted.version if desired.wanted else None,
        )
        return drop(state) if committed or not named else (state, ())
    idle = state.transfer.state in (TransferState.IDLE, TransferState.JOINED)
    if idle and staging.state is StagingState.WRITABLE and (desired is None or desired.wanted is None):
        return drop(state)
    return state, ()
