"""The serving side, row by row of its table: state, what happens, permit, what the engine is told."""

import pytest

from weightsync_contract.messages import Released, ServingState
from weightsync_contract.reasons import FailureCode
from weightsync_engine.agent.core.effects import (
    Apply,
    DropStaging,
    Preflight,
    RestartEngine,
    Resume,
    WriteJournal,
    WritePermit,
)
from weightsync_engine.agent.core.events import (
    ApplyDone,
    ApplyFailed,
    ChildReceived,
    EngineGone,
    EngineSeen,
    PermitFailed,
    PreflightEnded,
    ReleasedReceived,
    ResumeEnded,
    SessionClosed,
    StagingSealed,
    Tick,
)
from weightsync_engine.permit import Mode, Permit


def kinds(effects):
    return [type(effect) for effect in effects]


def records(effects):
    return [effect.entry.state for effect in effects if isinstance(effect, WriteJournal)]


# ----------------------------------------------------------------------------------------- Initial


def test_a_boot_without_a_commit_has_no_permit(member):
    assert member.told.serving.state is ServingState.INITIAL
    assert member.permit is None
    member.desire()
    assert member.permit is None


def test_initial_weights_are_served_while_no_version_exists(member, kit):
    assert member.desire(serve_initial=True) == [
        WritePermit(Permit("b1", Mode.SERVE, None))
    ] or member.permit == Permit("b1", Mode.SERVE, None)
    member.desire(serve_initial=False)
    assert member.permit is None


@pytest.mark.parametrize("sign", ["allowed", "commit", "wanted"])
def test_initial_weights_are_not_served_once_a_version_exists(member, kit, sign):
    value = {"allowed": (kit.V1,), "commit": kit.V1, "wanted": kit.wanted()}[sign]
    member.desire(serve_initial=True, **{sign: value})
    assert member.permit is None


def test_initial_weights_are_not_served_by_one_that_ever_committed_for_this_weightsync(member):
    member.serve()
    member.send(EngineSeen("b2", 1))
    member.desire(serve_initial=True)
    assert member.told.serving.state is ServingState.INITIAL
    assert member.permit is None


# ---------------------------------------------------------------------------------------- Applying


def test_a_commit_in_its_order(member, kit):
    member.join().check().stage()
    mark = len(member.did)
    member.commit()
    hold, serve = Permit("b1", Mode.HOLD, None), Permit("b1", Mode.SERVE, kit.V1)
    member.send(ApplyDone("b1", 1))
    assert member.permit == serve
    assert member.told.serving.state is ServingState.APPLYING, "paused engines serve nobody"
    member.send(ResumeEnded("b1"))
    did = [
        (
            type(effect),
            getattr(effect, "permit", None) or getattr(getattr(effect, "entry", None), "state", None),
        )
        for effect in member.did[mark:]
        if isinstance(effect, (WriteJournal, WritePermit, Apply, Resume, DropStaging))
    ]
    assert did == [
        (WriteJournal, ServingState.APPLYING),
        (WritePermit, hold),
        (Apply, None),
        (WriteJournal, ServingState.SERVING),
        (WritePermit, serve),
        (Resume, None),
        (DropStaging, None),
        (WriteJournal, ServingState.SERVING),
    ]
    told = member.told.serving
    assert (told.state, told.version, told.digest) == (ServingState.SERVING, kit.V1, kit.digest(kit.V1))


def test_the_engine_is_not_touched_before_the_journal_says_so(member):
    member.join().check().stage()
    member.journal_works = False
    member.commit()
    assert Apply not in kinds(member.did)
    assert member.permit is None
    assert member.told.serving.state is ServingState.INITIAL
    assert member.told.serving.failure.code is FailureCode.APPLY_FAILED


def test_a_record_that_failed_is_written_again_and_nobody_is_woken_while_a_slow_disk_writes_it(member, kit):
    member.serve().stage(kit.V2)
    member.journal_works = False
    member.commit(kit.V2)
    member.journal_works = None
    # The bench fails when a moment has come and nothing was done about it.
    assert [type(effect) for effect in member.later(10.0)] == [WriteJournal]
    assert member.told.serving.version == kit.V1


def test_nothing_is_served_before_the_journal_says_so(member):
    member.join().check().stage().commit()
    member.journal_works = False
    did = member.send(ApplyDone("b1", 1))
    assert Resume not in kinds(did)
    assert member.permit is None
    assert member.told.serving.state is ServingState.FENCED


def test_the_engine_is_not_touched_when_the_permit_can_not_be_held(member, kit):
    member.serve().stage(kit.V2)
    member.commit(kit.V2)
    # The runner leaves out the Apply that follows a failed permit, and says so.
    member.send(PermitFailed(Permit("b1", Mode.HOLD, kit.V1), "read-only file system"))
    assert member.told.serving.state is ServingState.APPLYING
    member.send(ResumeEnded("b1"))
    assert member.told.serving.version == kit.V1
    member.later(2)
    assert member.permit == Permit("b1", Mode.SERVE, kit.V1)


def test_a_clean_failure_lets_the_old_weights_serve_on(member, kit):
    member.serve().stage(kit.V2).commit(kit.V2)
    assert member.permit.mode is Mode.HOLD
    member.send(ApplyFailed("b1", 2, True, "rank 1 has no memory"))
    assert member.permit == Permit("b1", Mode.SERVE, kit.V1)
    member.send(ResumeEnded("b1"))
    told = member.told.serving
    assert (told.state, told.version) == (ServingState.SERVING, kit.V1)
    assert told.failure.version == kit.V2
    assert Apply not in kinds(member.later(120)), "the same commit is not tried again"
    assert member.journal.record.version == kit.V1


def test_a_clean_failure_is_tried_again_when_it_is_asked_for_anew(member, kit):
    member.serve().stage(kit.V2).commit(kit.V2)
    member.send(ApplyFailed("b1", 2, True, "busy"), ResumeEnded("b1"))
    member.desire(group=kit.group(), wanted=kit.wanted(kit.V2), allowed=(kit.V1,))
    member.commit(kit.V2)
    assert member.told.serving.state is ServingState.APPLYING


@pytest.mark.parametrize(
    "how", [lambda: ApplyFailed("b1", 1, False, "rank 1 died"), None], ids=["unclean", "deadline"]
)
def test_an_apply_that_may_have_mixed_weights_is_fenced(member, how):
    member.join().check().stage().commit()
    did = member.send(how()) if how else member.later(61)
    assert kinds(did) == [WritePermit, WriteJournal, RestartEngine]
    assert member.permit is None
    assert member.told.serving.state is ServingState.FENCED
    assert member.told.serving.fences == 1
    assert member.told.serving.failure.code is (
        FailureCode.APPLY_FAILED if how else FailureCode.COMMIT_TIMEOUT
    )


def test_a_resume_is_tried_until_the_commits_deadline_and_then_fenced(member):
    member.join().check().stage().commit()
    member.send(ApplyDone("b1", 1))
    assert Resume in kinds(member.send(ResumeEnded("b1", "503"), Tick()) + member.later(2))
    member.send(ResumeEnded("b1", "503"))
    member.later(60)
    assert member.told.serving.state is ServingState.FENCED
    assert member.permit is None


def test_a_boot_that_came_in_an_apply_may_have_got_a_part_of_it(member, kit):
    member.join().check().stage().commit()
    assert RestartEngine in kinds(member.send(EngineGone(), EngineSeen("b2", 1)))
    assert member.permit is None
    told = member.told.serving
    assert (told.state, told.boot, told.fences) == (ServingState.FENCED, "b2", 1)
    assert told.failure.code is FailureCode.ENGINE_RESTARTED
    assert told.failure.version == kit.V1
    assert member.told.transfer.version == kit.V1, "the staged memory is the agent's, not the engine's"


def test_an_answer_to_another_apply_is_not_taken(member):
    member.join().check().stage().commit()
    member.send(ApplyDone("b0", 1), ApplyDone("b1", 9), ApplyFailed("b1", 9, True, "x"))
    assert member.told.serving.state is ServingState.APPLYING
    assert member.permit.mode is Mode.HOLD


def test_a_late_answer_of_another_boot_is_not_taken(member):
    member.join().check().stage().commit()
    member.send(EngineSeen("b2", 1), ApplyDone("b1", 1))
    assert member.told.serving.state is ServingState.FENCED
    assert member.permit is None


# --------------------------------------------------------------------------- what may be committed


def test_only_what_is_staged_is_committed(member, kit):
    member.join().check().stage(kit.V1)
    did = member.desire(group=kit.group(), wanted=kit.wanted(kit.V1), commit=kit.V2)
    assert Apply not in kinds(did)
    assert member.told.serving.state is ServingState.INITIAL


def test_a_version_of_another_run_is_not_the_same_version(member, kit):
    member.join().check().stage(kit.V1)
    other = kit.replace(kit.V1, run="another")
    member.desire(group=kit.group(), wanted=kit.wanted(kit.V1), commit=other)
    assert member.told.serving.state is ServingState.INITIAL


def test_what_is_staged_is_not_committed_under_another_digest(member, kit):
    member.join().check().stage()
    member.commit(commit_digest="xxh3-128:other")
    assert member.told.serving.state is ServingState.INITIAL
    assert member.told.serving.failure.code is FailureCode.DIGEST_MISMATCH


def test_no_commit_without_being_told(member):
    member.join().check().stage()
    member.send(SessionClosed())
    assert Apply not in kinds(member.later(600))
    assert member.told.transfer.state.value == "Staged"


def test_a_commit_told_before_the_session_was_lost_is_done(member, kit):
    member.join().check().receive()
    member.commit()
    member.send(SessionClosed())
    member.send(ChildReceived(1, kit.digest(kit.V1)), StagingSealed(1))
    assert member.told.serving.state is ServingState.APPLYING


def test_a_new_boot_is_asked_about_the_layout_before_it_is_given_it(member, kit):
    member.join().check().receive()
    member.send(EngineGone())
    member.send(ChildReceived(1, kit.digest(kit.V1)), StagingSealed(1))
    member.commit()
    assert member.told.serving.state is ServingState.UNREACHABLE
    did = member.send(EngineSeen("b2", 1))
    assert Preflight in kinds(did)
    assert Apply not in kinds(did)
    assert Apply in kinds(member.send(PreflightEnded("b2", kit.LAYOUT)))


def test_a_new_boot_that_refuses_the_layout_is_not_given_it(member, kit):
    member.join().check().stage()
    member.send(EngineSeen("b2", 1))
    member.commit()
    did = member.send(PreflightEnded("b2", kit.LAYOUT, FailureCode.MANIFEST_REFUSED, "no tensor 'x'"))
    assert Apply not in kinds(did)
    assert member.told.serving.failure.code is FailureCode.MANIFEST_REFUSED
    assert member.told.transfer.checked == ""


# ---------------------------------------------------------------------------- Serving and Withheld


def test_a_boot_change_takes_the_permit_away(member):
    member.serve()
    member.send(EngineSeen("b2", 1))
    assert member.permit is None
    assert member.told.serving.state is ServingState.INITIAL
    assert member.told.serving.version is None
    assert member.told.serving.fences == 0


def test_an_engine_that_does_not_answer_keeps_its_permit(member, kit):
    member.serve()
    member.send(EngineGone())
    assert member.told.serving.state is ServingState.UNREACHABLE
    assert member.permit == Permit("b1", Mode.SERVE, kit.V1)
    member.send(EngineSeen("b1", 1))
    assert member.told.serving.state is ServingState.SERVING


def test_a_version_no_longer_allowed_is_withheld_and_given_back(member, kit):
    member.serve()
    did = member.desire(allowed=(kit.V2,))
    assert did.index(WritePermit(None)) < next(i for i, e in enumerate(did) if isinstance(e, WriteJournal))
    assert member.told.serving.state is ServingState.WITHHELD
    assert member.permit is None
    did = member.desire(allowed=(kit.V1, kit.V2))
    assert kinds(did)[-2:] == [WriteJournal, WritePermit] or kinds(did)[:2] == [WriteJournal, WritePermit]
    assert member.permit == Permit("b1", Mode.SERVE, kit.V1)
    assert Resume not in kinds(did)


def test_a_withheld_member_takes_a_commit(member, kit):
    member.serve()
    member.desire(group=kit.group(), wanted=kit.wanted(kit.V2), allowed=(kit.V2,))
    assert member.told.serving.state is ServingState.WITHHELD
    member.stage(kit.V2, allowed=(kit.V2,)).commit(kit.V2)
    member.send(ApplyDone("b1", member.state.staging.slot), ResumeEnded("b1"))
    assert member.permit == Permit("b1", Mode.SERVE, kit.V2)


def test_a_clean_failure_of_a_withheld_member_leaves_it_withheld(member, kit):
    member.serve()
    member.desire(group=kit.group(), wanted=kit.wanted(kit.V2), allowed=(kit.V2,))
    member.stage(kit.V2, allowed=(kit.V2,)).commit(kit.V2, allowed=(kit.V2,))
    member.send(ApplyFailed("b1", member.state.staging.slot, True, "no"), ResumeEnded("b1"))
    assert member.told.serving.state is ServingState.WITHHELD
    assert member.permit is None


def test_the_released_serve_on(member, kit):
    member.serve().stage(kit.V2)
    did = member.send(ReleasedReceived(Released(1)))
    assert DropStaging in kinds(did)
    assert WritePermit not in kinds(did)
    assert member.permit == Permit("b1", Mode.SERVE, kit.V1)
    assert member.told.transfer.state.value == "Aborting"
