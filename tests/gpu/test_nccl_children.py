"""Real children in a real NCCL group: what they receive, and how soon the others are free when one dies."""

import asyncio
import contextlib
import time

import pytest
from transfer_ranks import DIGEST, IMAGE, MANIFEST, SECONDS, Rank, memory, ranks, receive, send

from weightsync_contract.messages import Mode
from weightsync_engine.transfer import protocol

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(180)]

FREE_SECONDS = 1.2
"""From the notice that a peer is dead until a killed child's GPU is free for the next."""
AGAIN_SECONDS = 10.0
"""Until a new group has the version; a child's import of torch and CUDA's start are in it."""


async def transfer(group: list[Rank], **changes: object) -> list[str]:
    """Send the image from rank 0 to all; the members' digests."""
    with contextlib.ExitStack() as stack:
        source = stack.enter_context(memory(IMAGE))
        places = [stack.enter_context(memory()) for _ in group[1:]]
        for rank, place in zip(group[1:], places, strict=True):
            await rank.tell(protocol.Prepare(MANIFEST.nbytes, SECONDS), place)
            await rank.until(protocol.Prepared)
        await group[0].tell(send(**changes), source)
        for rank, place in zip(group[1:], places, strict=True):
            await rank.tell(receive(**changes), place)
        found = [(await rank.until(protocol.Received)).digest for rank in group[1:]]
        for rank in group[1:]:
            await rank.until(protocol.Unmapped)
        await group[0].until(protocol.Sent)
        return found


@pytest.mark.parametrize("count", [2, 3])
async def test_every_member_gets_the_image(count: int) -> None:
    async with ranks(count, backend="NCCL") as group:
        for _ in range(3):
            assert await transfer(group) == [DIGEST] * (count - 1)


async def test_one_tensor_at_a_time_too() -> None:
    listing = MANIFEST.encode().decode()
    async with ranks(2, backend="NCCL") as group:
        assert await transfer(group, mode=Mode.PER_TENSOR, manifest=listing) == [DIGEST]


async def test_the_manifest_goes_round() -> None:
    async with ranks(2, backend="NCCL") as (first, other):
        data = MANIFEST.encode().decode()
        await first.tell(protocol.SendManifest(MANIFEST.layout, data, SECONDS))
        await other.tell(protocol.ReceiveManifest(SECONDS))
        assert (await other.until(protocol.ManifestReceived)).layout == MANIFEST.layout
        await first.until(protocol.ManifestSent)


@pytest.mark.parametrize("count", [2, 3])
async def test_when_a_receiver_dies_the_others_are_killed_and_a_new_group_goes_on(count: int) -> None:
    async with ranks(count, nonce="first", backend="NCCL") as group:
        with contextlib.ExitStack() as stack:
            source = stack.enter_context(memory(IMAGE))
            places = [stack.enter_context(memory()) for _ in group[1:]]
            # Slow, so that there is a middle.
            await group[0].tell(send(limit_rate=MANIFEST.nbytes // 20), source)
            for rank, place in zip(group[1:], places, strict=True):
                await rank.tell(receive(), place)
            async with asyncio.timeout(SECONDS):
                while not (await group[1].until(protocol.Progress)).bytes:
                    pass
            group[-1].child.kill()
            await group[-1].child.wait()
            noticed = time.monotonic()
            for rank in group[:-1]:
                rank.child.kill()
                await rank.child.wait()
            free = time.monotonic() - noticed
    began = time.monotonic()
    async with ranks(max(count - 1, 2), nonce="second", backend="NCCL") as group:
        joined = time.monotonic() - began
        assert set(await transfer(group)) == {DIGEST}
        again = time.monotonic() - began
    print(f"free after {free:.2f} s, joined {joined:.2f} s, whole again after {again:.2f} s")
    assert free < FREE_SECONDS
    assert again < AGAIN_SECONDS


async def test_who_does_not_come_is_named_and_nothing_hangs() -> None:
    with pytest.raises(AssertionError, match="2 never came"):
        async with asyncio.timeout(SECONDS):
            await join_two_of_three()


async def join_two_of_three() -> None:
    from weightsync_engine.transfer.process import ChildProcess

    children = [Rank(await ChildProcess.spawn()) for _ in range(2)]
    try:
        for each in children:
            await each.until(protocol.Started)
        await children[0].tell(protocol.Listen("127.0.0.1", 0, 3, "n", 3.0, "NCCL"))
        endpoint = (await children[0].until(protocol.Listening)).endpoint
        await children[1].tell(protocol.Join(endpoint, "n", 1, 3, 3.0, "NCCL"))
        await children[0].until(protocol.Ready)
    finally:
        for each in children:
            each.child.kill()
            await each.child.wait()
