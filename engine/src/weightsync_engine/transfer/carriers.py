"""How the pieces of an image get between the host's memory and the memory that a group broadcasts from and into."""

import contextlib
import mmap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from weightsync_engine.transfer.communicator import Communicator

Piece = Callable[[int, int], Tensor]
Landed = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Route:
    """One image's way. ``piece(start, end)`` is what is broadcast; each is used once, in order."""

    piece: Piece
    landed: Landed
    """Called for a piece whose broadcast is over."""
    finish: Callable[[], None]
    """Return once all is where it belongs."""


class Carrier(Protocol):
    """Made for a group. ``memory`` is at least ``nbytes`` long and stays mapped until ``release``."""

    def prepare(self, memory: mmap.mmap, nbytes: int) -> None:
        """Do before a transfer what memory to receive into needs. Raises RuntimeError."""

    def release(self) -> None:
        """Let go of what was prepared, so that it can be unmapped; idempotent."""

    def sending(
        self, memory: mmap.mmap, nbytes: int, longest: int, count: int, done: Landed
    ) -> contextlib.AbstractContextManager[Route]:
        """Pieces of at most ``longest`` bytes from the host, ``count`` under way at once.

        ``done(start, end)`` tells, in order, of each that is sent.
        """

    def receiving(
        self, memory: mmap.mmap, nbytes: int, longest: int, count: int, done: Landed
    ) -> contextlib.AbstractContextManager[Route]:
        """The same to the host; ``done`` tells of each that is there."""


def carrier_for(group: Communicator) -> Carrier:
    """The one for where the group's tensors are."""
    if group.device.type == "cuda":
        from weightsync_engine.transfer.cuda.carrier import DeviceCarrier

        return DeviceCarrier(group.device)
    return HostCarrier()


class HostCarrier:
    """The group reads and writes the image itself: nothing is copied."""

    def prepare(self, memory: mmap.mmap, nbytes: int) -> None:
        """Nothing."""

    def release(self) -> None:
        """Nothing."""

    @contextlib.contextmanager
    def sending(
        self, memory: mmap.mmap, nbytes: int, longest: int, count: int, done: Landed
    ) -> Iterator[Route]:
        """Pieces are parts of the memory."""
        image = torch.frombuffer(memory, dtype=torch.uint8, count=nbytes)
        yield Route(lambda start, end: image[start:end], done, lambda: None)

    @contextlib.contextmanager
    def receiving(
        self, memory: mmap.mmap, nbytes: int, longest: int, count: int, done: Landed
    ) -> Iterator[Route]:
        """Pieces are parts of the memory, each a tensor of its own: it is let go of as soon as it is over."""

        def piece(start: int, end: int) -> Tensor:
            return torch.frombuffer(memory, dtype=torch.uint8, count=end - start, offset=start)

        yield Route(piece, done, lambda: None)
