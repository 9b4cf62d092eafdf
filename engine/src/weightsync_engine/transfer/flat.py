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
LEAST_PIECE_BYTES: Final = 64 << 10
LIMITED_PIECE_SECONDS: Final = 0.2
"""Under a limit a piece is so short that progress shows as often as it is told."""

Span = tuple[int, int]


def piece_bytes(buffer_bytes: int, limit_rate: int) -> int:
    """How long rank 0's pieces are. ``limit_rate`` is in bytes a second, 0 for none."""
    longest = min(buffer_bytes, PIECE_BYTES)
    if limit_rate:
        longest = min(longest, max(int(limit_rate * LIMITED_PIECE_SECONDS), LEAST_PIECE_BYTES))
    return longest


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
    before: Callable[[int, int], None],
    done: Callable[[int, int], None],
) -> None:
    """Broadcast ``image`` (uint8, one dimension) from rank 0, ``in_flight`` pieces at a time.

    For each piece, in order, ``before(start, end)`` is called before its memory is touched, and ``done(start,
    end)`` when it is complete here. ``deadline`` is on the monotonic clock. Raises TransportError.
    """
    flying: deque[tuple[Work, Span]] = deque()

    def land() -> None:
        work, (start, end) = flying.popleft()
        work.wait(deadline - time.monotonic())
        done(start, end)

    for start, end in pieces:
        if len(flying) == in_flight:
            land()
        before(start, end)
        work = group.broadcast_async(image[start:end], 0, deadline - time.monotonic())
        flying.append((work, (start, end)))
    while flying:
        land()
