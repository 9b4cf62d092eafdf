"""Our packed wire is vLLM's: its own sender and receiver at the other end of a real group, both ways.

Without a GPU there are no CUDA streams: they are stood in for, and the group is gloo's. What is packed, in which order
and into how many broadcasts, is vLLM's own code.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

if os.environ.get("CI") != "true":
    pytest.importorskip("vllm", reason="vLLM's own sender and receiver are one end here")

from vllm.distributed.weight_transfer import packed_tensor

from weightsync_engine.transfer.communicator import Communicator
from weightsync_engine.transfer.gloo import GlooCommunicator
from weightsync_engine.transfer.packing import Described, receive_packed, send_packed
from weightsync_engine.transfer.rendezvous import listen, reach

# vLLM warns of a tensor that is longer than a buffer; both ends take it as a chunk of its own.
pytestmark = pytest.mark.filterwarnings("ignore:Tensor '.*' has size:UserWarning")

HOST, SECONDS = "127.0.0.1", 30.0
TENSORS = {
    "a": torch.arange(1000, dtype=torch.float32).reshape(10, 100),
    "b": torch.arange(64, dtype=torch.bfloat16),
    "longer than a buffer": torch.arange(5000, dtype=torch.float32),
    "c": torch.arange(256, dtype=torch.int8).reshape(16, 16),
    "d": torch.full((4, 4), 7.0),
}
BYTES = sum(tensor.nbytes for tensor in TENSORS.values())
DESCRIBED = [Described(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in TENSORS.items()]
ASKED = [(name, (list(tensor.shape), tensor.dtype)) for name, tensor in TENSORS.items()]

Named = list[tuple[str, torch.Tensor]]


class Stream:
    """A CUDA stream where there is none: all that it was given is done already."""

    def synchronize(self) -> None: ...


class ForVllm:
    """What vLLM's functions call a group."""

    def __init__(self, group: Communicator) -> None:
        self._group = group
        self.sizes: list[int] = []

    def broadcast(self, tensor: torch.Tensor, src: int) -> None:
        self.sizes.append(tensor.numel())
        self._group.broadcast(tensor, src, SECONDS)


class Counted:
    """Our group, counting."""

    def __init__(self, group: Communicator) -> None:
        self._group = group
        self.rank, self.world_size, self.device = group.rank, group.world_size, group.device
        self.sizes: list[int] = []

    def broadcast_async(self, tensor: torch.Tensor, src: int, seconds: float) -> Any:
        self.sizes.append(tensor.numel())
        return self._group.broadcast_async(tensor, src, seconds)

    def broadcast(self, tensor: torch.Tensor, src: int, seconds: float) -> None:
        self.broadcast_async(tensor, src, seconds).wait(seconds)

    def close(self) -> None:
        self._group.close()


@pytest.fixture(autouse=True)
def streams(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_tensor, "_get_streams", lambda device, count: (Stream(),) * count)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)


@pytest.fixture
def pair() -> Iterator[tuple[Communicator, Communicator]]:
    meeting = listen(HOST, 0, 2, "n", SECONDS)
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(lambda: GlooCommunicator(reach(HOST, meeting.port, 1, 2, "n", SECONDS)))
        first = GlooCommunicator(meeting)
        yield first, other.result(SECONDS)
    first.close()
    other.result().close()


def both(send: Callable[[], None], receive: Callable[[], None]) -> None:
    with ThreadPoolExecutor(2) as pool:
        for each in [pool.submit(send), pool.submit(receive)]:
            each.result(SECONDS)


def keeper() -> tuple[dict[str, torch.Tensor], Callable[[Named], None]]:
    got: dict[str, torch.Tensor] = {}
    return got, lambda some: got.update({name: tensor.clone() for name, tensor in some})


def is_whole(got: dict[str, torch.Tensor]) -> bool:
    return list(got) == list(TENSORS) and all(torch.equal(got[name], TENSORS[name]) for name in TENSORS)


SIZES = pytest.mark.parametrize(
    "buffer_bytes", [1, 4000, 4127, 4128, 4129, BYTES - 1, BYTES, 1 << 30], ids=lambda size: f"{size} bytes"
)
COUNTS = pytest.mark.parametrize("buffers", [1, 2, 3])


@SIZES
@COUNTS
def test_what_vllm_sends_we_receive(
    pair: tuple[Communicator, Communicator], buffer_bytes: int, buffers: int
) -> None:
    theirs, ours = ForVllm(pair[0]), Counted(pair[1])
    got, load = keeper()
    both(
        lambda: packed_tensor.packed_nccl_broadcast_producer(
            iter(TENSORS.items()), theirs, 0, lambda item: item[1], buffer_bytes, buffers
        ),
        lambda: receive_packed(DESCRIBED, ours, 0, load, buffer_bytes, buffers, SECONDS),
    )
    assert is_whole(got)
    assert theirs.sizes == ours.sizes


@SIZES
@COUNTS
def test_what_we_send_vllm_receives(
    pair: tuple[Communicator, Communicator], buffer_bytes: int, buffers: int
) -> None:
    ours, theirs = Counted(pair[0]), ForVllm(pair[1])
    got, load = keeper()
    both(
        lambda: send_packed(iter(TENSORS.values()), ours, 0, buffer_bytes, buffers, SECONDS),
        lambda: packed_tensor.packed_nccl_broadcast_consumer(
            iter(ASKED), theirs, 0, load, buffer_bytes, buffers, "cpu"
        ),
    )
    assert is_whole(got)
    assert theirs.sizes == ours.sizes
