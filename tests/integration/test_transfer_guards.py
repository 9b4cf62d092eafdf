"""What keeps children from moving the wrong bytes, from hanging and from staying behind."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
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
from weightsync_demo.waiting import wait_for
from weightsync_engine.digest import digest_image
from weightsync_engine.transfer import protocol
from weightsync_engine.transfer.process import ChildProcess


async def test_a_receiver_may_wait_longer_for_its_sender_than_the_group_took_to_meet() -> None:
    async with ranks(2, seconds=2.0) as (first, other):
        with memory(IMAGE) as source, memory() as target:
            await other.tell(receive(), target)
            # Longer than the group had, with what gloo gets on top.
            await asyncio.sleep(8.0)
            await first.tell(send(), source)
            assert (await other.until(protocol.Received)).digest == DIGEST


@pytest.mark.parametrize(
    ("there", "here", "message"),
    [
        ({"version": "r/2"}, {"version": "r/1"}, "version is 'r/2' there and 'r/1' here"),
        ({"layout": "sha256:b"}, {"layout": "sha256:a"}, "layout is 'sha256:b' there and 'sha256:a' here"),
        ({"nbytes": 256}, {}, f"nbytes is 256 there and {MANIFEST.nbytes} here"),
        ({}, {"mode": Mode.PER_TENSOR}, "mode is 'Packed' there and 'PerTensor' here"),
    ],
)
async def test_ranks_that_were_told_different_things_find_out_before_a_byte_moves(
    there: dict[str, object], here: dict[str, object], message: str
) -> None:
    listing = MANIFEST.encode().decode()
    async with ranks(2) as (first, other):
        with memory(IMAGE) as source, memory() as target:
            await other.tell(receive(manifest=listing, verify=False, **here), target)
            await first.tell(send(manifest=listing, **there), source)
            failed = await other.until(protocol.Failed)
            assert message in failed.message
            assert os.pread(target, MANIFEST.nbytes, 0) == bytes(MANIFEST.nbytes)


async def test_a_manifest_is_no_image() -> None:
    async with ranks(2) as (first, other):
        with memory() as target:
            await other.tell(receive(verify=False), target)
            await first.tell(protocol.SendManifest(MANIFEST.layout, MANIFEST.encode().decode(), SECONDS))
            assert "what is 'manifest' there and 'image' here" in (await other.until(protocol.Failed)).message


async def test_members_follow_the_pieces_that_rank_0_cuts() -> None:
    async with ranks(2) as (first, other):
        with memory(IMAGE) as source, memory() as target:
            await other.tell(receive(buffer_bytes=1 << 20, num_buffers=1), target)
            await first.tell(send(buffer_bytes=300_000, num_buffers=4), source)
            assert (await other.until(protocol.Received)).digest == DIGEST
            assert os.pread(target, MANIFEST.nbytes, 0) == IMAGE


@pytest.mark.parametrize("nbytes", [256, (1 << 20) - 256, 1 << 20, (1 << 20) + 256])
async def test_images_of_any_length(nbytes: int) -> None:
    async with ranks(4) as (first, *others):
        with memory(IMAGE) as source, memory() as one, memory() as two, memory() as three:
            for each, fd in zip(others, (one, two, three), strict=True):
                await each.tell(receive(nbytes=nbytes), fd)
            await first.tell(send(nbytes=nbytes), source)
            for each, fd in zip(others, (one, two, three), strict=True):
                digest = (await each.until(protocol.Received)).digest
                assert digest == digest_image(MANIFEST.layout, IMAGE[:nbytes])
                assert os.pread(fd, nbytes, 0) == IMAGE[:nbytes]


async def test_what_was_prepared_for_another_file_is_not_used() -> None:
    async with ranks(2) as (first, other):
        with memory(IMAGE) as source, memory() as prepared, memory() as target:
            await other.tell(protocol.Prepare(MANIFEST.nbytes, SECONDS), prepared)
            await other.until(protocol.Prepared)
            await other.tell(receive(), target)
            await first.tell(send(), source)
            assert (await other.until(protocol.Received)).digest == DIGEST
            assert os.pread(target, MANIFEST.nbytes, 0) == IMAGE
            assert os.pread(prepared, MANIFEST.nbytes, 0) == bytes(MANIFEST.nbytes)


async def test_preparing_has_all_memory() -> None:
    rank = Rank(await ChildProcess.spawn())
    try:
        with memory() as target:
            assert os.fstat(target).st_blocks == 0
            await rank.tell(protocol.Prepare(MANIFEST.nbytes, SECONDS), target)
            await rank.until(protocol.Prepared)
            assert os.fstat(target).st_blocks * 512 >= MANIFEST.nbytes
    finally:
        rank.child.kill()
        await rank.child.wait()


async def test_a_rank_that_is_taken_is_refused() -> None:
    # A third rank is missing, so that the first two are still waiting when it comes.
    children = [Rank(await ChildProcess.spawn()) for _ in range(3)]
    first, second, third = children
    try:
        await first.tell(protocol.Listen(HOST, 0, 3, "n", SECONDS))
        endpoint = (await first.until(protocol.Listening)).endpoint
        await second.tell(protocol.Join(endpoint, "n", 1, 3, 4.0))
        await third.tell(protocol.Join(endpoint, "n", 1, 3, 4.0))
        tasks = [asyncio.create_task(each.until(protocol.Failed)) for each in (second, third)]
        failures = await asyncio.gather(*tasks)
        assert sum("is rank 1 of this group already" in each.message for each in failures) == 1
        assert sum("2 never came" in each.message for each in failures) == 1
    finally:
        for each in children:
            each.child.kill()
            await each.child.wait()


async def test_a_child_that_its_parent_kills_in_mid_transfer_is_gone_at_once() -> None:
    async with ranks(2) as (first, other):
        with memory(IMAGE) as source, memory() as target:
            await other.tell(receive(), target)
            await first.tell(send(limit_rate=1 << 20), source)
            await other.until(protocol.Progress)
            began = time.monotonic()
            other.child.kill()
            assert await other.child.wait() == -signal.SIGKILL
            assert time.monotonic() - began < 1.0
            assert (await first.until(protocol.Failed)).code is FailureCode.PEER_LOST
            assert time.monotonic() - began < 3.0


def ended(pid: int) -> bool:
    """Whether it runs no more; who reaps it is not our matter."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "in a call that does not return"])
def test_a_child_ends_within_a_second_with_a_parent_that_was_killed(busy: bool) -> None:
    code = f"""
        import asyncio
        from weightsync_engine.transfer import protocol
        from weightsync_engine.transfer.process import ChildProcess
        async def main():
            child = await ChildProcess.spawn()
            events = child.events()
            await anext(events)
            if {busy}:
                await child.send(protocol.Listen("{HOST}", 0, 2, "n", 600.0))
                await anext(events)
            print(child.pid, flush=True)
            await asyncio.sleep(600)
        asyncio.run(main())
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        os.kill(parent.pid, signal.SIGKILL)
        began = time.monotonic()
        parent.wait(10)
        wait_for(lambda: ended(pid), 5, "the child to end with its parent")
        assert time.monotonic() - began < 1.0


def test_received_is_said_before_it_is_unmapped_and_no_deadline_of_the_transfer_ends_that() -> None:
    """Memory that takes longer to give up than the transfer may take, as a fake: the child goes on after it."""
    code = """
        import socket, sys, time
        from weightsync_engine.transfer import protocol
        from weightsync_engine.transfer.child import Child
        class Slow:
            def close(self):
                time.sleep(1.5)
        class QuickChild(Child):
            def _receive(self, command, fd):
                self._filled = Slow()
                self.say(protocol.Received("digest"))
        QuickChild(socket.socket(fileno=int(sys.argv[1]))).run()
    """
    ours, theirs = socket.socketpair()
    with ours, theirs, memory() as target:
        command = [sys.executable, "-c", textwrap.dedent(code), str(theirs.fileno())]
        with subprocess.Popen(command, pass_fds=(theirs.fileno(),)) as process:
            theirs.close()
            ours.settimeout(SECONDS)
            lines = ours.makefile("rb")
            try:
                assert protocol.decode_event(lines.readline()) == protocol.Started()
                socket.send_fds(ours, [protocol.encode(receive(seconds=0.2))], [target])
                assert protocol.decode_event(lines.readline()) == protocol.Received("digest")
                began = time.monotonic()
                assert protocol.decode_event(lines.readline()) == protocol.Unmapped()
                assert time.monotonic() - began > 1.0
            finally:
                ours.shutdown(socket.SHUT_RDWR)
                lines.close()
            assert process.wait(5) == 0


def test_a_call_that_hangs_is_ended_by_the_timer_and_said() -> None:
    """The one fake here: a command that never returns stands in for a hang inside of torch."""
    code = """
        import socket, sys, time
        from weightsync_engine.transfer.child import Child
        class HangingChild(Child):
            def _do(self, command, fd):
                time.sleep(600)
        HangingChild(socket.socket(fileno=int(sys.argv[1]))).run()
    """
    ours, theirs = socket.socketpair()
    with ours, theirs:
        command = [sys.executable, "-c", textwrap.dedent(code), str(theirs.fileno())]
        with subprocess.Popen(command, pass_fds=(theirs.fileno(),)) as process:
            theirs.close()
            ours.settimeout(SECONDS)
            lines = ours.makefile("rb")
            assert protocol.decode_event(lines.readline()) == protocol.Started()
            ours.sendall(protocol.encode(protocol.ReceiveManifest(0.2)))
            failed = protocol.decode_event(lines.readline())
            assert isinstance(failed, protocol.Failed)
            assert failed.code is FailureCode.TRANSFER_TIMEOUT
            assert "ReceiveManifest was not done within 0.2 s" in failed.message
            assert process.wait(5) == 1
            lines.close()
