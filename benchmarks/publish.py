"""How fast ``publish`` hands a model's float32 tensors to the agent, against a plain copy of the same bytes.

    .venv/bin/python benchmarks/publish.py [--megabytes 380] [--tensors 200] [--rounds 9] [--write]

A trainer process with torch tensors, an agent's publish server and store in a process of its own, real sockets,
everything that a publish does: checks, copy into the agent's file, digest, flushed descriptions. In each round, in
turn: publish; the same bytes written by the trainer itself to a new file beside the agent's (``file``, the least that
keeping a copy there takes); copied into memory that is fresh from the kernel (``fresh``); and into memory that was
written before (``warm``). The store is in /dev/shm where that is, as it is when a pod's state directory is in memory,
and once more under the temporary directory (``disk``). One JSON object goes to standard output; ``--write`` also puts
it under benchmarks/results/.
"""

import argparse
import asyncio
import datetime
import json
import mmap
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from weightsync_engine.client import publish
from weightsync_engine.publish.server import PublishServer
from weightsync_engine.publish.store import VersionStore

RESULTS = Path(__file__).parent / "results"


async def serve(directory: Path) -> None:
    """The agent's side, until standard input ends."""
    server = PublishServer(directory / "publish.sock", VersionStore(directory / "versions"))
    await server.start()
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await server.close()


def copied(tensors: dict[str, torch.Tensor], target: memoryview) -> float:
    """Seconds to copy all tensors one behind the other."""
    flat = torch.frombuffer(target, dtype=torch.float32)
    began = time.perf_counter()
    at = 0
    for tensor in tensors.values():
        flat[at : at + tensor.numel()].copy_(tensor)
        at += tensor.numel()
    return time.perf_counter() - began


def written(tensors: dict[str, torch.Tensor], path: Path) -> float:
    """Seconds to write all tensors to a new file; it is removed again off the clock."""
    began = time.perf_counter()
    with path.open("xb", buffering=0) as file:
        for tensor in tensors.values():
            file.write(memoryview(tensor.numpy()))
    took = time.perf_counter() - began
    path.unlink()
    return took


def measure(directory: Path, tensors: dict[str, torch.Tensor], rounds: int) -> dict[str, list[float]]:
    """Seconds of each way in each round, after one round that is not counted."""
    seconds: dict[str, list[float]] = {"publish": [], "file": [], "fresh": [], "warm": []}
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    warm = memoryview(bytearray(nbytes))
    command = [sys.executable, __file__, "--serve", str(directory)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as agent:
        assert agent.stdout is not None
        assert agent.stdout.readline() == "ready\n"
        for number in range(rounds + 1):
            began = time.perf_counter()
            publish(tensors, number, run="benchmark", socket=directory / "publish.sock")
            took = (
                time.perf_counter() - began,
                written(tensors, directory / "file"),
                copied(tensors, memoryview(mmap.mmap(-1, nbytes))),
                copied(tensors, warm),
            )
            if number:
                for each, value in zip(seconds.values(), took, strict=True):
                    each.append(value)
        agent.communicate(timeout=30)
    return seconds


def summary(nbytes: int, seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Rates in GB/s by the median, and ratios round by round."""
    rates = {name: nbytes / statistics.median(values) / 1e9 for name, values in seconds.items()}
    ratios = {
        name: statistics.median(other / took for other, took in zip(values, seconds["publish"], strict=True))
        for name, values in seconds.items()
        if name != "publish"
    }
    return {
        "gigabytes_per_second": {name: round(rate, 2) for name, rate in rates.items()},
        "publish_rate_to_that_of": {name: round(ratio, 3) for name, ratio in ratios.items()},
        "seconds": {name: [round(value, 4) for value in values] for name, values in seconds.items()},
    }


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=int, default=380)
    parser.add_argument("--tensors", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--write", action="store_true", help="put the output under benchmarks/results/")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        asyncio.run(serve(arguments.serve))
        return
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    numbers = (arguments.megabytes << 20) // 4 // arguments.tensors
    tensors = {f"layer.{number}.weight": torch.randn(numbers) for number in range(arguments.tensors)}
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    places = {"memory": "/dev/shm", "disk": None} if Path("/dev/shm").is_dir() else {"disk": None}
    result: dict[str, Any] = {
        "benchmark": "publish",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": {"cpus": os.cpu_count(), "kernel": platform.release(), "load_before": round(load, 2)},
        "python": platform.python_version(),
        "torch": torch.__version__,
        "bytes": nbytes,
        "tensors": len(tensors),
        "rounds": arguments.rounds,
    }
    for name, place in places.items():
        with tempfile.TemporaryDirectory(dir=place) as directory:
            result[name] = summary(nbytes, measure(Path(directory), tensors, arguments.rounds))
    text = json.dumps(result, indent=1)
    print(text)
    if arguments.write:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "publish.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
