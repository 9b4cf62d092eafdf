"""How fast a version goes through the agents' children on the Host path, against a bare gloo broadcast.

    .venv/bin/python benchmarks/host_path.py [--megabytes 380] [--members 1] [--rounds 9] [--write]

Real children, real gloo on loopback, real descriptors: from the commands to ``Received``, the digest and all
that a process has to do beside moving bytes included; the memory is fresh each time, and prepared before, as
in phase Check, unless it says otherwise. ``until unmapped`` is when the memory can be sealed: a version counts as
staged before, but is not applied before. The bare broadcasts (torch.distributed's own API, one
tensor as a whole, and the same in pieces, which is faster or slower with the machine) run in the same minutes
in processes of their own; every round has each of them once, in turn. The ratio is taken against the faster
one. What large pages for shared memory do is shown by running it twice, with ``never`` and with ``advise`` in
/sys/kernel/mm/transparent_hugepage/shmem_enabled. One JSON object goes to standard output; ``--write`` also puts
it under benchmarks/results/.
"""

import argparse
import asyncio
import contextlib
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

from weightsync_contract.manifest import aligned
from weightsync_engine.digest import digest_image
from weightsync_engine.transfer import protocol
from weightsync_engine.transfer.process import ChildProcess

RESULTS = Path(__file__).parent / "results"
SHARED_PAGES = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
HOST = "127.0.0.1"
LAYOUT = "sha256:" + "0" * 64
SECONDS = 120.0
BUFFER_BYTES = 256 << 20
NUM_BUFFERS = 3
BARE_PIECE_BYTES = 16 << 20


# ------------------------------------------------------------------------------------------- bare gloo


def bare_rank(rank: int, world_size: int, port: int, nbytes: int) -> None:
    """A process of the bare group: one broadcast a line, answered with its seconds."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://{HOST}:{port}", rank=rank, world_size=world_size)
    tensor = torch.full((nbytes,), 1 if rank == 0 else 0, dtype=torch.uint8)
    print("ready", flush=True)
    for line in sys.stdin:
        dist.barrier()
        began = time.perf_counter()
        if line.strip() == "whole":
            dist.broadcast(tensor, 0)
        else:
            flying = []
            for piece in tensor.split(BARE_PIECE_BYTES):
                if len(flying) == NUM_BUFFERS:
                    flying.pop(0).wait()
                flying.append(dist.broadcast(piece, 0, async_op=True))
            for work in flying:
                work.wait()
        print(time.perf_counter() - began, flush=True)
    dist.destroy_process_group()


class BareGroup:
    """Processes that do nothing but broadcast."""

    def __init__(self, members: int, nbytes: int) -> None:
        with socket.socket() as probe:
            probe.bind((HOST, 0))
            port = probe.getsockname()[1]
        self._processes = [
            subprocess.Popen(
                [sys.executable, __file__, "--bare", f"{rank},{members + 1},{port},{nbytes}"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            for rank in range(members + 1)
        ]
        for each in self._processes:
            self._line(each)

    def broadcast(self, how: str) -> float:
        """Seconds until the last member had it all."""
        for each in self._processes:
            assert each.stdin
            each.stdin.write(how + "\n")
            each.stdin.flush()
        return max([float(self._line(each)) for each in self._processes][1:])

    def close(self) -> None:
        for each in self._processes:
            assert each.stdin
            each.stdin.close()
        for each in self._processes:
            each.wait(SECONDS)

    @staticmethod
    def _line(process: "subprocess.Popen[str]") -> str:
        assert process.stdout
        line = process.stdout.readline()
        if not line:
            raise SystemExit("a process of the bare group ended")
        return line


# -------------------------------------------------------------------------------------- our own children


class Rank:
    """A child and what it says."""

    def __init__(self, child: ChildProcess) -> None:
        self.child, self._events = child, child.events()

    async def until(self, kind: type[Any]) -> Any:
        async for event in self._events:
            if isinstance(event, kind):
                return event
            if isinstance(event, protocol.Failed):
                raise SystemExit(f"a child failed: {event}")
        raise SystemExit("a child ended")


@contextlib.asynccontextmanager
async def group(members: int) -> AsyncIterator[list[Rank]]:
    ranks = [Rank(await ChildProcess.spawn()) for _ in range(members + 1)]
    try:
        await ranks[0].child.send(protocol.Listen(HOST, 0, members + 1, "n", SECONDS))
        endpoint = (await ranks[0].until(protocol.Listening)).endpoint
        for number, each in enumerate(ranks[1:], 1):
            await each.child.send(protocol.Join(endpoint, "n", number, members + 1, SECONDS))
        for each in ranks:
            await each.until(protocol.Ready)
        yield ranks
    finally:
        for each in ranks:
            each.child.kill()
            await each.child.wait()


@contextlib.contextmanager
def memory(nbytes: int) -> Iterator[int]:
    fd = os.memfd_create("benchmark", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, nbytes)
        yield fd
    finally:
        os.close(fd)


async def transfer(
    ranks: list[Rank], source: int, nbytes: int, digest: str, prepared: bool, verify: bool
) -> tuple[float, float]:
    """Seconds from the commands until the last member's ``Received``, and until the last ``Unmapped``.

    Each time into fresh memory.
    """
    first, *others = ranks
    with contextlib.ExitStack() as stack:
        targets = [stack.enter_context(memory(nbytes)) for _ in others]
        if prepared:
            for each, fd in zip(others, targets, strict=True):
                await each.child.send(protocol.Prepare(nbytes, SECONDS), fd)
                await each.until(protocol.Prepared)
        began = time.perf_counter()
        for each, fd in zip(others, targets, strict=True):
            await each.child.send(
                protocol.Receive(nbytes, LAYOUT, BUFFER_BYTES, NUM_BUFFERS, SECONDS, verify=verify), fd
            )
        await first.child.send(protocol.Send(nbytes, LAYOUT, BUFFER_BYTES, NUM_BUFFERS, SECONDS), source)
        received = [await each.until(protocol.Received) for each in others]
        took = time.perf_counter() - began
        for each in others:
            await each.until(protocol.Unmapped)
        unmapped = time.perf_counter() - began
        await first.until(protocol.Sent)
    if verify and any(each.digest != digest for each in received):
        raise SystemExit("a member has other bytes than were sent")
    return took, unmapped


# ------------------------------------------------------------------------------------------ both in turn


def large_shared_pages() -> str:
    """The one in brackets of ``always within_size advise [never] deny force``; empty where the kernel has none."""
    try:
        return SHARED_PAGES.read_text().partition("[")[2].partition("]")[0]
    except OSError:
        return ""


def summary(values: list[float]) -> dict[str, float]:
    return {
        "least": round(min(values), 4),
        "median": round(statistics.median(values), 4),
        "most": round(max(values), 4),
    }


Way = Callable[[], Coroutine[Any, Any, dict[str, float]]]


async def measure(nbytes: int, members: int, rounds: int) -> dict[str, list[float]]:
    bare = await asyncio.to_thread(BareGroup, members, nbytes)
    content = os.urandom(1 << 20) * (nbytes // (1 << 20) + 1)
    # A file as the trainer's agent keeps it, in the page cache.
    with tempfile.TemporaryFile() as kept:
        source = kept.fileno()
        kept.write(memoryview(content)[:nbytes])
        kept.flush()
        digest = digest_image(LAYOUT, memoryview(content)[:nbytes])
        del content
        async with group(members) as ranks:

            def ours(name: str, prepared: bool, verify: bool) -> Way:
                async def once() -> dict[str, float]:
                    received, unmapped = await transfer(ranks, source, nbytes, digest, prepared, verify)
                    return {name: received, f"{name}, until unmapped": unmapped}

                return once

            def theirs(how: str) -> Way:
                async def once() -> dict[str, float]:
                    return {f"bare gloo, {how}": await asyncio.to_thread(bare.broadcast, how)}

                return once

            ways = (
                theirs("whole"),
                ours("children", prepared=True, verify=True),
                theirs("pieces"),
                ours("children, no digest", prepared=True, verify=False),
                ours("children, memory not prepared", prepared=False, verify=True),
            )
            took: dict[str, list[float]] = {}
            for number in range(rounds + 1):
                for way in ways:
                    for name, seconds in (await way()).items():
                        if number:  # the first round warms up: connections, page tables, code
                            took.setdefault(name, []).append(seconds)
    await asyncio.to_thread(bare.close)
    return took


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=int, default=380)
    parser.add_argument("--members", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--write", action="store_true", help="write the result to benchmarks/results/ too")
    parser.add_argument("--bare", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.bare:
        rank, world_size, port, nbytes = map(int, given.bare.split(","))
        bare_rank(rank, world_size, port, nbytes)
        return
    nbytes = aligned(given.megabytes * 10**6)
    load = os.getloadavg()[0]
    took = asyncio.run(measure(nbytes, given.members, given.rounds))
    medians = {name: statistics.median(each) for name, each in took.items()}
    best = min(medians["bare gloo, whole"], medians["bare gloo, pieces"])
    result = {
        "benchmark": "host_path",
        "bytes": nbytes,
        "members": given.members,
        "rounds": given.rounds,
        "of_bare_gloo": round(best / medians["children"], 3),
        "of_bare_gloo_without_digest": round(best / medians["children, no digest"], 3),
        "gigabytes_a_second": {name: round(nbytes / each / 1e9, 2) for name, each in medians.items()},
        "seconds": {name: summary(each) for name, each in took.items()},
        "raw_seconds": {name: [round(value, 4) for value in each] for name, each in took.items()},
        "load_average_before": load,
        "large_shared_pages": large_shared_pages(),
        "machine": {
            "cpus": len(os.sched_getaffinity(0)),
            "python": platform.python_version(),
            "system": platform.platform(),
        },
    }
    print(json.dumps(result))
    if given.write:
        path = RESULTS / f"host_path-{large_shared_pages() or 'never'}.json"
        path.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
