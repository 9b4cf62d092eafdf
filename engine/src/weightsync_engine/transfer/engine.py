"""A weight transfer engine with the interface of vLLM's nccl engine, over any communicator.

The trainer is rank 0 of a group of its own; each worker is a rank. It needs no vLLM and no agent: frameworks that
call vLLM's engine in their own loop can call this one.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from weightsync_engine.transfer.backends import library, open_communicator
from weightsync_engine.transfer.communicator import Communicator
from weightsync_engine.transfer.packing import (
    DEFAULT_BUFFER_BYTES,
    DEFAULT_NUM_BUFFERS,
    Described,
    Load,
    Named,
    as_bytes,
    receive_packed,
    send_packed,
)
from weightsync_engine.transfer.rendezvous import listen, reach

DEFAULT_SECONDS: Final = 300.0
"""Longest wait for the group to come about, and for any single broadcast."""


@dataclass(frozen=True, slots=True)
class InitInfo:
    """Where the group meets. ``rank_offset`` is the first rank of this engine's workers (the trainer is 0)."""

    master_address: str
    master_port: int
    rank_offset: int
    world_size: int
    backend: str = "Gloo"
    nonce: str = ""
    seconds: float = DEFAULT_SECONDS


@dataclass(frozen=True, slots=True)
class UpdateInfo:
    """What is going to be sent, as three parallel lists; the packing must be the sender's.

    Raises ValueError when the lists differ in length, a dtype is none of torch's, or a size is not positive.
    """

    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]
    packed: bool = False
    packed_buffer_size_bytes: int = DEFAULT_BUFFER_BYTES
    packed_num_buffers: int = DEFAULT_NUM_BUFFERS

    def __post_init__(self) -> None:
        for label, other in (("dtype_names", self.dtype_names), ("shapes", self.shapes)):
            if len(other) != len(self.names):
                raise ValueError(
                    f"{label} has {len(other)} entries but names has {len(self.names)}: give one for each tensor"
                )
        for name, dtype_name in zip(self.names, self.dtype_names, strict=True):
            if not isinstance(getattr(torch, dtype_name, None), torch.dtype):
                raise ValueError(f"tensor {name!r} has dtype {dtype_name!r}, which torch does not have")
        if self.packed_buffer_size_bytes < 1 or self.packed_num_buffers < 1:
            raise ValueError("packed_buffer_size_bytes and packed_num_buffers are at least 1")

    def described(self) -> list[Described]:
        """The tensors in wire order."""
        rows = zip(self.names, self.dtype_names, self.shapes, strict=True)
        return [Described(name, getattr(torch, dtype), tuple(shape)) for name, dtype, shape in rows]


@dataclass(frozen=True, slots=True)
class ParallelLayout:
    """A worker's place in its engine: ``rank`` counts within one data-parallel replica of ``world_size`` (TP x PP)."""

    rank: int = 0
    world_size: int = 1
    data_parallel_rank: int = 0

    def group_rank(self, rank_offset: int) -> int:
        """The worker's rank in the transfer group, unique over all replicas."""
        return self.data_parallel_rank * self.world_size + self.rank + rank_offset


class WeightTransferEngine:
    """The worker's side; ``trainer_init`` and ``trainer_send_weights`` are the trainer's."""

    def __init__(self, layout: ParallelLayout, *, seconds: float = DEFAULT_SECONDS) -> None:
        self._layout = layout
        self._seconds = seconds
        self.group: Communicator | None = None

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        """Join the trainer's group; leaves an earlier one. Raises RendezvousError."""
        self.shutdown()
        rank = self._layout.group_rank(init_info.rank_offset)
        self.group = _open(init_info, rank)

    def receive_weights(self, update_info: UpdateInfo, load_weights: Load) -> None:
        """Receive everything and give it to ``load_weights`` bit by bit, so that two copies never meet in memory.

        What ``load_weights`` gets may be overwritten once it returns. Raises RuntimeError before
        ``init_transfer_engine``, TransportError when the group breaks.
        """
        if self.group is None:
            raise RuntimeError("the transfer engine is in no group: call init_transfer_engine first")
        if update_info.packed:
            receive_packed(
                update_info.described(),
                self.group,
                0,
                load_weights,
                update_info.packed_buffer_size_bytes,
                update_info.packed_num_buffers,
                self._seconds,
            )
            return
        for each in update_info.described():
            tensor = torch.empty(each.shape, dtype=each.dtype, device=self.group.device)
            if tensor.numel():
                self.group.broadcast(tensor.view(-1).view(torch.uint8), 0, self._seconds)
            load_weights([(each.name, tensor)])
            # Freed before the next one comes.
            del tensor

    def shutdown(self) -> None:
        """Leave the group; idempotent."""
        group, self.group = self.group, None
        if group is not None:
            group.close()

    @staticmethod
    def trainer_init(init_info: InitInfo | Mapping[str, Any]) -> Communicator:
        """Be rank 0. ``init_info`` may be a mapping with master_address, master_port and world_size."""
        if not isinstance(init_info, InitInfo):
            init_info = InitInfo(**{"rank_offset": 1, **init_info})
        return _open(init_info, 0)

    @staticmethod
    def trainer_send_weights(
        iterator: Iterator[Named],
        group: Communicator,
        src: int = 0,
        post_iter_func: Callable[[Named], Tensor] | None = None,
        packed: bool = False,
        packed_buffer_size_bytes: int = DEFAULT_BUFFER_BYTES,
        packed_num_buffers: int = DEFAULT_NUM_BUFFERS,
        seconds: float = DEFAULT_SECONDS,
    ) -> None:
        """Broadcast (name, tensor) pairs to the workers, who must know names, dtypes and shapes in this order.

        ``post_iter_func`` makes the tensor that is sent of each pair, e.g. gathers shards. Raises TransportError.
        """
        tensors = (post_iter_func(item) if post_iter_func else item[1] for item in iterator)
        if packed:
            send_packed(tensors, group, src, packed_buffer_size_bytes, packed_num_buffers, seconds)
            return
        for tensor in tensors:
            if tensor.numel():
                group.broadcast(as_bytes(tensor), src, seconds)


def _open(info: InitInfo, rank: int) -> Communicator:
    host, port, size = info.master_address, info.master_port, info.world_size
    same = library(info.backend)
    if rank == 0:
        meeting = listen(host, port, size, info.nonce, info.seconds, same)
    else:
        meeting = reach(host, port, rank, size, info.nonce, info.seconds, same)
    return open_communicator(info.backend, meeting)
