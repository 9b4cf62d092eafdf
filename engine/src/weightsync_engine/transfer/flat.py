"""Brings a flat image from rank 0's memory into the members' memory, without another copy on the way."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Final

from torch import Tensor

from weightsync_contract.manifest import Manifest, aligned
from weightsync_engine.transfer.communicator import Communicator, Work

PIECE_BYTES: Final = 4 << 20
"""Longest single broadcast: what came is hashed while it is still in the cache, and the next one moves."""

Span = tuple[int, int]


def spans(nbytes: int, longest: int) -> Iterator[Span]:
    """Cut an image into (start, end), equally on every rank."""
    for start in range(0, nbytes, longest):
        yield start, min(start + longest, nbytes)


def tensor_spans(manifest: Manifest) -> Iterator[Span]:
    """One span a tensor, padding included, so that the image is complete; none for a tensor without bytes."""
    for tensor, offset in zip(manifest.tensors, manifest.offsets, strict=True):
        if tensor.nbytes:
            yield offset, offset + aligned(tensor.nbytes)


class Limit:
    """Holds a sender to a number of bytes a second; 0 is no limit."""

    def __init__(self, rate: int) -> None:
        self._rate = rate
        self._began = time.monotonic()

    def after(self, done: int) -> None:
        """Wait until ``done`` bytes may have gone out."""
        if self._rate:
            ahead = done / self._rate - (time.monotonic() - self._began)
            if ahead > 0:
                time.sleep(ahead)


def broadcast_image(
    group: Communicator,
    image: Tensor,
    pieces: Iterator[Span],
    in_flight: int,
    deadline: float,
    done: Callable[[int, int], None],
    limit: Limit,
) -> None:
    """Broadcast ``image`` (uint8, one dimension) from rank 0, ``in_flight`` pieces at a time.

    ``done(start, end)`` is called for each piece, in order, when it is complete here. Raises TransportError.
    """
    flying: deque[tuple[Work, Span]] = deque()

    def land() -> None:
        work, (start, end) = flying.popleft()
        work.wait(deadline - time.monotonic())
        done(start, end)

    for start, end in pieces:
        if len(flying) == in_flight:
            land()
        limit.after(start)
        flying.append((group.broadcast_async(image[start:end]), (start, end)))
    while flying:
        land()
