"""What the operator is told: everything the agent is, each time anew."""

from dataclasses import replace

from weightsync_contract.messages import Observed, Phase, Serving, ServingState, Transfer, TransferState
from weightsync_contract.reasons import Role
from weightsync_engine.agent.core.effects import Effects, Report
from weightsync_engine.agent.core.serving import CLEAN
from weightsync_engine.agent.core.state import StagingState, State


def observed(state: State) -> Observed:
    """The agent's whole state, with the place of the last Desired that it took."""
    taken, trainer = state.desired.taken, state.role is Role.TRAINER
    return Observed(
        term=taken.term if taken else 0,
        seq=taken.seq if taken else 0,
        highest_term=state.journal.durable.highest_term,
        ranks=1 if trainer or state.engine.world_size else 0,
        transfer=_transfer(state),
        serving=None if trainer else _serving(state),
        source=state.source if trainer else None,
        capabilities=state.engine.capabilities,
    )


def report(state: State) -> tuple[State, Effects]:
    """Tell what has changed since the last time."""
    now = observed(state)
    if now == state.reported:
        return state, ()
    return replace(state, reported=now), (Report(now),)


def _serving(state: State) -> Serving:
    side = state.serving
    unseen = side.state in CLEAN and not state.engine.reachable
    return Serving(
        ServingState.UNREACHABLE if unseen else side.state,
        side.boot,
        side.version,
        side.digest,
        len(side.fences),
        side.failure,
    )


def _transfer(state: State) -> Transfer:
    side, check, staging = state.transfer, state.check, state.staging
    wanted = side.wanted or (state.desired.taken.wanted if state.desired.taken else None)
    trainer = state.role is Role.TRAINER
    # Checked is who has taken part in the check to its end: the manifest, the engine's answer and the memory.
    refused = side.refused is not None and wanted is not None and side.refused == wanted.version
    over = side.state is not TransferState.CHECKING and not refused
    checked = over and check.code is None and (trainer or check.boot == state.serving.boot)
    told = Transfer(
        state=side.state,
        epoch=side.group.epoch if side.group else _last_epoch(state),
        nonce=side.group.nonce if side.group else "",
        endpoint=side.endpoint,
        checked=check.layout if checked else "",
        failure=side.failure,
    )
    busy = side.state in (TransferState.CHECKING, TransferState.RECEIVING, TransferState.SENDING)
    # All bytes are here and verified: the others are not kept waiting for the seal, only the commit is.
    complete = staging.state in (StagingState.SEALING, StagingState.STAGED)
    if not busy and complete and staging.wanted:
        quiet = side.state in (TransferState.IDLE, TransferState.JOINED)
        return replace(
            told,
            state=TransferState.STAGED if quiet else side.state,
            version=staging.wanted.version,
            bytes=staging.nbytes,
            total_bytes=staging.nbytes,
            digest=staging.digest,
        )
    sent = wanted and wanted.phase is Phase.TRANSFER and wanted.version == side.done
    if trainer and sent and side.state is TransferState.JOINED and wanted:
        total = wanted.total_bytes
        return replace(told, state=TransferState.SENT, version=side.done, bytes=total, total_bytes=total)
    if busy and wanted:
        return replace(told, version=wanted.version, bytes=side.bytes, total_bytes=wanted.total_bytes)
    return told


def _last_epoch(state: State) -> int:
    """The newest epoch heard of: an operator that lost its status goes on from the highest it is told."""
    journal, taken = state.journal.durable, state.desired.taken
    if taken:
        return journal.of(taken.weightsync.uid).epoch
    return max((seen.epoch for seen in journal.seen), default=0)
