"""The seam to the library that moves bytes between ranks."""

from typing import Protocol

import torch
from torch import Tensor


class Work(Protocol):
    """A broadcast under way."""

    def wait(self, seconds: float) -> None:
        """Return once it is done here. Raises TransportError, TransportTimeoutError after ``seconds``."""


class Communicator(Protocol):
    """One rank of one group. It touches no state that torch or anybody else shares between groups."""

    rank: int
    world_size: int
    device: torch.device
    """Where tensors have to be to be broadcast."""

    def broadcast_async(self, tensor: Tensor, src: int, seconds: float) -> Work:
        """Begin to bring ``tensor`` (contiguous, equally long on all ranks) from ``src`` to everybody.

        The memory is the broadcast's until it is done. One that takes longer than ``seconds`` ends the group. On a
        GPU it begins when all that the current stream was given before is done.
        """

    def broadcast(self, tensor: Tensor, src: int, seconds: float) -> None:
        """The same, and wait for it."""

    def close(self) -> None:
        """Leave the group; idempotent."""


class TransportError(RuntimeError):
    """The group can't go on: a rank is gone, or was too slow. It is never used again."""


class TransportTimeoutError(TransportError):
    """A broadcast was not done in its time, and no rank is known to be gone."""


class RendezvousError(RuntimeError):
    """The group did not come about."""


class RendezvousTimeoutError(RendezvousError):
    """Not all ranks came in time; the message names those that rank 0 has not seen."""
