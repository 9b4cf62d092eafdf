"""Between the last byte and the seal: told as staged at once, applied only once sealed, waited for with a limit."""

import pytest

from weightsync_contract.messages import Phase, ServingState, TransferState
from weightsync_contract.reasons import FailureCode
from weightsync_engine.agent.core import wake_at
from weightsync_engine.agent.core.effects import (
    AllocateStaging,
    Apply,
    DropStaging,
    ExchangeManifest,
    KillChild,
    ReceiveVersion,
    SealStaging,
)
from weightsync_engine.agent.core.events import (
    ApplyDone,
    ChildExited,
    ChildFailed,
    ChildReady,
    ChildReceived,
    ChildUnmapped,
    EngineGone,
    ResumeEnded,
    StagingAllocated,
    StagingFailed,
    StagingSealed,
)
from weightsync_engine.agent.core.state import ABORT_SECONDS, SEAL_SECONDS, StagingState

MOMENT = 0.1


def kinds(effects):
    return [type(effect) for effect in effects]


@pytest.fixture
def received(member, kit):
    """A member that has every byte of version 1, and whose child still has the memory mapped."""
    member.join().check().receive()
    assert member.send(ChildReceived(1, kit.digest(kit.V1))) == []
    return member


# -------------------------------------------------------------------------------- told before sealed


def test_it_is_told_as_staged_before_it_is_sealed(received, kit):
    told = received.told.transfer
    assert (told.state, told.version, told.digest) == (TransferState.STAGED, kit.V1, kit.digest(kit.V1))
    assert (told.bytes, told.total_bytes, told.failure) == (1000, 1000, None)
    assert received.state.staging.state is StagingState.SEALING
    before = received.told
    assert received.send(ChildUnmapped(1)) == [SealStaging(1)]
    assert received.send(StagingSealed(1)) == []
    assert received.told == before, "that it is sealed now is nobody else's matter"


def test_a_commit_waits_for_the_seal_and_then_begins(received, kit):
    received.commit()
    assert received.told.serving.state is ServingState.INITIAL
    assert Apply not in kinds(received.send(ChildUnmapped(1)))
    assert received.told.serving.state is ServingState.INITIAL
    assert Apply in kinds(received.send(StagingSealed(1)))
    assert received.told.serving.state is ServingState.APPLYING
    received.send(ApplyDone("b1", 1), ResumeEnded("b1"))
    assert received.told.serving.version == kit.V1


def test_bytes_that_are_not_those_published_are_never_sealed(member, kit):
    member.join().check().receive()
    did = member.send(ChildReceived(1, "xxh3-128:other"), ChildUnmapped(1))
    did += member.later(600) + member.desire() + member.send(ChildExited(1))
    assert SealStaging not in kinds(did)
    assert DropStaging(1) in did


def test_only_the_child_that_has_it_mapped_can_say_that_it_has_not(received):
    assert received.send(ChildUnmapped(2), ChildExited(2)) == []
    assert received.send(ChildUnmapped(1)) == [SealStaging(1)]
    assert received.send(ChildUnmapped(1), StagingSealed(1), ChildUnmapped(1)) == []


def test_another_version_waits_for_the_seal(received, kit):
    assert received.desire(group=kit.group(), wanted=kit.wanted(kit.V2)) == []
    assert received.told.transfer.state is TransferState.RECEIVING
    assert received.send(ChildUnmapped(1)) == [SealStaging(1)]
    assert kinds(received.send(StagingSealed(1))) == [DropStaging, AllocateStaging]
    assert kinds(received.send(StagingAllocated(2))) == [ReceiveVersion]


# -------------------------------------------------------------------------- who dies unmaps as well


@pytest.mark.parametrize("first", [(), (ChildFailed(1, FailureCode.PEER_LOST, "reset"),)])
def test_a_child_that_ends_while_it_unmaps_leaves_memory_that_can_be_sealed(received, kit, first):
    assert SealStaging not in kinds(received.send(*first)), "it is not gone yet"
    assert SealStaging(1) in received.send(ChildExited(1, "signal 9"))
    told = received.told.transfer
    assert (told.state, told.version) == (TransferState.STAGED, kit.V1)
    received.send(StagingSealed(1))
    received.commit()
    assert received.told.serving.state is ServingState.APPLYING


def test_a_group_that_is_left_is_killed_and_what_it_brought_is_sealed_at_its_childs_end(received, kit):
    did = received.desire(group=None, wanted=kit.wanted())
    assert kinds(did) == [KillChild]
    assert (received.told.transfer.state, received.told.transfer.version) == (TransferState.ABORTING, kit.V1)
    assert received.send(ChildExited(1)) == [SealStaging(1)]
    received.send(StagingSealed(1))
    assert received.told.transfer.state is TransferState.STAGED


def test_a_child_that_ends_after_its_group_was_given_up_is_heard_still(received, kit):
    received.desire(group=None, wanted=kit.wanted())
    assert received.later(ABORT_SECONDS + MOMENT) == [], "the kernel may be unmapping for it"
    assert received.told.transfer.state is TransferState.STAGED
    assert received.send(ChildExited(1)) == [SealStaging(1)]


# ------------------------------------------------------------------------------------ its deadline


def test_a_child_that_never_unmaps_is_killed_and_then_it_is_sealed(received, kit):
    assert received.later(SEAL_SECONDS - MOMENT) == []
    assert received.later(2 * MOMENT) == [KillChild(1)]
    told = received.told.transfer
    assert (told.state, told.version) == (TransferState.ABORTING, kit.V1)
    assert (told.failure.code, told.failure.epoch) == (FailureCode.CHILD_FAILED, 1)
    assert "did not give up its memory" in told.failure.message
    assert received.send(ChildExited(1)) == [SealStaging(1)]
    received.send(StagingSealed(1))
    assert received.told.transfer.state is TransferState.STAGED
    received.commit()
    assert received.told.serving.state is ServingState.APPLYING


def test_a_child_that_can_not_even_be_killed_is_not_waited_for_for_ever(received):
    assert received.later(SEAL_SECONDS + MOMENT) == [KillChild(1)]
    assert received.later(SEAL_SECONDS - 2 * MOMENT) == []
    assert received.later(2 * MOMENT) == [SealStaging(1)], "whether it may be, the kernel knows"
    assert received.send(StagingFailed(1, "somebody still has it mapped")) == [DropStaging(1)]
    assert received.told.transfer.version is None
    assert wake_at(received.state, received.now) is None


def test_a_child_that_is_killed_late_still_gets_its_time_to_end(received, kit):
    received.later(SEAL_SECONDS - MOMENT)
    assert received.desire(group=None, wanted=kit.wanted()) == [KillChild(1)]
    assert received.later(SEAL_SECONDS - MOMENT) == []
    assert received.later(2 * MOMENT) == [SealStaging(1)]


def test_large_memory_may_take_longer(member, kit):
    wanted = kit.replace(kit.wanted(), total_bytes=140 * 10**9)
    member.join().check()
    member.desire(group=kit.group(), wanted=wanted)
    member.send(StagingAllocated(2), ChildReceived(1, kit.digest(kit.V1)))
    assert member.later(SEAL_SECONDS + 140 - MOMENT) == []
    assert member.later(2 * MOMENT) == [KillChild(1)]


# ------------------------------------------------------------------------------- a seal that fails


def test_a_seal_that_fails_is_a_decline_and_no_commit_ever_begins(received, kit):
    received.commit()
    received.send(ChildUnmapped(1))
    did = received.send(StagingFailed(1, "somebody still has it mapped"))
    assert kinds(did) == [DropStaging]
    told = received.told
    assert (told.transfer.state, told.transfer.version) == (TransferState.JOINED, None)
    assert (told.transfer.failure.code, told.transfer.failure.version) == (
        FailureCode.STAGING_FAILED,
        kit.V1,
    )
    assert told.serving.state is ServingState.INITIAL
    assert Apply not in kinds(received.later(600))


def test_a_seal_that_fails_does_not_disturb_what_goes_on_in_the_same_group(received, kit):
    another = kit.wanted(kit.V2, Phase.CHECK, "sha256:another")
    assert kinds(received.desire(group=kit.group(), wanted=another)) == [ExchangeManifest]
    received.send(ChildUnmapped(1))
    assert received.send(StagingFailed(1, "somebody still has it mapped")) == [DropStaging(1)]
    assert received.told.transfer.state is TransferState.CHECKING
    assert received.told.transfer.failure is None


def test_a_failed_seal_of_a_group_before_is_not_blamed_on_this_one(received, kit):
    received.desire(group=kit.group(2))
    assert SealStaging(1) in received.send(ChildExited(1))
    received.send(ChildReady(2))
    assert received.send(StagingFailed(1, "somebody still has it mapped")) == [DropStaging(1)]
    assert received.told.transfer.state is TransferState.JOINED
    assert received.told.transfer.failure is None


def test_an_engine_that_is_gone_changes_nothing_about_the_seal(received):
    assert received.send(EngineGone()) == []
    assert received.send(ChildUnmapped(1)) == [SealStaging(1)]
