"""An engine's arena, as the child that receives into it sees it."""

import contextlib
from collections.abc import Iterator

import torch

from weightsync_engine.transfer.carriers import Landed, Route
from weightsync_engine.transfer.cuda.ipc import OpenedMemory
from weightsync_engine.transfer.cuda.leaves import DeviceDigest
from weightsync_engine.transfer.cuda.place import Place
from weightsync_engine.transfer.staging import key


class ArenaLanding:
    """The first ``nbytes`` of the arena that a descriptor tells of. Raises DeviceMemoryError, ValueError."""

    def __init__(self, fd: int, nbytes: int) -> None:
        place = Place.read(fd)
        if nbytes > place.nbytes:
            raise ValueError(f"the engine's arena has {place.nbytes} bytes, and the version {nbytes}")
        self.key = key(fd, nbytes)
        self._memory = OpenedMemory(place)
        self._image = self._memory.tensor()[:nbytes]
        self._digest: DeviceDigest | None = None

    @contextlib.contextmanager
    def receiving(self, layout: str, verify: bool, longest: int, count: int, done: Landed) -> Iterator[Route]:
        """Pieces are parts of the arena itself; what has landed is hashed there while the next ones move."""
        digest = self._digest = DeviceDigest(layout, self._image) if verify else None
        moving: torch.cuda.Stream = torch.cuda.Stream(self._image.device)
        hashing: torch.cuda.Stream = torch.cuda.Stream(self._image.device)

        def landed(start: int, end: int) -> None:
            if digest:
                # On a stream of its own: the next broadcast is not to wait for it.
                with torch.cuda.stream(hashing):
                    digest.update(end)
            done(start, end)

        with torch.cuda.stream(moving):
            yield Route(lambda start, end: self._image[start:end], landed, hashing.synchronize)

    def digest(self) -> str:
        """Of the bytes in the arena."""
        return self._digest.value() if self._digest else ""

    def close(self) -> None:
        """Let go of the engine's memory."""
        self._memory.close()
