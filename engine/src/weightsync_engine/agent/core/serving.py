"""What the engine of one boot holds and may do: Initial, Applying, Serving, Withheld, Fenced.

Decided here alone; the operator only asks. ``rules`` moves the state on; what follows from the state (the
permit, the journal's record, the engine's next order) is derived from it in ``permit.py`` and ``orders``.
"""

from dataclasses import replace

from weightsync_contract.messages import Failure, ServingState, VersionId
from weightsync_contract.reasons import FailureCode
from weightsync_engine.agent.core.effects import Apply, Effects, RestartEngine, Resume
from weightsync_engine.agent.core.events import ApplyDone, ApplyFailed, EngineSeen, ResumeEnded
from weightsync_engine.agent.core.journal import Record
from weightsync_engine.agent.core.state import (
    APPLY_MARGIN,
    FENCE_LIMIT,
    FENCE_WINDOW_SECONDS,
    RESTART_SECONDS,
    RETRY_SECONDS,
    Commit,
    EngineSide,
    JournalSide,
    ServingSide,
    Stage,
    StagingState,
    State,
)
from weightsync_engine.permit import Mode

FINISH_SECONDS = 60.0
"""What a restarted agent gives an engine to go on after a commit that the last agent did not end."""

CLEAN = (ServingState.INITIAL, ServingState.SERVING, ServingState.WITHHELD)


# ------------------------------------------------------------------------------ the engine's boots


def seen(state: State, event: EngineSeen, now: float) -> State:
    """The engine answered: the same boot as before, another, or the first since this agent started."""
    engine = EngineSide(True, event.boot, event.world_size, event.capabilities)
    if engine != state.engine:
        state = replace(state, engine=engine)
    if state.serving.state is ServingState.UNREACHABLE:
        return replace(state, serving=_found(state, event.boot, now))
    if event.boot != state.serving.boot:
        return replace(state, serving=_rebooted(state.serving, event.boot, now))
    return state


def _rebooted(side: ServingSide, boot: str, now: float) -> ServingSide:
    fresh = ServingSide(
        ServingState.INITIAL, boot, fences=side.fences, failure=side.failure, weightsync=side.weightsync
    )
    if side.commit is None or side.commit.stage is not Stage.APPLY or not side.commit.asked:
        return fresh
    # What was asked of the boot before may be reaching this one: it may be mixed as well. And an engine that dies
    # in an apply counts, else a version that kills engines would be tried for ever.
    message = f"the engine restarted while it applied {side.commit.version}"
    return _fenced(replace(side, boot=boot), FailureCode.ENGINE_RESTARTED, message, now)


def _found(state: State, boot: str, now: float) -> ServingSide:
    """What a restarted agent makes of an engine, from its journal and the permit that lies there."""
    record, permit = state.journal.durable.record, state.permit.written
    named = permit if permit and permit.boot == boot else None
    if state.journal.durable.corrupt:
        return _fenced(ServingSide(boot=boot), FailureCode.APPLY_FAILED, "the journal can't be read", now)
    if record is None or record.boot != boot:
        if named and (named.version or named.mode is Mode.HOLD):
            message = "there is a permit for this boot, but the journal knows of no commit of it"
            return _fenced(ServingSide(boot=boot), FailureCode.APPLY_FAILED, message, now)
        fences = tuple(at for at in record.fences if at <= now) if record else ()
        initial = named is not None and named.mode is Mode.SERVE
        weightsync = record.weightsync if record else ""
        return ServingSide(ServingState.INITIAL, boot, initial=initial, fences=fences, weightsync=weightsync)
    return _resumed(record, named.mode if named else None, now)


def _resumed(record: Record, mode: Mode | None, now: float) -> ServingSide:
    side = ServingSide(
        record.state,
        record.boot,
        record.version,
        record.digest,
        fences=tuple(at for at in record.fences if at <= now),
        weightsync=record.weightsync,
    )
    if record.state is ServingState.APPLYING:
        message = f"the agent ended while the engine applied {record.version}"
        return _fenced(replace(side, version=None, digest=""), FailureCode.APPLY_FAILED, message, now)
    if record.state is ServingState.FENCED:
        failure = Failure(FailureCode.APPLY_FAILED, record.message)
        return replace(side, failure=failure, restart_at=None if len(side.fences) >= FENCE_LIMIT else now)
    if mode is Mode.HOLD and record.resumed:
        message = "the permit is on hold, but the journal knows of no commit under way"
        return _fenced(replace(side, version=None, digest=""), FailureCode.APPLY_FAILED, message, now)
    if record.state is ServingState.SERVING and mode is None:
        # The last agent took the permit away: only the operator can say that it may serve again.
        side = replace(side, state=ServingState.WITHHELD)
    if not record.resumed:
        commit = Commit(
            Stage.RESUME, side.state, side.state, now + FINISH_SECONDS, record.version, record.digest
        )
        side = replace(side, state=ServingState.APPLYING, commit=commit)
    return side


# ---------------------------------------------------------------------------- the engine's answers


def applied(state: State, event: ApplyDone) -> State:
    """Every rank holds the version: settle it in the journal before anybody is answered from it."""
    side, commit = state.serving, state.serving.commit
    if (
        commit is None
        or commit.stage is not Stage.APPLY
        or (event.boot, event.slot) != (side.boot, commit.slot)
    ):
        return state
    commit = replace(commit, stage=Stage.SETTLE, after=ServingState.SERVING, asked=False)
    return replace(state, serving=replace(side, version=commit.version, digest=commit.digest, commit=commit))


def refused(state: State, event: ApplyFailed, now: float) -> State:
    """Clean: the old weights serve on. Else nobody knows what the engine holds."""
    side, commit = state.serving, state.serving.commit
    if (
        commit is None
        or commit.stage is not Stage.APPLY
        or (event.boot, event.slot) != (side.boot, commit.slot)
    ):
        return state
    if not event.clean:
        return fence(state, FailureCode.APPLY_FAILED, event.message, now)
    return replace(state, serving=_give_up(side, commit, FailureCode.APPLY_FAILED, event.message))


def resumed(state: State, event: ResumeEnded, now: float) -> State:
    """The engine goes on, or is asked again until the commit's deadline."""
    side, commit = state.serving, state.serving.commit
    if commit is None or commit.stage is not Stage.RESUME or event.boot != side.boot or not commit.asked:
        return state
    if event.message:
        commit = replace(commit, asked=False, retry_at=now + RETRY_SECONDS)
        return replace(state, serving=replace(side, commit=commit))
    return replace(state, serving=replace(side, state=commit.after, commit=None))


def permit_failed(state: State, now: float) -> State:
    """The permit could not be written, so the engine was not told what rests on it."""
    side, commit = state.serving, state.serving.commit
    if commit and commit.stage is Stage.APPLY:
        message = "the permit could not be put on hold, so the engine was not touched"
        return replace(state, serving=_give_up(side, commit, FailureCode.APPLY_FAILED, message))
    if commit and commit.stage is Stage.RESUME:
        commit = replace(commit, asked=False, retry_at=now + RETRY_SECONDS)
        return replace(state, serving=replace(side, commit=commit))
    return state


def journal_failed(state: State, message: str, now: float) -> State:
    """An entry of the serving side could not be made durable."""
    side, commit = state.serving, state.serving.commit
    if commit and commit.stage is Stage.RECORD:
        return replace(state, serving=_abandon(side, commit, f"the journal can't be written: {message}"))
    if commit and commit.stage is Stage.SETTLE:
        return fence(state, FailureCode.APPLY_FAILED, f"the journal can't be written: {message}", now)
    return state


def _give_up(side: ServingSide, commit: Commit, code: FailureCode, message: str) -> ServingSide:
    """A clean failure of a paused engine: settle on what was before, then resume."""
    return replace(
        side,
        commit=replace(commit, stage=Stage.SETTLE, after=commit.before, asked=False),
        failure=Failure(code, message, version=commit.version),
        tried=_tried(side.boot, commit.version),
    )


def _abandon(side: ServingSide, commit: Commit, message: str) -> ServingSide:
    """A failure before the engine was touched."""
    return replace(
        side,
        state=commit.before,
        commit=None,
        failure=Failure(FailureCode.APPLY_FAILED, message, version=commit.version),
        tried=_tried(side.boot, commit.version),
    )


def _tried(boot: str, version: VersionId | None) -> tuple[str, VersionId] | None:
    return (boot, version) if version else None


def fence(state: State, code: FailureCode, message: str, now: float) -> State:
    """The weights may be mixed: no permit, and the engine must end."""
    return replace(state, serving=_fenced(state.serving, code, message, now))


def _fenced(side: ServingSide, code: FailureCode, message: str, now: float) -> ServingSide:
    fences = _recent(side.fences, now)
    stays = len(fences) >= FENCE_LIMIT
    if stays:
        message = (
            f"{message}; fenced {len(fences)} times in {FENCE_WINDOW_SECONDS:.0f} s, not restarted any more"
        )
    version = side.commit.version if side.commit else None
    return ServingSide(
        ServingState.FENCED,
        side.boot,
        fences=fences,
        restart_at=None if stays else now,
        failure=Failure(code, message, version=version),
        weightsync=side.weightsync,
    )


def _recent(fences: tuple[float, ...], now: float) -> tuple[float, ...]:
    return (*(at for at in fences if now - at < FENCE_WINDOW_SECONDS), now)


# --------------------------------------------------------------------------------------- the rules


def rules(state: State, now: float) -> State:
    """Move on as far as what is known allows. Returns the same object when nothing changes."""
    side, desired = state.serving, state.desired.taken
    if side.commit:
        return _advance(state, side, side.commit, now)
    if side.tried and desired and desired.commit != side.tried[1]:
        side = replace(side, tried=None)
        state = replace(state, serving=side)
    match side.state:
        case ServingState.INITIAL:
            state = _initial(state, side)
        case ServingState.SERVING if not _allowed(state, side):
            return replace(state, serving=replace(side, state=ServingState.WITHHELD))
        case ServingState.WITHHELD if state.desired.taken and _allowed(state, side):
            return replace(state, serving=replace(side, state=ServingState.SERVING))
    return _begin(state, now) if side.state in CLEAN else state


def _advance(state: State, side: ServingSide, commit: Commit, now: float) -> State:
    if now >= commit.deadline:
        if commit.stage is Stage.RECORD:
            return replace(state, serving=_abandon(side, commit, "the journal was not written in time"))
        message = f"the commit of {commit.version} did not end in time (stage {commit.stage})"
        return fence(state, FailureCode.COMMIT_TIMEOUT, message, now)
    journal = state.journal
    durable = journal.durable.record == wanted_record(state) and not journal.writing and not journal.unsure
    if commit.stage is Stage.RECORD and durable:
        return replace(state, serving=replace(side, commit=replace(commit, stage=Stage.APPLY)))
    if commit.stage is Stage.SETTLE and durable:
        return replace(state, serving=replace(side, commit=replace(commit, stage=Stage.RESUME)))
    return state


def _initial(state: State, side: ServingSide) -> State:
    desired = state.desired.taken
    if desired is None:
        return state
    # Whatever the operator says: who ever began a commit for this WeightSync knows that a version exists.
    exists = desired.allowed or desired.commit or desired.wanted or side.weightsync == desired.weightsync.uid
    initial = desired.serve_initial and not exists
    return state if initial == side.initial else replace(state, serving=replace(side, initial=initial))


def _allowed(state: State, side: ServingSide) -> bool:
    """May what the engine holds be served? A word holds until the next; no word forbids nothing."""
    desired = state.desired.taken
    return desired is None or side.version in desired.allowed or side.version == desired.commit


def _begin(state: State, now: float) -> State:
    desired, staging, check, side = state.desired.taken, state.staging, state.check, state.serving
    if desired is None or desired.commit is None or desired.commit == side.version:
        return state
    if not state.engine.reachable or state.engine.boot != side.boot:
        return state
    wanted = staging.wanted
    if staging.state is not StagingState.STAGED or wanted is None or wanted.version != desired.commit:
        return state
    if side.tried == (side.boot, desired.commit):
        return state
    problem: Failure | None = None
    if desired.verify and desired.commit_digest and staging.digest != desired.commit_digest:
        message = f"staged {staging.digest}, but {desired.commit_digest} is to be committed"
        problem = Failure(FailureCode.DIGEST_MISMATCH, message, version=desired.commit)
    elif (check.boot, check.layout) != (
        side.boot,
        wanted.layout,
    ) or check.code is FailureCode.ENGINE_UNREACHABLE:
        return state
    elif check.code is not None:
        problem = Failure(check.code, check.message, version=desired.commit)
    if problem:
        tried = (side.boot, desired.commit)
        return replace(state, serving=replace(side, failure=problem, tried=tried))
    commit = Commit(
        Stage.RECORD,
        before=side.state,
        after=ServingState.SERVING,
        deadline=now + desired.timeouts.commit,
        version=desired.commit,
        digest=staging.digest,
        slot=staging.slot,
        in_flight=desired.in_flight,
    )
    side = replace(
        side,
        state=ServingState.APPLYING,
        commit=commit,
        failure=None,
        tried=None,
        weightsync=desired.weightsync.uid,
    )
    return replace(state, serving=side)


# ---------------------------------------------------------------------------- what follows from it


def wanted_record(state: State) -> Record | None:
    """The record that the journal should hold."""
    side, durable = state.serving, state.journal.durable.record
    if side.state is ServingState.UNREACHABLE:
        return durable
    version, digest, resumed = side.version, side.digest, True
    stands: ServingState = side.state
    if side.commit:
        if side.commit.stage in (Stage.RECORD, Stage.APPLY):
            version, digest = side.commit.version, side.commit.digest
        else:
            stands, resumed = side.commit.after, False
    elif stands is ServingState.INITIAL and _says_enough(state.journal, side):
        return durable
    message = side.failure.message if side.failure and stands is ServingState.FENCED else ""
    return Record(stands, side.boot, version, digest, resumed, side.fences, side.weightsync, message)


def _says_enough(journal: JournalSide, side: ServingSide) -> bool:
    """A record of another boot, or none at all, leaves this boot Initial by itself."""
    record = journal.durable.record
    if record is None:
        return not (side.fences or journal.unsure or journal.durable.corrupt)
    return record.boot != side.boot and record.fences == side.fences


def orders(state: State, now: float) -> tuple[State, Effects]:
    """What the engine is to be told now; comes after permit and journal."""
    side, commit = state.serving, state.serving.commit
    if side.state is ServingState.FENCED:
        if side.restart_at is None or now < side.restart_at:
            return state, ()
        reason = side.failure.message if side.failure else "fenced"
        side = replace(side, restart_at=now + RESTART_SECONDS)
        return replace(state, serving=side), (RestartEngine(side.boot, reason),)
    if commit is None or commit.asked or now < commit.retry_at or not state.engine.reachable:
        return state, ()
    if state.permit.unknown:
        # A permit that could not be written may still let requests in.
        return state, ()
    asked = replace(state, serving=replace(side, commit=replace(commit, asked=True)))
    if commit.stage is Stage.RESUME:
        return asked, (Resume(side.boot),)
    if commit.stage is Stage.APPLY:
        return _apply(state, commit, now)
    return state, ()


def _apply(state: State, commit: Commit, now: float) -> tuple[State, Effects]:
    side, staging = state.serving, state.staging
    assert commit.version and staging.wanted and staging.slot == commit.slot
    order = Apply(
        side.boot,
        commit.slot,
        commit.version,
        staging.wanted.layout,
        commit.digest,
        staging.nbytes,
        commit.in_flight,
        (commit.deadline - now) * APPLY_MARGIN,
    )
    return replace(state, serving=replace(side, commit=replace(commit, asked=True))), (order,)
