"""Versions that are received into the engine's own memory: it is theirs, and gone with their boot."""

from contextlib import closing
from pathlib import Path

import pytest

from weightsync_contract.messages import Staging, TransferState, Transport
from weightsync_contract.reasons import FailureCode
from weightsync_engine.agent.core.effects import (
    AllocateStaging,
    DropStaging,
    KillChild,
    ReceiveVersion,
)
from weightsync_engine.agent.core.events import ChildProgress, EngineSeen
from weightsync_engine.agent.staging import StagingArea
from weightsync_engine.transfer.cuda.place import Place

DEVICE = Transport(backend="NCCL", staging=Staging.DEVICE)


def of(kind, effects):
    return [effect for effect in effects if isinstance(effect, kind)]


@pytest.fixture
def receiving(member, kit):
    """A member whose engine's memory is being received into."""
    member.join().check(transport=DEVICE)
    (order,) = of(AllocateStaging, member.did)
    assert order.device, "memory of the engine's own is asked for"
    (order,) = of(ReceiveVersion, member.desire(group=kit.group(), wanted=kit.wanted(), transport=DEVICE))
    assert order.transport.staging is Staging.DEVICE
    member.send(ChildProgress(1, 400))
    return member


def test_another_boot_of_the_engine_ends_the_transfer_with_its_reason(receiving, kit):
    did = receiving.send(EngineSeen("b2", 1))
    assert of(DropStaging, did)
    assert of(KillChild, did), "nobody may go on writing to memory that was another engine's"
    told = receiving.told.transfer
    assert told.failure.code is FailureCode.STAGING_FAILED
    assert "the engine restarted" in told.failure.message


def test_the_same_boot_seen_again_changes_nothing(receiving, kit):
    assert not receiving.send(EngineSeen("b1", 1))
    assert receiving.told.transfer.state is TransferState.RECEIVING


def test_memory_of_the_other_kind_is_given_back_and_had_anew(member, kit):
    member.join().check()
    did = member.desire(group=kit.group(), wanted=kit.wanted(), transport=DEVICE)
    assert of(DropStaging, did)
    (order,) = of(AllocateStaging, did)
    assert order.device
    assert not of(ReceiveVersion, did)


def test_a_descriptor_that_comes_after_its_slot_was_dropped_is_closed():
    place = Place("00", 10, "GPU-1")
    with closing(StagingArea()) as area:
        area.drop(1)
        late = place.write()
        assert not area.adopt(1, late)
        assert not Path(f"/proc/self/fd/{late}").exists()
        fd = place.write()
        assert area.adopt(2, fd)
        area.seal(2)
        assert Place.read(area.fd(2)) == place
        area.drop(2)
        assert not Path(f"/proc/self/fd/{fd}").exists()
