"""The staged memory: had in time, sealed once verified, given back when nobody wants what is in it."""

from dataclasses import replace

from weightsync_contract.messages import ServingState, TransferState
from weightsync_engine.agent.core.effects import AllocateStaging, DropStaging, Effects
from weightsync_engine.agent.core.state import StagingSide, StagingState, State


def allocate(state: State, nbytes: int) -> tuple[State, Effects]:
    """Have a new piece, of which nobody else has a mapping."""
    slot = state.slots + 1
    staging = StagingSide(StagingState.ALLOCATING, slot, nbytes)
    return replace(state, staging=staging, slots=slot), (AllocateStaging(slot, state.transfer.child, nbytes),)


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
