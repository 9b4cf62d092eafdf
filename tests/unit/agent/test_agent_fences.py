"""Fences, and what an agent makes of its journal and permit after a restart of its own."""

import pytest

from weightsync_contract.messages import ServingState
from weightsync_engine.agent.core.effects import (
    Apply,
    RestartEngine,
    Resume,
    WriteJournal,
    WritePermit,
)
from weightsync_engine.agent.core.events import (
    ApplyDone,
    ApplyFailed,
    DesiredReceived,
    EngineSeen,
    PermitFailed,
    PreflightEnded,
    ResumeEnded,
)
from weightsync_engine.agent.core.journal import Journal, Record
from weightsync_engine.permit import Mode, Permit


def kinds(effects):
    return [type(effect) for effect in effects]


def records(effects):
    return [effect.entry.state for effect in effects if isinstance(effect, WriteJournal)]


# ------------------------------------------------------------------------------------------ Fenced


def fence(member, boot):
    member.send(PreflightEnded(boot, "sha256:l"))
    member.send(ApplyFailed(boot, member.state.staging.slot, False, "mixed"))


def test_the_third_fence_in_ten_minutes_stays(member):
    member.join().check().stage().commit()
    for number in (1, 2, 3):
        fence(member, f"b{number}")
        assert member.told.serving.fences == number
        if number < 3:
            member.now += 60
            member.send(EngineSeen(f"b{number + 1}", 1))
    assert "not restarted any more" in member.told.serving.failure.message
    assert RestartEngine not in kinds(member.later(3600))
    assert member.told.serving.state is ServingState.FENCED
    assert len([e for e in member.did if isinstance(e, RestartEngine)]) == 2


def test_fences_long_ago_do_not_count(member):
    member.join().check().stage().commit()
    for number in (1, 2, 3):
        fence(member, f"b{number}")
        assert member.told.serving.fences == min(number, 1)
        member.now += 601
        member.send(EngineSeen(f"b{number + 1}", 1))


def test_a_version_that_kills_engines_is_not_tried_for_ever(member):
    member.join().check().stage().commit()
    for number in (1, 2, 3):
        member.send(PreflightEnded(f"b{number}", "sha256:l"))
        member.send(ApplyFailed(f"b{number}", 1, False, "connection reset"))
        if number < 3:
            member.send(EngineSeen(f"b{number + 1}", 1))
    assert len([e for e in member.did if isinstance(e, Apply)]) == 3
    member.later(3600)
    assert member.told.serving.state is ServingState.FENCED
    assert len([e for e in member.did if isinstance(e, Apply)]) == 3


def test_a_fenced_engine_is_told_again_until_it_has_another_boot(member):
    member.join().check().stage().commit()
    member.send(ApplyFailed("b1", 1, False, "mixed"))
    assert kinds(member.later(45)).count(RestartEngine) == 2
    member.send(EngineSeen("b2", 1))
    assert RestartEngine not in kinds(member.later(60))


def test_a_commit_follows_the_fence(member, kit):
    member.join().check().stage().commit()
    member.send(ApplyFailed("b1", 1, False, "mixed"), EngineSeen("b2", 1), PreflightEnded("b2", kit.LAYOUT))
    member.send(ApplyDone("b2", 1), ResumeEnded("b2"))
    assert member.permit == Permit("b2", Mode.SERVE, kit.V1)


def test_nothing_serves_while_fenced(member, kit):
    member.join().check().stage().commit()
    member.send(ApplyFailed("b1", 1, False, "mixed"))
    member.commit(allowed=(kit.V1, kit.V2))
    member.send(ApplyDone("b1", 1), ResumeEnded("b1"))
    assert member.permit is None


# ------------------------------------------------------------------------------ the agent restarts


def test_a_restarted_agent_interrupts_nobody(member, kit):
    member.serve()
    agent = member.restart()
    did = agent.send(EngineSeen("b1", 1))
    assert did == []
    assert agent.told.serving.state is ServingState.SERVING
    assert agent.told.serving.version == kit.V1
    assert agent.later(600) == []


def test_a_restarted_agent_leaves_initial_weights_serving(member):
    member.desire(serve_initial=True)
    agent = member.restart()
    assert agent.send(EngineSeen("b1", 1)) == []
    assert agent.permit == Permit("b1", Mode.SERVE, None)


def test_a_restarted_agent_fences_what_was_being_applied(member):
    member.join().check().stage().commit()
    agent = member.restart()
    did = agent.send(EngineSeen("b1", 1))
    assert kinds(did) == [WritePermit, WriteJournal, RestartEngine]
    assert agent.told.serving.state is ServingState.FENCED


@pytest.mark.parametrize("mode", [None, Mode.SERVE])
def test_a_restarted_agent_fences_whatever_the_journal_calls_applying(kit, mode):
    record = Record(ServingState.APPLYING, "b1", kit.V2, "d")
    permit = Permit("b1", mode, kit.V1) if mode else None
    agent = kit.Bench(journal=Journal(record), permit=permit)
    assert RestartEngine in kinds(agent.send(EngineSeen("b1", 1)))
    assert agent.permit is None


def test_a_restarted_agent_has_nothing_against_a_boot_that_came_after_the_apply(member):
    member.join().check().stage().commit()
    agent = member.restart()
    agent.send(EngineSeen("b2", 1))
    assert agent.told.serving.state is ServingState.INITIAL
    assert agent.permit is None


@pytest.mark.parametrize("clean_failure", [False, True])
def test_a_restarted_agent_ends_a_commit_that_only_wants_its_resume(member, kit, clean_failure):
    member.serve().stage(kit.V2).commit(kit.V2)
    member.send(ApplyFailed("b1", 2, True, "no") if clean_failure else ApplyDone("b1", 2))
    agent = member.restart()
    assert kinds(agent.send(EngineSeen("b1", 1))) == [Resume]
    agent.send(ResumeEnded("b1"))
    assert agent.permit == Permit("b1", Mode.SERVE, kit.V1 if clean_failure else kit.V2)
    assert agent.told.serving.state is ServingState.SERVING


def test_a_restarted_agent_writes_the_permit_that_was_not_written_yet(member, kit):
    record = Record(ServingState.SERVING, "b1", kit.V1, "d", resumed=False)
    agent = kit.Bench(journal=Journal(record), permit=Permit("b1", Mode.HOLD, None))
    assert kinds(agent.send(EngineSeen("b1", 1))) == [WritePermit, Resume]
    assert agent.permit == Permit("b1", Mode.SERVE, kit.V1)


def test_a_restarted_agent_gives_no_permit_that_was_taken_away(member, kit):
    record = Record(ServingState.SERVING, "b1", kit.V1, "d")
    agent = kit.Bench(journal=Journal(record), permit=None)
    agent.send(EngineSeen("b1", 1))
    assert agent.told.serving.state is ServingState.WITHHELD
    assert agent.permit is None
    agent.desire(allowed=(kit.V1,))
    assert agent.permit == Permit("b1", Mode.SERVE, kit.V1)


@pytest.mark.parametrize("permit", [None, Permit("b1", Mode.SERVE, None), Permit("b1", Mode.HOLD, None)])
def test_an_unreadable_journal_is_the_worst_that_it_may_have_said(kit, permit):
    agent = kit.Bench(journal=Journal(corrupt=True), permit=permit)
    did = agent.send(EngineSeen("b1", 1))
    assert RestartEngine in kinds(did)
    assert agent.permit is None
    assert agent.journal.record.state is ServingState.FENCED


def test_a_permit_without_a_journal_is_not_believed(kit):
    agent = kit.Bench(permit=Permit("b1", Mode.SERVE, kit.V1))
    assert RestartEngine in kinds(agent.send(EngineSeen("b1", 1)))
    assert agent.permit is None


def test_a_hold_without_a_commit_is_not_believed(kit):
    record = Record(ServingState.SERVING, "b1", kit.V1, "d", resumed=True)
    agent = kit.Bench(journal=Journal(record), permit=Permit("b1", Mode.HOLD, kit.V1))
    assert RestartEngine in kinds(agent.send(EngineSeen("b1", 1)))


def test_a_restarted_agent_knows_how_often_the_engine_was_fenced(member):
    member.join().check().stage().commit()
    member.send(ApplyFailed("b1", 1, False, "mixed"), EngineSeen("b2", 1))
    agent = member.restart()
    agent.send(EngineSeen("b2", 1))
    assert agent.told.serving.fences == 1
    assert agent.told.serving.state is ServingState.INITIAL


def test_a_restarted_agent_lets_the_third_fence_stay(kit):
    record = Record(ServingState.FENCED, "b3", fences=(70.0, 80.0, 90.0), message="mixed")
    agent = kit.Bench(journal=Journal(record))
    assert RestartEngine not in kinds(agent.send(EngineSeen("b3", 1)) + agent.later(100))
    assert agent.told.serving.state is ServingState.FENCED


def test_the_first_word_after_a_restart_is_the_operators(member, kit):
    member.serve()
    agent = member.restart()
    agent.send(EngineSeen("b1", 1))
    agent.desire(allowed=(kit.V2,))
    assert agent.permit is None


def test_a_permit_that_could_not_be_taken_away_is_tried_again(member, kit):
    member.serve()
    member.desire(allowed=(kit.V2,))
    assert member.send(PermitFailed(None, "read-only file system")) == []
    assert member.later(2).count(WritePermit(None)) == 1


def test_the_engine_is_not_touched_while_nobody_knows_which_permit_lies_there(member, kit):
    member.serve().stage(kit.V2)
    member.desire(wanted=kit.wanted(kit.V2), allowed=(kit.V2,))
    member.send(PermitFailed(None, "read-only file system"))
    member.commit(kit.V2, allowed=(kit.V2,))
    assert [e for e in member.did if isinstance(e, Apply)][1:] == []
    assert kinds(member.later(2))[:2] == [WritePermit, Apply]


def test_a_repeated_word_changes_nothing(member, kit):
    member.serve()
    desired = member.state.desired.taken
    assert member.send(DesiredReceived(desired)) == []
