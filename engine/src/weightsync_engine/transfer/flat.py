"""Brings a flat image from rank 0's memory into the members' memory, without another copy on the way."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Final

from torch import Tensor

from weightsync_contract.manifest import Manifest, aligned
from weightsync_engine.transfer.communicator import Communicator, Work

PIECE_BYTES: Final = 64 << 20
"""Longest single broadcast: what came is hashed while the next ones move. Shorter ones cost more than they hide."""
FIRST_PIECE_BYTES: Final = 16 << 20
"""Longest one of a group whose rate nobody has seen."""
LEAST_PIECE_BYTES: Final = 64 << 10
PIECE_SECONDS: Final = 0.1
"""Longest that a piece takes at the group's rate: progress has to show as often as it is told."""

Span = tuple[int, int]


def piece_bytes(buffer_bytes: int, rate: float) -> int:
    """How long rank 0's pieces are. ``rate``: bytes a second of this group, seen or as limited; 0 if nobody knows."""
    longest = max(int(rate * PIECE_SECONDS), LEAST_PIECE_BYTES) if rate else FIRST_PIECE_BYTES
    return min(buffer_bytes, PIECE_BYTES, longest)


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
    piece: Callable[[int, int], Tensor],
    pieces: Iterator[Span],
    in_flight: int,
    deadline: float,
    done: Callable[[int, int], None],
) -> None:
    """Broadcast an image from rank 0, ``in_flight`` pieces at a time.

    For each piece, in order, ``piece(start, end)`` gives its memory (uint8, one dimension), and ``done(start, end)``
    is called when it is complete here. ``deadline`` is on the monotonic clock. Raises TransportError.
    """
    flying: deque[tuple[Work, Span]] = deque()

    def land() -> None:
        work, (start, end) = flying.popleft()
        work.wait(deadline - time.monotonic())
        done(start, end)

    for start, end in pieces:
        if len(flying) == in_flight:
            land()
        work = group.broadcast_async(piece(start, end), 0, deadline - time.monotonic())
        flying.append((work, (start, end)))
    while flying:
        land()
