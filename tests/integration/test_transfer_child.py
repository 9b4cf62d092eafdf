"""The children that move versions: real processes, real gloo, killed and stopped."""

import contextlib
import fcntl
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from transfer_ranks import (
    DIGEST,
    HOST,
    IMAGE,
    MANIFEST,
    SECONDS,
    Rank,
    memory,
    ranks,
    receive,
    send,
)

from weightsync_contract.messages import Mode
from weightsync_contract.reasons import FailureCode
from weightsync_engine.transfer import protocol
from weightsync_engine.transfer.process import ChildPool, ChildProcess


@pytest.mark.parametrize("mode", [Mode.PACKED, Mode.PER_TENSOR])
@pytest.mark.parametrize("members", [1, 2])
async def test_every_member_gets_the_manifest_and_the_image(members: int, mode: Mode) -> None:
    listing = MANIFEST.encode().decode()
    async with ranks(members + 1) as (first, *others):
        await first.tell(protocol.SendManifest(MANIFEST.layout, listing, SECONDS))
        for each in others:
            # A tree of ranks: none is served before all have asked.
            await each.tell(protocol.ReceiveManifest(SECONDS))
        for each in others:
            got = await each.until(protocol.ManifestReceived)
            assert (got.layout, got.data) == (MANIFEST.layout, listing)
        await first.until(protocol.ManifestSent)
        for _ in range(2):
            with contextlib.ExitStack() as stack:
                source = stack.enter_context(memory(IMAGE))
                targets = [stack.enter_context(memory()) for _ in others]
                for each, fd in zip(others, targets, strict=True):
                    await each.tell(protocol.Prepare(MANIFEST.nbytes, SECONDS), fd)
                    await each.until(protocol.Prepared)
                    await each.tell(receive(mode=mode, manifest=listing), fd)
                await first.tell(send(mode=mode, manifest=listing), source)
                for each, fd in zip(others, targets, strict=True):
                    assert (await each.until(protocol.Received)).digest == DIGEST
                    if mode is Mode.PACKED:
                        assert os.pread(fd, MANIFEST.nbytes, 0) == IMAGE
                await first.until(protocol.Sent)


@pytest.mark.parametrize("prepared", [True, False])
@pytest.mark.parametrize("verify", [True, False])
async def test_what_was_received_can_be_sealed_once_it_is_unmapped(prepared: bool, verify: bool) -> None:
    async with ranks(2) as (first, other):
        with memory(IMAGE) as source, memory() as target:
            if prepared:
                await other.tell(protocol.Prepare(MANIFEST.nbytes, SECONDS), target)
                await other.until(protocol.Prepared)
            await other.tell(receive(verify=verify), target)
            await first.tell(send(), source)
            await other.until(protocol.Received)
            await other.until(protocol.Unmapped)
            fcntl.fcntl(target, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
            with pytest.raises(PermissionError):
                os.pwrite(target, b"x", 0)


async def test_what_was_received_can_be_sealed_once_its_child_was_killed() -> None:
    async with ranks(2) as (first, other):
        with memory(IMAGE) as source, memory() as target:
            await other.tell(receive(), target)
            await first.tell(send(), source)
            assert (await other.until(protocol.Received)).digest == DIGEST
            other.child.kill()
            assert await other.child.wait() == -signal.SIGKILL
            fcntl.fcntl(target, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
            assert os.pread(target, MANIFEST.nbytes, 0) == IMAGE


async def test_without_verification_no_digest_is_taken() -> None:
    async with ranks(2) as (first, other):
        with memory(IMAGE) as source, memory() as target:
            await other.tell(receive(verify=False), target)
            await first.tell(send(), source)
            assert (await other.until(protocol.Received)).digest == ""


async def test_a_limited_sender_tells_its_progress_and_takes_its_time() -> None:
    async with ranks(2) as (first, other):
        with memory(IMAGE) as source, memory() as target:
            began = time.monotonic()
            await other.tell(receive(), target)
            await first.tell(send(limit_rate=5 << 20), source)
            seen = await other.until(protocol.Progress)
            assert 0 <= seen.bytes < MANIFEST.nbytes
            await other.until(protocol.Received)
            assert time.monotonic() - began > 0.8 * (MANIFEST.nbytes - (1 << 20)) / (5 << 20)


@pytest.mark.parametrize("victim", [0, 1])
async def test_a_peer_that_is_killed_is_told_to_the_others(victim: int) -> None:
    async with ranks(2) as children:
        with memory(IMAGE) as source, memory() as target:
            await children[1].tell(receive(), target)
            await children[0].tell(send(limit_rate=1 << 20), source)
            await children[1].until(protocol.Progress)
            os.kill(children[victim].child.pid, signal.SIGKILL)
            failed = await children[1 - victim].until(protocol.Failed)
            assert failed.code is FailureCode.PEER_LOST
            assert await children[1 - victim].child.wait() == 1


async def test_a_peer_that_stands_still_ends_at_the_deadline_and_a_fresh_child_works() -> None:
    async with ranks(2) as (first, other):
        with memory(IMAGE) as source, memory() as target:
            await other.tell(receive(seconds=2.0), target)
            await first.tell(send(limit_rate=1 << 20), source)
            await other.until(protocol.Progress)
            os.kill(first.child.pid, signal.SIGSTOP)
            try:
                failed = await other.until(protocol.Failed)
                assert failed.code is FailureCode.TRANSFER_TIMEOUT
                assert await other.child.wait() == 1
            finally:
                os.kill(first.child.pid, signal.SIGCONT)
    async with ranks(2, "again") as (first, other):
        with memory(IMAGE) as source, memory() as target:
            await other.tell(receive(), target)
            await first.tell(send(), source)
            assert (await other.until(protocol.Received)).digest == DIGEST


async def test_a_group_that_nobody_joins_ends_at_the_deadline() -> None:
    rank = Rank(await ChildProcess.spawn())
    await rank.until(protocol.Started)
    await rank.tell(protocol.Listen(HOST, 0, 2, "n", 1.0))
    await rank.until(protocol.Listening)
    failed = await rank.until(protocol.Failed)
    assert failed.code is FailureCode.JOIN_TIMEOUT
    assert "1 never came" in failed.message
    assert await rank.child.wait() == 1


async def test_a_command_out_of_place_is_a_failure_that_says_what_comes_first() -> None:
    rank = Rank(await ChildProcess.spawn())
    with memory(IMAGE) as source:
        await rank.tell(send(), source)
        failed = await rank.until(protocol.Failed)
    assert "Listen or Join comes first" in failed.message
    await rank.child.wait()


async def test_memory_that_cannot_be_had_is_said_before_a_byte_moves(tmp_path: Path) -> None:
    rank = Rank(await ChildProcess.spawn())
    fd = os.open(tmp_path / "read-only", os.O_RDONLY | os.O_CREAT)
    try:
        await rank.tell(protocol.Prepare(1 << 20, SECONDS), fd)
        assert (await rank.until(protocol.Failed)).code is FailureCode.STAGING_FAILED
    finally:
        os.close(fd)
        await rank.child.wait()


async def test_a_killed_child_is_gone_at_once_and_telling_it_more_is_an_error() -> None:
    child = await ChildProcess.spawn()
    child.kill()
    assert await child.wait() == -signal.SIGKILL
    assert not child.alive
    with pytest.raises(
        (BrokenPipeError, ConnectionResetError, OSError), match=r"Bad file descriptor|Broken pipe"
    ):
        await child.send(protocol.ReceiveManifest(1.0))


async def test_the_pool_gives_each_child_once_and_keeps_none_at_its_end() -> None:
    pool = ChildPool()
    first, second = await pool.take(), await pool.take()
    assert first.pid != second.pid
    await pool.close()
    for child in (first, second):
        assert child.alive
        child.kill()
        await child.wait()


async def test_a_spare_that_died_is_not_given() -> None:
    pool = ChildPool()
    first = await pool.take()
    await pool._making
    assert pool._spare is not None
    dead = pool._spare.pid
    os.kill(dead, signal.SIGKILL)
    await pool._spare._process.wait()
    second = await pool.take()
    assert second.pid != dead
    assert second.alive
    await pool.close()
    for child in (first, second):
        child.kill()
        await child.wait()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
async def test_a_child_that_can_not_use_nccl_says_what_is_missing_and_binds_nothing() -> None:
    child = Rank(await ChildProcess.spawn())
    try:
        await child.until(protocol.Started)
        await child.tell(protocol.Listen(HOST, 0, 2, "n", SECONDS, "NCCL"))
        failed = await child.until(protocol.Failed)
        assert failed.code is FailureCode.CHILD_FAILED
        assert "backend NCCL" in failed.message
        assert await child.child.wait() == 1
    finally:
        child.child.kill()
