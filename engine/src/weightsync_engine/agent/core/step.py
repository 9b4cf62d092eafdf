"""One event in, the next state and its effects out."""

from dataclasses import replace
from typing import Final

from weightsync_engine.agent.core import check, desired, permit, serving, staging, trainer, transfer
from weightsync_engine.agent.core.effects import Effects
from weightsync_engine.agent.core.events import (
    ApplyDone,
    ApplyFailed,
    ChildExited,
    ChildFailed,
    ChildListening,
    ChildProgress,
    ChildReady,
    ChildReceived,
    ChildSent,
    ChildUnmapped,
    DesiredReceived,
    EngineGone,
    EngineSeen,
    Event,
    JournalFailed,
    JournalWritten,
    ManifestExchanged,
    PermitFailed,
    PreflightEnded,
    ReleasedReceived,
    ResumeEnded,
    SessionClosed,
    SessionOpened,
    SourceChanged,
    StagingAllocated,
    StagingFailed,
    StagingSealed,
    Tick,
)
from weightsync_engine.agent.core.journal import Record, Seen
from weightsync_engine.agent.core.report import report
from weightsync_engine.agent.core.state import State

_ROUNDS: Final = 32
"""More rounds of the rules than any event needs: more would mean that two rules undo each other."""

Outcome = tuple[State, Effects]


def step(state: State, event: Event, now: float) -> Outcome:
    """Decide. ``now`` is this machine's monotonic clock in seconds; it never goes back.

    The effects are to be run in order, and all of them before the next step's (see ``effects``).
    """
    state, effects = _hear(state, event, now)
    state, more = _settle(state, now)
    state, told = report(state)
    return state, (*effects, *more, *told)


def wake_at(state: State, now: float) -> float | None:
    """When a Tick is due at the latest; None when only an event can change anything."""
    side, commit = state.serving, state.serving.commit
    moments = [
        transfer.wake_at(state),
        side.restart_at,
        commit.deadline if commit else None,
        commit.retry_at if commit and not commit.asked and commit.retry_at > now else None,
        state.permit.retry_at if state.permit.unknown else None,
        permit.journal_wake_at(state),
        check.wake_at(state),
    ]
    return min((moment for moment in moments if moment is not None), default=None)


def _settle(state: State, now: float) -> Outcome:
    """Run all rules until none has anything to say.

    The order holds the safety: what the permit and the journal must say comes before what the engine is told.
    """
    effects: Effects = ()
    for _ in range(_ROUNDS):
        before = state
        state = serving.rules(state, now)
        state, said = transfer.rules(state, now)
        state, kept = staging.tidy(state)
        state, asked = check.ask(state, now)
        state, held = trainer.rules(state)
        state, wrote = permit.derive(state, now)
        state, ordered = serving.orders(state, now)
        effects = (*effects, *said, *kept, *asked, *held, *wrote, *ordered)
        if state is before:
            return state, effects
    raise AssertionError(f"the rules do not come to rest: {state}")


def _hear(state: State, event: Event, now: float) -> Outcome:  # noqa: PLR0911, PLR0912
    match event:
        case Tick():
            return state, ()
        case SessionOpened():
            # Whatever was told before was told to somebody else.
            return replace(state, reported=None, desired=replace(state.desired, session=True)), ()
        case SessionClosed():
            return replace(state, desired=replace(state.desired, session=False)), ()
        case DesiredReceived():
            return desired.receive(state, event.desired)
        case ReleasedReceived():
            return desired.release(state, event.released)
        case EngineSeen():
            rebooted = state.engine.boot not in ("", event.boot)
            state = serving.seen(state, event, now)
            return transfer.arena_lost(state, now) if rebooted else (state, ())
        case EngineGone():
            return _gone(state), ()
        case PreflightEnded():
            return check.answered(state, event, now), ()
        case ApplyDone():
            return serving.applied(state, event), ()
        case ApplyFailed():
            return serving.refused(state, event, now), ()
        case ResumeEnded():
            return serving.resumed(state, event, now), ()
        case SourceChanged():
            return (state if event.source == state.source else replace(state, source=event.source)), ()
        case JournalWritten() | JournalFailed() | PermitFailed():
            return _wrote(state, event, now), ()
        case StagingAllocated():
            return transfer.allocated(state, event), ()
        case StagingSealed():
            return transfer.sealed(state, event), ()
        case StagingFailed():
            return transfer.staging_failed(state, event, now)
        case ChildListening():
            return transfer.listening(state, event), ()
        case ChildReady():
            return transfer.ready(state, event), ()
        case ManifestExchanged():
            return transfer.exchanged(state, event), ()
        case ChildProgress():
            return transfer.progress(state, event, now), ()
        case ChildReceived():
            return transfer.received(state, event, now)
        case ChildUnmapped():
            return transfer.unmapped(state, event)
        case ChildSent():
            return transfer.sent(state, event), ()
        case ChildFailed():
            return transfer.child_failed(state, event, now)
        case ChildExited():
            return transfer.child_exited(state, event, now)


def _gone(state: State) -> State:
    return replace(state, engine=replace(state.engine, reachable=False)) if state.engine.reachable else state


def _wrote(state: State, event: JournalWritten | JournalFailed | PermitFailed, now: float) -> State:
    match event:
        case JournalWritten(entry=Seen() as seen):
            return desired.durable(state, seen)
        case JournalWritten():
            return permit.written(state, event)
        case JournalFailed(entry=Seen() as seen):
            return desired.failed(state, seen)
        case JournalFailed(entry=Record()):
            return serving.journal_failed(permit.journal_failed(state, event, now), event.message, now)
        case PermitFailed():
            return serving.permit_failed(permit.permit_failed(state, event, now), now)
    return state
