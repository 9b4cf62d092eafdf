"""The packed wire of vLLM's weight transfer: many tensors in one broadcast, buffers used in turn.

Each tensor is flattened to bytes and appended to the chunk; a chunk is closed as soon as it holds more than
``buffer_bytes``, and the last one is what is left. So sender and receiver find the same chunks from the same list,
a tensor of any size fits, and a chunk is at most ``buffer_bytes`` and the largest tensor long.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from weightsync_engine.transfer.communicator import Communicator, Work

DEFAULT_BUFFER_BYTES: Final = 1 << 30
DEFAULT_NUM_BUFFERS: Final = 2

Named = tuple[str, Tensor]
Load = Callable[[list[Named]], object]


@dataclass(frozen=True, slots=True)
class Described:
    """A tensor that is going to come."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return math.prod(self.shape) * self.dtype.itemsize


def chunks(sizes: Iterable[int], buffer_bytes: int) -> Iterator[list[int]]:
    """Cut a list of sizes into chunks, given as lists of indices."""
    chunk: list[int] = []
    total = 0
    for index, size in enumerate(sizes):
        chunk.append(index)
        total += size
        if total > buffer_bytes:
            yield chunk
            chunk, total = [], 0
    if chunk:
        yield chunk


def as_bytes(tensor: Tensor) -> Tensor:
    """The elements as a flat uint8 tensor; a copy only of what is not contiguous."""
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8) if flat.numel() else flat.new_empty(0, dtype=torch.uint8)


def from_bytes(data: Tensor, described: Described) -> Tensor:
    """The tensor that lies in ``data``: a view where its elements are aligned, else a copy."""
    if data.storage_offset() % described.dtype.itemsize:
        data = data.clone()
    return data.view(described.dtype).view(described.shape)


def send_packed(
    tensors: Iterable[Tensor],
    group: Communicator,
    src: int,
    buffer_bytes: int,
    num_buffers: int,
    seconds: float,
) -> None:
    """Broadcast ``tensors`` from this rank. At most ``num_buffers`` chunks are in memory at a time."""
    flying: deque[tuple[Work, Tensor]] = deque()
    chunk: list[Tensor] = []
    total = 0

    def send() -> None:
        # A chunk's memory belongs to its broadcast until that is done.
        if len(flying) == num_buffers:
            flying.popleft()[0].wait(seconds)
        packed = torch.cat(chunk)
        if packed.numel():
            flying.append((group.broadcast_async(packed, src, seconds), packed))

    for tensor in tensors:
        chunk.append(as_bytes(tensor))
        total += chunk[-1].numel()
        if total > buffer_bytes:
            send()
            chunk, total = [], 0
    if chunk:
        send()
    while flying:
        flying.popleft()[0].wait(seconds)


def receive_packed(
    described: list[Described],
    group: Communicator,
    src: int,
    load: Load,
    buffer_bytes: int,
    num_buffers: int,
    seconds: float,
) -> None:
    """Receive what ``send_packed`` sends and give it to ``load``, chunk by chunk, in order.

    While one chunk is loaded the next ones are on their way. Loaded tensors are only valid until ``load`` returns:
    their buffer is used again.
    """
    buffers = [torch.empty(0, dtype=torch.uint8, device=group.device) for _ in range(num_buffers)]
    flying: deque[tuple[Work | None, Tensor, list[Described]]] = deque()

    def land() -> None:
        work, data, members = flying.popleft()
        if work is not None:
            work.wait(seconds)
        load(list(_split(data, members)))

    for number, indices in enumerate(chunks((each.nbytes for each in described), buffer_bytes)):
        # A buffer is free only once what was in it is loaded.
        if len(flying) == num_buffers:
            land()
        members = [described[index] for index in indices]
        size = sum(each.nbytes for each in members)
        slot = number % num_buffers
        if buffers[slot].numel() < size:
            buffers[slot] = torch.empty(size, dtype=torch.uint8, device=group.device)
        data = buffers[slot][:size]
        flying.append((group.broadcast_async(data, src, seconds) if size else None, data, members))
    while flying:
        land()


def _split(data: Tensor, members: list[Described]) -> Iterator[Named]:
    at = 0
    for each in members:
        yield each.name, from_bytes(data[at : at + each.nbytes], each)
        at += each.nbytes
