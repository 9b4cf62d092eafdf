"""Receiving and staging a version, and rank 0's side of it."""

import pytest

from weightsync_contract.messages import Fleet, Phase, ServingState, TransferState
from weightsync_contract.reasons import FailureCode
from weightsync_engine.agent.core.effects import (
    AllocateStaging,
    DropStaging,
    ExchangeManifest,
    KillChild,
    OpenChild,
    Pin,
    ReceiveVersion,
    Retain,
    SealStaging,
    SendVersion,
    TellFleet,
)
from weightsync_engine.agent.core.events import (
    ApplyDone,
    ChildExited,
    ChildFailed,
    ChildListening,
    ChildProgress,
    ChildReady,
    ChildReceived,
    ChildSent,
    ChildUnmapped,
    EngineGone,
    EngineSeen,
    ManifestExchanged,
    PreflightEnded,
    ResumeEnded,
    SessionClosed,
    SourceChanged,
    StagingAllocated,
    StagingFailed,
    StagingSealed,
)


def kinds(effects):
    return [type(effect) for effect in effects]


# --------------------------------------------------------------------------------------- receiving


def test_a_transfer_in_its_order(member, kit):
    member.join().check()
    (order,) = member.desire(group=kit.group(), wanted=kit.wanted())
    assert (order.child, order.slot, order.wanted, order.seconds) == (1, 1, kit.wanted(), 300.0)
    member.send(ChildProgress(1, 400))
    told = member.told.transfer
    assert (told.state, told.version, told.bytes, told.total_bytes) == (
        TransferState.RECEIVING,
        kit.V1,
        400,
        1000,
    )
    assert member.send(ChildReceived(1, kit.digest(kit.V1))) == []
    assert member.send(ChildUnmapped(1)) == [SealStaging(1)]
    member.send(StagingSealed(1))
    told = member.told.transfer
    assert (told.state, told.version, told.digest) == (TransferState.STAGED, kit.V1, kit.digest(kit.V1))
    assert member.told.serving.state is ServingState.INITIAL


def test_bytes_that_are_not_those_published_are_given_back(member, kit):
    member.join().check().receive()
    did = member.send(ChildReceived(1, "xxh3-128:other"))
    assert kinds(did) == [DropStaging]
    told = member.told.transfer
    assert (told.state, told.failure.code) == (TransferState.JOINED, FailureCode.DIGEST_MISMATCH)
    assert (told.failure.version, told.version) == (kit.V1, None)
    assert member.later(600) == []


def test_without_verification_the_digest_is_not_looked_at(member, kit):
    member.join().check().receive(verify=False)
    assert member.send(ChildReceived(1, ""), ChildUnmapped(1)) == [SealStaging(1)]


def test_whether_to_verify_is_settled_when_the_transfer_begins(member, kit):
    member.join().check().receive()
    member.desire(group=kit.group(), wanted=kit.wanted(), verify=False)
    assert SealStaging not in kinds(member.send(ChildReceived(1, "xxh3-128:other"), ChildUnmapped(1)))


def test_memory_that_can_not_be_sealed_is_not_staged(member, kit):
    member.join().check().receive()
    member.send(ChildReceived(1, kit.digest(kit.V1)))
    assert member.send(ChildUnmapped(1)) == [SealStaging(1)]
    assert kinds(member.send(StagingFailed(1, "somebody has it mapped"))) == [DropStaging]
    told = member.told.transfer
    assert (told.state, told.failure.code) == (TransferState.JOINED, FailureCode.STAGING_FAILED)


def test_a_seal_that_fails_late_does_not_disturb_the_next_group(member, kit):
    member.join().check().receive()
    member.send(ChildReceived(1, kit.digest(kit.V1)))
    member.desire(group=kit.group(2), wanted=kit.wanted(phase=Phase.CHECK))
    member.send(ChildExited(1), ChildReady(2))
    assert member.send(StagingFailed(1, "somebody has it mapped")) == [DropStaging(1)]
    assert member.told.transfer.state is TransferState.CHECKING


def test_a_seal_that_fails_late_is_not_the_next_groups_transfer(member, kit):
    member.join().check().receive()
    member.send(ChildReceived(1, kit.digest(kit.V1)))
    member.desire(group=kit.group(2), wanted=kit.wanted())
    member.send(ChildExited(1), ChildReady(2))
    assert kinds(member.send(StagingFailed(1, "mapped"))) == [DropStaging, AllocateStaging]
    assert member.told.transfer.state is TransferState.RECEIVING


def test_a_seal_that_ends_late_is_not_the_next_groups_transfer(member, kit):
    member.join().check().receive()
    member.send(ChildReceived(1, kit.digest(kit.V1)))
    member.desire(group=kit.group(2), wanted=kit.wanted())
    member.send(ChildExited(1), ChildReady(2))
    assert member.told.transfer.state is TransferState.RECEIVING
    assert kinds(member.send(StagingSealed(1))) == [DropStaging, AllocateStaging]
    assert member.told.transfer.state is TransferState.RECEIVING


def test_a_transfer_has_a_deadline_also_with_the_operator_gone(member, kit):
    member.join().check().receive()
    member.send(SessionClosed())
    assert KillChild(1) in member.later(301)
    assert member.told.transfer.failure.code is FailureCode.TRANSFER_TIMEOUT
    assert member.told.transfer.failure.version == kit.V1


def test_bytes_that_stop_flowing_end_the_transfer(member):
    member.join().check().receive()
    member.later(60)
    member.send(ChildProgress(1, 10))
    member.later(6)
    member.send(ChildProgress(1, 20))
    for _ in range(9):
        member.later(1)
        member.send(ChildProgress(1, 20))
    assert member.told.transfer.state is TransferState.RECEIVING
    assert KillChild(1) in member.later(1.1)
    assert member.told.transfer.failure.code is FailureCode.NO_PROGRESS


@pytest.mark.parametrize(
    "event", [ChildFailed(1, FailureCode.PEER_LOST, "reset"), ChildExited(1, "signal 9")]
)
def test_a_receive_that_breaks_gives_its_memory_back(member, event):
    member.join().check().receive()
    did = member.send(event, ChildExited(1))
    assert DropStaging(1) in did
    assert member.told.transfer.state is TransferState.IDLE


def test_an_engine_that_dies_in_a_transfer_does_not_disturb_the_group(member, kit):
    member.serve()
    member.receive(kit.V2)
    did = member.send(EngineGone(), EngineSeen("b2", 1))
    assert KillChild not in kinds(did)
    assert DropStaging not in kinds(did)
    member.send(ChildReceived(1, kit.digest(kit.V2)), StagingSealed(2))
    assert member.told.transfer.state is TransferState.STAGED
    member.commit(kit.V2)
    member.send(PreflightEnded("b2", kit.LAYOUT))
    assert member.told.serving.state is ServingState.APPLYING


def test_the_group_is_kept_after_the_commit(member, kit):
    member.serve()
    told = member.told.transfer
    assert (told.state, told.epoch, told.checked) == (TransferState.JOINED, 1, kit.LAYOUT)
    did = member.desire(group=kit.group(), wanted=kit.wanted(kit.V2))
    assert kinds(did) == [AllocateStaging]
    (order,) = member.send(StagingAllocated(2))
    assert (order.child, order.slot) == (1, 2)


def test_the_staged_outlives_its_group_while_it_is_wanted(member, kit):
    member.join().check().stage()
    did = member.desire(group=None, wanted=kit.wanted())
    assert DropStaging not in kinds(did)
    member.send(ChildExited(1))
    assert member.told.transfer.state is TransferState.STAGED
    member.desire(group=None, commit=kit.V1)
    member.send(ApplyDone("b1", 1), ResumeEnded("b1"))
    assert member.told.serving.version == kit.V1


def test_the_staged_is_given_back_when_nobody_names_it(member, kit):
    member.join().check().stage()
    assert member.desire(group=kit.group()) == [DropStaging(1)]
    assert member.told.transfer.state is TransferState.JOINED


def test_the_staged_makes_room_for_another_version(member, kit):
    member.join().check().stage()
    did = member.desire(group=kit.group(), wanted=kit.wanted(kit.V2))
    assert kinds(did) == [DropStaging, AllocateStaging]


def test_what_is_being_applied_is_not_given_back(member, kit):
    member.join().check().stage().commit()
    assert DropStaging not in kinds(member.desire(group=kit.group()))
    did = member.desire(group=kit.group(), wanted=kit.wanted(kit.V2))
    assert not {DropStaging, AllocateStaging} & set(kinds(did))
    did = member.send(ApplyDone("b1", 1), ResumeEnded("b1"))
    assert {DropStaging, AllocateStaging} <= set(kinds(did))


def test_a_transfer_that_began_ends_before_the_next(member, kit):
    member.join().check().receive()
    assert member.desire(group=kit.group(), wanted=kit.wanted(kit.V2)) == []
    did = member.send(ChildReceived(1, kit.digest(kit.V1)), ChildUnmapped(1))
    assert kinds(did) == [SealStaging], "nothing else is had as long as it may be mapped"
    did = member.send(StagingSealed(1), StagingAllocated(2))
    assert ReceiveVersion in kinds(did)
    assert [effect.wanted.version for effect in did if isinstance(effect, ReceiveVersion)] == [kit.V2]


def test_a_version_goes_round_once_in_a_group_but_in_each_group(member, kit):
    member.join().check().stage()
    assert member.desire(group=kit.group(), wanted=kit.wanted()) == []
    member.desire(group=kit.group(2), wanted=kit.wanted())
    did = member.send(ChildExited(1), ChildReady(2), StagingAllocated(2))
    assert kinds(did) == [OpenChild, DropStaging, AllocateStaging, ReceiveVersion]


def test_nothing_is_received_whose_manifest_is_unknown(member, kit):
    member.join()
    assert KillChild(1) in member.desire(group=kit.group(), wanted=kit.wanted())
    assert member.told.transfer.failure.code is FailureCode.MANIFEST_REFUSED


# ------------------------------------------------------------------------------------- the trainer


def rank_0(trainer, kit, **wants):
    trainer.desire(group=kit.group(rank=0, endpoint=""), **wants)
    trainer.send(ChildListening(1, "10.0.0.1:4711"), ChildReady(1))


def test_the_trainer_sends_what_it_is_told_to_send(trainer, kit):
    rank_0(trainer, kit)
    place = kit.group(rank=0, endpoint="10.0.0.1:4711")
    assert ExchangeManifest in kinds(trainer.desire(group=place, wanted=kit.wanted(phase=Phase.CHECK)))
    trainer.send(ManifestExchanged(1, kit.LAYOUT))
    assert (trainer.told.transfer.state, trainer.told.transfer.checked) == (TransferState.JOINED, kit.LAYOUT)
    (order,) = trainer.desire(group=place, wanted=kit.wanted())
    assert isinstance(order, SendVersion)
    trainer.send(ChildProgress(1, 500))
    assert (trainer.told.transfer.state, trainer.told.transfer.bytes) == (TransferState.SENDING, 500)
    trainer.send(ChildSent(1))
    told = trainer.told.transfer
    assert (told.state, told.version, told.bytes) == (TransferState.SENT, kit.V1, 1000)
    assert trainer.desire(group=place, wanted=kit.wanted()) == []
    trainer.desire(group=place)
    assert trainer.told.transfer.state is TransferState.JOINED


@pytest.mark.parametrize("phase", list(Phase))
def test_the_trainer_says_when_it_has_no_copy(trainer, kit, phase):
    rank_0(trainer, kit)
    trainer.send(SourceChanged(kit.published(kit.V2)))
    did = trainer.desire(group=kit.group(rank=0), wanted=kit.wanted(kit.V1, phase))
    assert not {SendVersion, ExchangeManifest, KillChild} & set(kinds(did))
    told = trainer.told.transfer
    assert (told.state, told.failure.code) == (TransferState.JOINED, FailureCode.VERSION_NOT_RETAINED)
    assert told.failure.version == kit.V1


def test_a_send_that_breaks_ends_the_epoch(trainer, kit):
    rank_0(trainer, kit)
    trainer.desire(group=kit.group(rank=0), wanted=kit.wanted())
    assert KillChild(1) in trainer.send(ChildFailed(1, FailureCode.PEER_LOST, "reset"))
    assert trainer.told.transfer.failure.version == kit.V1


def test_the_trainer_keeps_what_is_wanted_and_tells_the_fleet(trainer, kit):
    did = trainer.desire(wanted=kit.wanted(), retained_versions=3)
    assert [each for each in did if isinstance(each, (Pin, Retain))] == [Pin((kit.V1,)), Retain(3)]
    assert TellFleet in kinds(did)
    assert trainer.desire(wanted=kit.wanted(), retained_versions=3) == []
    assert trainer.desire(retained_versions=3) == [Pin(())]


def test_the_trainer_keeps_what_the_fleet_serves_however_many_failed_since(trainer, kit):
    served = Fleet(current=kit.V1)
    assert Pin((kit.V2, kit.V1)) in trainer.desire(wanted=kit.wanted(kit.V2), fleet=served)
    # The rollout failed: nothing is wanted, and the next ones fail as well.
    assert Pin((kit.V1,)) in trainer.desire(fleet=served)
    assert Pin((kit.V2,)) in trainer.desire(wanted=kit.wanted(kit.V2), fleet=Fleet(current=kit.V2))


def test_a_trainer_serves_nothing(trainer):
    assert trainer.told.serving is None
    assert trainer.told.ranks == 1
    assert trainer.told.source.run == "run"


def test_a_member_has_no_rank_before_its_engine_has_told_its_size(kit):
    bench = kit.Bench()
    assert bench.told.ranks == 0
    bench.send(EngineSeen("b1", 2))
    assert bench.told.ranks == 1
