"""The two files that the guard goes by, read again when they change."""

import asyncio
import hmac
from collections.abc import Callable
from pathlib import Path
from typing import Final, Generic, TypeVar

from weightsync_engine.permit import Mode, Permit, parse_permit

T = TypeVar("T")

_MAX_BYTES: Final = 4097
_PERIOD: Final = 0.02
_MIN_TOKEN: Final = 16


class CachedFile(Generic[T]):
    """What ``parse`` makes of a file's bytes, anew when inode, mtime or size differ; None when there is none.

    Writers replace the file, never write into it, so that two contents never share all three.
    """

    def __init__(self, path: Path, parse: Callable[[bytes], T | None]) -> None:
        self._path = path
        self._parse = parse
        self._stamp: tuple[int, int, int] | None = None
        self._value: T | None = None

    def read(self) -> T | None:
        """The present value."""
        try:
            now = self._path.stat()
            stamp = (now.st_ino, now.st_mtime_ns, now.st_size)
            if stamp != self._stamp:
                with self._path.open("rb") as file:
                    self._value = self._parse(file.read(_MAX_BYTES))
                # After the read: a file replaced in between is read once more, never taken for the older one.
                self._stamp = stamp
        except OSError:
            self._stamp, self._value = None, None
        return self._value


class PermitFile:
    """The permit of one boot."""

    def __init__(self, path: Path, boot: str) -> None:
        self._boot = boot
        self._file = CachedFile(path, parse_permit)
        self._tick: asyncio.Task[Permit | None] | None = None

    def read(self) -> Permit | None:
        """The permit that holds for this boot now."""
        permit = self._file.read()
        return permit if permit is not None and permit.boot == self._boot else None

    async def settled(self, seconds: float) -> Permit | None:
        """The permit once it is not Hold, or after ``seconds`` the one that still is."""
        permit = self.read()
        loop = asyncio.get_running_loop()
        until = loop.time() + seconds
        while permit is not None and permit.mode is Mode.HOLD and loop.time() < until:
            # All who wait share one look at the file.
            if self._tick is None or self._tick.done() or self._tick.get_loop() is not loop:
                self._tick = loop.create_task(self._look())
            permit = await asyncio.shield(self._tick)
        return permit

    async def _look(self) -> Permit | None:
        await asyncio.sleep(_PERIOD)
        return self.read()


class TokenFile:
    """The agent's token. Without one nobody has it."""

    def __init__(self, path: Path) -> None:
        self._file = CachedFile(path, _parse_token)

    def grants(self, headers: list[tuple[bytes, bytes]]) -> bool:
        """Does a request with these headers come from the agent?"""
        given = [value for name, value in headers if name.lower() == b"authorization"]
        token = self._file.read()
        if token is None or len(given) != 1:
            return False
        scheme, _, secret = given[0].partition(b" ")
        return hmac.compare_digest(secret.strip(), token) and scheme.lower() == b"bearer"


def _parse_token(data: bytes) -> bytes | None:
    token = data.strip()
    return token if _MIN_TOKEN <= len(token) < _MAX_BYTES else None
