"""Permit and journal, derived from the state and written when they differ from it; revocations go first."""

from dataclasses import replace

from weightsync_contract.messages import ServingState
from weightsync_contract.reasons import Role
from weightsync_engine.agent.core.effects import Effects, WriteJournal, WritePermit
from weightsync_engine.agent.core.events import JournalFailed, JournalWritten, PermitFailed
from weightsync_engine.agent.core.journal import Record
from weightsync_engine.agent.core.serving import wanted_record
from weightsync_engine.agent.core.state import RETRY_SECONDS, PermitSide, Stage, State
from weightsync_engine.permit import Mode, Permit


def wanted_permit(state: State) -> Permit | None:
    """The permit that should lie there. It names only a boot that was seen, and only what is durable."""
    side, commit = state.serving, state.serving.commit
    if state.role is Role.TRAINER or side.state is ServingState.UNREACHABLE:
        return state.permit.written
    stands: ServingState = side.state
    if commit and commit.stage is Stage.APPLY:
        return Permit(side.boot, Mode.HOLD, side.version)
    if commit and commit.stage is Stage.SETTLE:
        return state.permit.written
    if commit:
        stands = commit.before if commit.stage is Stage.RECORD else commit.after
    if stands is ServingState.INITIAL:
        return Permit(side.boot, Mode.SERVE, None) if side.initial else None
    if stands is not ServingState.SERVING:
        return None
    permit = Permit(side.boot, Mode.SERVE, side.version)
    if commit and commit.stage is Stage.RECORD:
        return permit
    record = state.journal.durable.record
    durable = record and (record.state, record.boot, record.version) == (stands, side.boot, side.version)
    return permit if durable else None


def derive(state: State, now: float) -> tuple[State, Effects]:
    """Write what differs: a failed write is tried again, and until then nothing rests on it."""
    effects: Effects = ()
    permit, wanted = state.permit, wanted_permit(state)
    if (permit.written != wanted or permit.unknown) and now >= permit.retry_at:
        state = replace(state, permit=PermitSide(written=wanted))
        effects = (WritePermit(wanted),)
    journal, record = state.journal, wanted_record(state)
    stale = record is not None and (record != journal.durable.record or journal.unsure)
    if record and stale and journal.writing is None and now >= journal.retry_at:
        state = replace(state, journal=replace(journal, writing=record))
        effects = (*effects, WriteJournal(record))
    return state, effects


def journal_wake_at(state: State) -> float | None:
    """When a failed write is due again; None while one is under way, or when there is nothing to write."""
    journal = state.journal
    due = journal.unsure and journal.writing is None and wanted_record(state) is not None
    return journal.retry_at if due else None


def written(state: State, event: JournalWritten) -> State:
    """A record is durable."""
    if not isinstance(event.entry, Record):
        return state
    journal = state.journal
    durable = replace(journal.durable.add(event.entry), corrupt=False)
    writing = None if journal.writing == event.entry else journal.writing
    return replace(state, journal=replace(journal, durable=durable, writing=writing, unsure=False))


def journal_failed(state: State, event: JournalFailed, now: float) -> State:
    """What is durable may be the entry or what was before it."""
    journal = replace(state.journal, writing=None, unsure=True, retry_at=now + RETRY_SECONDS)
    return replace(state, journal=journal)


def permit_failed(state: State, event: PermitFailed, now: float) -> State:
    """What lies there may be this permit or the one before."""
    return replace(state, permit=PermitSide(event.permit, unknown=True, retry_at=now + RETRY_SECONDS))
