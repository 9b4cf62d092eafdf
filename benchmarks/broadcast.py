"""How near the packed broadcast comes to NCCL's own rate; several ranks on one GPU, each a process.

Every share is of a raw broadcast of as many bytes in the same run, in 256 MiB pieces from and into one buffer.
Without MPS the ranks' contexts take turns on the GPU, which slows all to about a fast network's rate; with it
(``--mps``, a daemon of this run's own) they share the memory's bandwidth.

    python benchmarks/broadcast.py --shape dense8b --ranks 2 --mps --write NAME

It needs an NVIDIA GPU and NCCL 2.30 or newer.
"""

import argparse
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from weightsync_engine.transfer.backends import open_communicator
from weightsync_engine.transfer.communicator import Communicator
from weightsync_engine.transfer.cuda.leaves import DeviceDigest
from weightsync_engine.transfer.packing import Described, receive_packed, send_packed
from weightsync_engine.transfer.rendezvous import listen, reach

RESULTS = Path(__file__).parent / "results"
SECONDS = 120.0
RAW_PIECE = 256 << 20

Shapes = list[tuple[str, tuple[int, ...]]]


def attention(layer: int, hidden: int, heads: int, kv: int) -> Shapes:
    """What a layer of Qwen3 has besides its experts or its MLP."""
    return [
        (f"{layer}.q", (heads * 128, hidden)),
        (f"{layer}.k", (kv * 128, hidden)),
        (f"{layer}.v", (kv * 128, hidden)),
        (f"{layer}.o", (hidden, heads * 128)),
        (f"{layer}.q_norm", (128,)),
        (f"{layer}.k_norm", (128,)),
        (f"{layer}.in", (hidden,)),
        (f"{layer}.post", (hidden,)),
    ]


def dense8b() -> Shapes:
    """Qwen3-8B's: 399 tensors, 16.4 GB in bfloat16."""
    hidden, heads, kv, wide, layers, vocabulary = 4096, 32, 8, 12288, 36, 151936
    found: Shapes = [("embed", (vocabulary, hidden)), ("head", (vocabulary, hidden)), ("norm", (hidden,))]
    for layer in range(layers):
        found += [
            *attention(layer, hidden, heads, kv),
            (f"{layer}.gate", (wide, hidden)),
            (f"{layer}.up", (wide, hidden)),
            (f"{layer}.down", (hidden, wide)),
        ]
    return found


def moe(layers: int = 32) -> Shapes:
    """Qwen3-30B-A3B's with fewer layers, so that both sides fit on one GPU: 12,579 tensors, 41 GB at 32."""
    hidden, heads, kv, wide, experts, vocabulary = 2048, 32, 4, 768, 128, 151936
    found: Shapes = [("embed", (vocabulary, hidden)), ("head", (vocabulary, hidden)), ("norm", (hidden,))]
    for layer in range(layers):
        found += [
            *attention(layer, hidden, heads, kv),
            (f"{layer}.router", (experts, hidden)),
        ]
        for expert in range(experts):
            found += [
                (f"{layer}.{expert}.gate", (wide, hidden)),
                (f"{layer}.{expert}.up", (wide, hidden)),
                (f"{layer}.{expert}.down", (hidden, wide)),
            ]
    return found


SHAPES: dict[str, Callable[[], Shapes]] = {
    "tiny": lambda: dense8b()[3:36],
    "dense8b": dense8b,
    "moe": moe,
    "moe-small": lambda: moe(24),
}


class Run:
    """One rank's part. All ranks do the same rounds in the same order; a round begins when all are at its start."""

    def __init__(self, group: Communicator, rounds: int) -> None:
        self.group, self.rounds = group, rounds
        self.seconds: dict[str, list[float]] = {}
        self._one = torch.ones(1, dtype=torch.uint8, device=group.device)

    def measure(self, name: str, act: Callable[[], object]) -> None:
        """One round to warm up, then those that count."""
        for number in range(self.rounds + 1):
            torch.cuda.synchronize()
            self.group.broadcast(self._one, 0, SECONDS)
            began = time.perf_counter()
            act()
            torch.cuda.synchronize()
            if number:
                self.seconds.setdefault(name, []).append(time.perf_counter() - began)


def play(rank: int, arguments: argparse.Namespace) -> dict[str, list[float]]:
    """What one process does."""
    torch.cuda.set_device(0)
    if rank == 0:
        meeting = listen("127.0.0.1", arguments.port, arguments.ranks, "bench", SECONDS)
    else:
        meeting = reach("127.0.0.1", arguments.port, rank, arguments.ranks, "bench", SECONDS)
    group = open_communicator("NCCL", meeting)
    run = Run(group, arguments.rounds)
    shapes = SHAPES[arguments.shape]()
    described = [Described(name, torch.bfloat16, shape) for name, shape in shapes]
    sizes = [each.nbytes for each in described]
    image = torch.empty(sum(sizes), dtype=torch.uint8, device=group.device)
    tensors = []
    at = 0
    for each in described:
        tensors.append(image[at : at + each.nbytes].view(torch.bfloat16).view(each.shape))
        at += each.nbytes

    def raw() -> None:
        flying = [
            group.broadcast_async(image[start : start + RAW_PIECE], 0, SECONDS)
            for start in range(0, len(image), RAW_PIECE)
        ]
        for each in flying:
            each.wait(SECONDS)

    def packed() -> None:
        if rank == 0:
            send_packed(iter(tensors), group, 0, arguments.buffer, arguments.buffers, SECONDS)
            return
        into = iter(tensors)

        def load(some: list[tuple[str, torch.Tensor]]) -> None:
            torch._foreach_copy_([next(into) for _ in some], [tensor for _, tensor in some])

        receive_packed(described, group, 0, load, arguments.buffer, arguments.buffers, SECONDS)

    run.measure("raw", raw)
    run.measure("packed", packed)
    run.measure("raw again", raw)
    run.measure("digest", lambda: DeviceDigest("sha256:0", image).value())
    return {"bytes": [float(len(image))], "tensors": [float(len(tensors))], **run.seconds}


@contextlib.contextmanager
def mps(wanted: bool) -> Iterator[dict[str, str]]:
    """A daemon of our own, in a directory of its own; it changes no setting of the GPU."""
    if not wanted:
        yield {}
        return
    with tempfile.TemporaryDirectory() as folder:
        environment = {"CUDA_MPS_PIPE_DIRECTORY": folder, "CUDA_MPS_LOG_DIRECTORY": folder}
        everything = {**os.environ, **environment}
        subprocess.run(["nvidia-cuda-mps-control", "-d"], env=everything, check=True)
        try:
            yield environment
        finally:
            subprocess.run(["nvidia-cuda-mps-control"], input=b"quit\n", env=everything, check=False)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--buffer", type=int, default=1 << 30, help="bytes of a chunk")
    parser.add_argument("--buffers", type=int, default=2, help="chunks under way")
    parser.add_argument(
        "--mps", action="store_true", help="let the ranks share the GPU instead of taking turns"
    )
    parser.add_argument("--write", metavar="NAME", help="keep the result in benchmarks/results/NAME.json")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank is not None:
        print(json.dumps(play(arguments.rank, arguments)))
        return 0
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with mps(arguments.mps) as more:
        environment = {**os.environ, **more, "NCCL_MULTI_RANK_GPU_ENABLE": "1"}
        command = [sys.executable, __file__, *sys.argv[1:], "--port", str(port), "--rank"]
        processes = [
            subprocess.Popen([*command, str(rank)], env=environment, stdout=subprocess.PIPE)
            for rank in range(arguments.ranks)
        ]
        try:
            said = [json.loads(process.communicate(timeout=400)[0]) for process in processes]
        finally:
            for process in processes:
                process.kill()
    result = summary(arguments, said)
    print(json.dumps(result, indent=1))
    if arguments.write:
        (RESULTS / f"{arguments.write}.json").write_text(json.dumps(result, indent=1) + "\n")
    return 0


def summary(arguments: argparse.Namespace, said: list[dict[str, list[float]]]) -> dict[str, object]:
    """A round took as long as its slowest rank."""
    nbytes = said[0]["bytes"][0]
    rounds = {
        name: [max(each) for each in zip(*(rank[name] for rank in said), strict=True)]
        for name in said[0]
        if name not in ("bytes", "tensors")
    }
    medians = {name: statistics.median(each) for name, each in rounds.items()}
    raw = statistics.median(rounds["raw"] + rounds["raw again"])
    return {
        "gpu": torch.cuda.get_device_name(),
        "shape": arguments.shape,
        "ranks": arguments.ranks,
        "mps": arguments.mps,
        "gigabytes": nbytes / 1e9,
        "tensors": int(said[0]["tensors"][0]),
        "milliseconds": {name: round(seconds * 1e3, 1) for name, seconds in medians.items()},
        "share of raw": {name: round(raw / seconds, 3) for name, seconds in medians.items()},
        "rounds": {name: [round(seconds * 1e3, 2) for seconds in each] for name, each in rounds.items()},
    }


if __name__ == "__main__":
    sys.exit(main())
