"""How long a version takes from the trainer's copy into an engine's GPU memory, by the children that agents use.

A file in memory goes over NCCL into an arena that this process owns (``device``), or into a memory file of the
receiver's (``host``), each time with its digest; and a receiver is killed in mid-transfer, to see how soon all others
are free and a new group has the version. All ranks share one GPU.

    python benchmarks/device_path.py --gigabytes 2 --write NAME

It needs an NVIDIA GPU and NCCL 2.30 or newer.
"""

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import torch

from weightsync_engine.transfer import protocol
from weightsync_engine.transfer.cuda.ipc import OwnMemory
from weightsync_engine.transfer.process import ChildProcess

RESULTS = Path(__file__).parent / "results"
SECONDS = 120.0
LAYOUT = "sha256:bench"


class Rank:
    """A child, and what it says."""

    def __init__(self, child: ChildProcess) -> None:
        self.child = child
        self._events = child.events()

    async def until(self, *kinds: type[protocol.Event]) -> protocol.Event:
        """The next event of one of these kinds."""
        async with asyncio.timeout(SECONDS):
            async for event in self._events:
                if isinstance(event, kinds):
                    return event
                if isinstance(event, protocol.Failed):
                    raise RuntimeError(event)
        raise RuntimeError("a child ended")

    async def end(self) -> None:
        self.child.kill()
        await self.child.wait()


async def spawned(count: int) -> list[Rank]:
    children = [Rank(await ChildProcess.spawn()) for _ in range(count)]
    for each in children:
        await each.until(protocol.Started)
    return children


async def joined(children: list[Rank], nonce: str) -> None:
    first, *others = children
    await first.child.send(protocol.Listen("127.0.0.1", 0, len(children), nonce, SECONDS, "NCCL"))
    listening = await first.until(protocol.Listening)
    assert isinstance(listening, protocol.Listening)
    for rank, each in enumerate(others, 1):
        await each.child.send(protocol.Join(listening.endpoint, nonce, rank, len(children), SECONDS, "NCCL"))
    for each in children:
        await each.until(protocol.Ready)


async def told(
    group: list[Rank], source: int, places: list[int], nbytes: int, device: bool, rate: int = 0
) -> None:
    """Order a transfer to all."""
    await group[0].child.send(protocol.Send(nbytes, LAYOUT, 256 << 20, 3, SECONDS, rate), source)
    for each, place in zip(group[1:], places, strict=True):
        await each.child.send(protocol.Receive(nbytes, LAYOUT, 256 << 20, 3, SECONDS, device=device), place)


async def transferred(
    group: list[Rank], source: int, place: int, nbytes: int, device: bool
) -> tuple[float, str]:
    """One version, its memory prepared before; seconds until the digest is known."""
    await group[1].child.send(protocol.Prepare(nbytes, SECONDS, device), place)
    await group[1].until(protocol.Prepared)
    began = time.perf_counter()
    await told(group, source, [place], nbytes, device)
    received = await group[1].until(protocol.Received)
    seconds = time.perf_counter() - began
    await group[0].until(protocol.Sent)
    await group[1].until(protocol.Unmapped)
    assert isinstance(received, protocol.Received)
    return seconds, received.digest


@contextlib.asynccontextmanager
async def a_group(count: int, nonce: str) -> AsyncIterator[list[Rank]]:
    children = await spawned(count)
    try:
        await joined(children, nonce)
        yield children
    finally:
        for each in children:
            await each.end()


def memory(nbytes: int, fill: bool) -> int:
    fd = os.memfd_create("bench", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, nbytes)
    if fill:
        block = os.urandom(1 << 20)
        for at in range(0, nbytes, len(block)):
            os.pwrite(fd, at.to_bytes(8, "little") + block[8 : min(len(block), nbytes - at)], at)
    return fd


async def paths(nbytes: int, rounds: int) -> dict[str, object]:
    """Seconds of each path."""
    source, arena = memory(nbytes, True), OwnMemory(nbytes)
    place, host = arena.place().write(), memory(nbytes, False)
    found: dict[str, list[float]] = {"device": [], "host": []}
    digests = set()
    async with a_group(2, "paths") as group:
        for number in range(rounds + 1):
            for name, fd in (("device", place), ("host", host)):
                seconds, digest = await transferred(group, source, fd, nbytes, name == "device")
                digests.add(digest)
                if number:
                    found[name].append(seconds)
    assert len(digests) == 1, digests
    medians = {name: statistics.median(each) for name, each in found.items()}
    return {
        "milliseconds": {name: round(seconds * 1e3, 1) for name, seconds in medians.items()},
        "GB/s": {name: round(nbytes / seconds / 1e9, 1) for name, seconds in medians.items()},
        "rounds": {name: [round(seconds * 1e3, 1) for seconds in each] for name, each in found.items()},
    }


async def death(count: int, sockets: bool) -> dict[str, object]:
    """A receiver is killed in mid-transfer; those that are left are killed, and warm spares make the next group."""
    nbytes = 64 << 20
    source = memory(nbytes, True)
    more = {"NCCL_P2P_DISABLE": "1", "NCCL_SHM_DISABLE": "1"} if sockets else {}
    os.environ.update(more)
    try:
        spares = await spawned(count - 1 if count > 2 else 2)
        async with a_group(count, "first") as group:
            places = [memory(nbytes, False) for _ in group[1:]]
            await told(group, source, places, nbytes, False, nbytes // 10)
            while not getattr(await group[1].until(protocol.Progress), "bytes", 0):
                pass
            await group[-1].end()
            noticed = time.perf_counter()
            await asyncio.gather(*(each.end() for each in group[:-1]))
            free = time.perf_counter() - noticed
            await joined(spares, "second")
            again = time.perf_counter() - noticed
            places = [memory(nbytes, False) for _ in spares[1:]]
            await told(spares, source, places, nbytes, False)
            for each in spares[1:]:
                await each.until(protocol.Received)
            whole = time.perf_counter() - noticed
        for each in spares:
            await each.end()
    finally:
        for name in more:
            del os.environ[name]
    named = {"free": free, "joined again": again, "whole again": whole}
    return {"ranks": count, "sockets": sockets, **{name: round(value, 2) for name, value in named.items()}}


async def measure(arguments: argparse.Namespace) -> dict[str, object]:
    nbytes = int(arguments.gigabytes * 1e9) // 256 * 256
    result = {"gpu": torch.cuda.get_device_name(), "gigabytes": nbytes / 1e9}
    result["paths"] = await paths(nbytes, arguments.rounds)
    result["a receiver killed, seconds since it was noticed"] = [
        await death(count, sockets) for sockets in (False, True) for count in (2, 3, 6)
    ]
    return result


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--write", metavar="NAME", help="keep the result in benchmarks/results/NAME.json")
    arguments = parser.parse_args()
    os.environ["NCCL_MULTI_RANK_GPU_ENABLE"] = "1"
    result = asyncio.run(measure(arguments))
    print(json.dumps(result, indent=1))
    if arguments.write:
        (RESULTS / f"{arguments.write}.json").write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
