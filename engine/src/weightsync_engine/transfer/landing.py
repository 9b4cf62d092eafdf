"""Where a member's image lands, with the digest of what came: host memory, or an engine's memory on a GPU."""

import contextlib
from collections.abc import Iterator
from typing import Protocol

from weightsync_engine.digest import ImageDigest
from weightsync_engine.transfer.carriers import Carrier, Landed, Route
from weightsync_engine.transfer.staging import Key, Staging


class Landing(Protocol):
    """Had before bytes move, for one image; from its making to ``close`` it can be written to."""

    key: Key

    def receiving(
        self, layout: str, verify: bool, longest: int, count: int, done: Landed
    ) -> contextlib.AbstractContextManager[Route]:
        """The image's way: pieces of at most ``longest`` bytes, ``count`` under way at once.

        ``done(start, end)`` tells, in order, of each piece that is there.
        """

    def digest(self) -> str:
        """Of what was received; empty without ``verify``."""

    def close(self) -> None:
        """Give up every way to write to it."""


class HostLanding:
    """A file in memory. Raises OSError when there is not so much memory."""

    def __init__(self, fd: int, nbytes: int, carrier: Carrier) -> None:
        self._staging, self._nbytes, self._carrier = Staging(fd, nbytes), nbytes, carrier
        self.key = self._staging.key
        self._digest: ImageDigest | None = None
        carrier.prepare(self._staging.memory, nbytes)

    @contextlib.contextmanager
    def receiving(self, layout: str, verify: bool, longest: int, count: int, done: Landed) -> Iterator[Route]:
        """What has landed is hashed while the next pieces move."""
        digest = self._digest = ImageDigest(layout) if verify else None
        memory = self._staging.memory

        def landed(start: int, end: int) -> None:
            if digest:
                with memoryview(memory) as view, view[start:end] as part:
                    digest.update(part)
            done(start, end)

        with self._carrier.receiving(memory, self._nbytes, longest, count, landed) as route:
            yield route

    def digest(self) -> str:
        """Of the bytes in the file."""
        return self._digest.value() if self._digest else ""

    def close(self) -> None:
        """Unmap it: only then can it be sealed."""
        self._carrier.release()
        self._staging.close()
