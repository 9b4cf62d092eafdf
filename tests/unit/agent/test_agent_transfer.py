"""The transfer side: its states, its deadlines, and what it does when others fail."""

import pytest

from weightsync_contract.messages import Phase, Timeouts, TransferState
from weightsync_contract.reasons import FailureCode
from weightsync_engine.agent.core.effects import (
    AllocateStaging,
    ExchangeManifest,
    KillChild,
    OpenChild,
    Preflight,
)
from weightsync_engine.agent.core.events import (
    ChildExited,
    ChildFailed,
    ChildListening,
    ChildReady,
    EngineGone,
    EngineSeen,
    ManifestExchanged,
    PreflightEnded,
    SessionClosed,
    StagingAllocated,
    StagingFailed,
)


def kinds(effects):
    return [type(effect) for effect in effects]


# ----------------------------------------------------------------------------------------- joining


def test_a_member_waits_for_the_endpoint(member, kit):
    assert OpenChild not in kinds(member.desire(group=kit.group(endpoint="")))
    did = member.desire(group=kit.group())
    (opened,) = [effect for effect in did if isinstance(effect, OpenChild)]
    assert (opened.child, opened.group, opened.seconds) == (1, kit.group(), 60.0)
    assert member.told.transfer.state is TransferState.JOINING


def test_rank_0_listens_and_says_where(trainer, kit):
    assert OpenChild in kinds(trainer.desire(group=kit.group(rank=0, endpoint="")))
    trainer.send(ChildListening(1, "10.0.0.1:4711"))
    told = trainer.told.transfer
    assert (told.state, told.endpoint, told.nonce) == (TransferState.JOINING, "10.0.0.1:4711", "nonce-1")
    trainer.desire(group=kit.group(rank=0, endpoint="10.0.0.1:4711"))
    trainer.send(ChildReady(1))
    assert trainer.told.transfer.state is TransferState.JOINED


@pytest.mark.parametrize("remaining_ms", [0, 5000])
def test_a_join_has_a_deadline_also_with_the_operator_gone(member, kit, remaining_ms):
    member.desire(group=kit.group(), remaining_ms=remaining_ms, timeouts=Timeouts(join=20))
    member.send(SessionClosed())
    limit = remaining_ms / 1000 or 20
    member.later(limit - 0.1)
    assert member.told.transfer.state is TransferState.JOINING
    assert KillChild(1) in member.later(0.2)
    assert member.told.transfer.failure.code is FailureCode.JOIN_TIMEOUT
    assert member.told.transfer.failure.epoch == 1


def test_no_later_word_makes_a_deadline_longer(member, kit):
    member.desire(group=kit.group(), remaining_ms=5000)
    for _ in range(3):
        member.later(2)
        member.desire(group=kit.group(), remaining_ms=5000)
    assert member.told.transfer.failure.code is FailureCode.JOIN_TIMEOUT


def test_a_group_that_failed_is_never_joined_again(member, kit):
    member.join()
    member.send(ChildFailed(1, FailureCode.PEER_LOST, "connection reset"), ChildExited(1))
    assert member.told.transfer.state is TransferState.IDLE
    assert OpenChild not in kinds(member.desire(group=kit.group(1)))
    assert OpenChild not in kinds(member.desire(group=kit.group(1), wanted=kit.wanted()))
    assert OpenChild in kinds(member.desire(group=kit.group(2)))
    assert member.told.transfer.failure is None


def test_a_higher_epoch_kills_the_child_and_waits_for_its_end(member, kit):
    member.join()
    did = member.desire(group=kit.group(2))
    assert KillChild(1) in did
    assert OpenChild not in kinds(did)
    assert member.told.transfer.state is TransferState.ABORTING
    (opened,) = member.send(ChildExited(1))
    assert (opened.child, opened.group.epoch) == (2, 2)


def test_a_child_that_does_not_die_is_not_waited_for_longer_than_two_seconds(member, kit):
    member.join()
    member.desire(group=kit.group(2))
    assert OpenChild not in kinds(member.later(1.9))
    assert OpenChild in kinds(member.later(0.2))


def test_a_group_that_was_left_is_never_joined_again(member, kit):
    member.join()
    member.desire()
    member.send(ChildExited(1))
    assert OpenChild not in kinds(member.desire(group=kit.group(1)))


def test_a_restarted_agent_says_at_once_that_the_epoch_has_lost_it(member, kit):
    member.join(3)
    agent = member.restart()
    agent.send(EngineSeen("b1", 1))
    assert OpenChild not in kinds(agent.desire(group=kit.group(3)))
    told = agent.told.transfer
    assert (told.state, told.failure.code, told.failure.epoch) == (
        TransferState.IDLE,
        FailureCode.CHILD_FAILED,
        3,
    )
    assert OpenChild in kinds(agent.desire(group=kit.group(4)))


def test_the_same_epoch_with_another_nonce_is_another_group(member, kit):
    member.join()
    assert KillChild(1) in member.desire(group=kit.replace(kit.group(), nonce="other"))


def test_late_words_of_a_killed_child_are_not_heard(member, kit):
    member.join()
    member.desire(group=kit.group(2))
    member.send(ChildExited(1))
    member.send(ChildReady(1), ChildFailed(1, FailureCode.PEER_LOST, "x"), ChildExited(1))
    assert member.told.transfer.state is TransferState.JOINING
    assert member.told.transfer.failure is None


def test_no_group_means_no_child(member):
    member.join()
    assert KillChild(1) in member.desire()
    member.send(ChildExited(1))
    assert member.told.transfer.state is TransferState.IDLE


def test_a_child_that_ends_by_itself_is_a_failure(member):
    member.join()
    did = member.send(ChildExited(1, "killed by signal 9"))
    assert KillChild not in kinds(did)
    told = member.told.transfer
    assert (told.state, told.failure.code) == (TransferState.IDLE, FailureCode.CHILD_FAILED)
    assert "signal 9" in told.failure.message


# ---------------------------------------------------------------------------------------- checking


def test_a_check_in_its_order(member, kit):
    member.join()
    assert kinds(member.desire(group=kit.group(), wanted=kit.wanted(phase=Phase.CHECK))) == [ExchangeManifest]
    assert member.told.transfer.state is TransferState.CHECKING
    assert member.send(ManifestExchanged(1, kit.LAYOUT)) == [Preflight("b1", kit.LAYOUT)]
    assert member.send(PreflightEnded("b1", kit.LAYOUT)) == [AllocateStaging(1, 1, 1000)]
    assert member.told.transfer.state is TransferState.CHECKING
    member.send(StagingAllocated(1))
    told = member.told.transfer
    assert (told.state, told.checked, told.failure) == (TransferState.JOINED, kit.LAYOUT, None)


def test_a_refused_manifest_is_an_answer_and_moves_nothing(member, kit):
    member.join()
    member.desire(group=kit.group(), wanted=kit.wanted(phase=Phase.CHECK))
    did = member.send(
        ManifestExchanged(1, kit.LAYOUT),
        PreflightEnded("b1", kit.LAYOUT, FailureCode.MANIFEST_REFUSED, "tensor 'x': shape"),
    )
    assert AllocateStaging not in kinds(did)
    told = member.told.transfer
    assert (told.state, told.checked) == (TransferState.JOINED, "")
    assert told.failure.code is FailureCode.MANIFEST_REFUSED
    assert (told.failure.epoch, told.failure.version) == (1, kit.V1)
    assert "tensor 'x'" in told.failure.message
    assert member.later(600) == []
    assert member.desire(group=kit.group(), wanted=kit.wanted()) == []
    assert member.told.transfer.state is TransferState.JOINED
    assert member.told.transfer.failure.code is FailureCode.MANIFEST_REFUSED


def test_a_refusal_is_asked_again_when_the_manifest_comes_round_again(member, kit):
    member.join()
    member.desire(group=kit.group(), wanted=kit.wanted(phase=Phase.CHECK))
    refused = PreflightEnded("b1", kit.LAYOUT, FailureCode.MANIFEST_REFUSED, "no")
    member.send(ManifestExchanged(1, kit.LAYOUT), refused)
    member.desire(group=kit.group(2), wanted=kit.wanted(phase=Phase.CHECK))
    did = member.send(ChildExited(1), ChildReady(2), ManifestExchanged(2, kit.LAYOUT))
    assert Preflight in kinds(did)


def test_no_memory_is_an_answer_before_anything_moves(member, kit):
    member.join()
    member.desire(group=kit.group(), wanted=kit.wanted(phase=Phase.CHECK))
    member.send(ManifestExchanged(1, kit.LAYOUT), PreflightEnded("b1", kit.LAYOUT))
    member.send(StagingFailed(1, "1 GiB, but 0.5 are free"))
    told = member.told.transfer
    assert (told.state, told.failure.code) == (TransferState.JOINED, FailureCode.STAGING_FAILED)
    assert member.later(600) == []


def test_no_memory_in_a_transfer_ends_the_epoch(member, kit):
    member.join().check()
    member.send(EngineSeen("b1", 1))
    member.desire(group=kit.group())
    member.desire(group=kit.group(), wanted=kit.wanted())
    assert KillChild(1) in member.send(StagingFailed(2, "none"))
    assert member.told.transfer.failure.code is FailureCode.STAGING_FAILED


def test_a_check_waits_for_an_engine_that_is_away_but_not_for_ever(member, kit):
    member.join()
    member.send(EngineGone())
    member.desire(group=kit.group(), wanted=kit.wanted(phase=Phase.CHECK))
    assert member.send(ManifestExchanged(1, kit.LAYOUT)) == []
    member.later(59)
    assert member.told.transfer.state is TransferState.CHECKING
    did = member.later(2)
    assert KillChild not in kinds(did)
    told = member.told.transfer
    assert (told.state, told.failure.code) == (TransferState.JOINED, FailureCode.ENGINE_UNREACHABLE)


def test_an_engine_that_is_back_in_time_is_asked(member, kit):
    member.join()
    member.send(EngineGone())
    member.desire(group=kit.group(), wanted=kit.wanted(phase=Phase.CHECK))
    member.send(ManifestExchanged(1, kit.LAYOUT))
    assert member.send(EngineSeen("b2", 1)) == [Preflight("b2", kit.LAYOUT)]


def test_a_preflight_that_found_no_engine_is_tried_again(member, kit):
    member.join()
    member.desire(group=kit.group(), wanted=kit.wanted(phase=Phase.CHECK))
    member.send(ManifestExchanged(1, kit.LAYOUT))
    member.send(PreflightEnded("b1", kit.LAYOUT, FailureCode.ENGINE_UNREACHABLE, "refused"))
    assert member.later(0.5) == []
    assert member.later(1) == [Preflight("b1", kit.LAYOUT)]


def test_a_manifest_goes_round_once_in_a_group_but_in_each_group(member, kit):
    member.join().check()
    assert ExchangeManifest not in kinds(
        member.desire(group=kit.group(), wanted=kit.wanted(kit.V2, Phase.CHECK))
    )
    member.desire(group=kit.group(2))
    member.send(ChildExited(1))
    member.send(ChildReady(2))
    did = member.desire(group=kit.group(2), wanted=kit.wanted(kit.V2, Phase.CHECK))
    assert ExchangeManifest in kinds(did), "whoever is new in the group waits for it"


def test_another_layouts_manifest_is_not_taken_for_this_one(member, kit):
    member.join()
    member.desire(group=kit.group(), wanted=kit.wanted(phase=Phase.CHECK))
    assert member.send(ManifestExchanged(1, "sha256:other")) == []
    assert member.told.transfer.state is TransferState.CHECKING


def test_who_is_checking_has_not_checked(member, kit):
    member.join().check()
    member.desire(group=kit.group(2), wanted=kit.wanted(phase=Phase.CHECK))
    member.send(ChildExited(1), ChildReady(2))
    told = member.told.transfer
    assert (told.state, told.checked) == (TransferState.CHECKING, "")
    member.send(ManifestExchanged(2, kit.LAYOUT), StagingAllocated(2))
    assert member.told.transfer.checked == kit.LAYOUT


def test_what_was_checked_is_told_until_the_engine_restarts(member, kit):
    member.join().check()
    member.desire(group=kit.group(2))
    member.send(ChildExited(1))
    assert member.told.transfer.checked == kit.LAYOUT
    assert member.send(EngineSeen("b2", 1)) == [Preflight("b2", kit.LAYOUT)]
    assert member.told.transfer.checked == ""
    member.send(PreflightEnded("b2", kit.LAYOUT))
    assert member.told.transfer.checked == kit.LAYOUT


def test_an_answer_of_the_boot_before_is_not_taken(member, kit):
    member.join()
    member.desire(group=kit.group(), wanted=kit.wanted(phase=Phase.CHECK))
    member.send(ManifestExchanged(1, kit.LAYOUT), EngineSeen("b2", 1))
    assert member.send(PreflightEnded("b1", kit.LAYOUT)) == []
    assert member.told.transfer.checked == ""
    assert member.told.transfer.state is TransferState.CHECKING


def test_a_manifest_that_does_not_go_round_ends_the_epoch(member, kit):
    member.join()
    member.desire(group=kit.group(), wanted=kit.wanted(phase=Phase.CHECK))
    assert KillChild(1) in member.later(61)
    assert member.told.transfer.failure.code is FailureCode.TRANSFER_TIMEOUT
