"""Memory that is received into: shared with a file, had before it is needed and unmapped as soon as it is not.

It is mapped in segments. Unmapping it all at the end would take a quarter of the time that the transfer takes;
segment by segment it goes on beside the next pieces.
"""

import contextlib
import errno
import mmap
import os
from typing import Final

SEGMENT_BYTES: Final = 64 << 20
_SEGMENTS: Final = 1024
"""At most so many, of the mappings that a process may have."""
_POPULATE_WRITE: Final = 23  # Linux 5.14; the mmap module has no name for it

Key = tuple[int, int, int]


def segment_bytes(nbytes: int) -> int:
    """How the staging of an image of ``nbytes`` is cut; equal on every rank, so that no piece crosses a cut."""
    return SEGMENT_BYTES * max(1, -(-nbytes // (SEGMENT_BYTES * _SEGMENTS)))


class Staging:
    """The first ``nbytes`` of a file, mapped for writing in segments of ``segment`` bytes.

    Pages that come with the first write cost more than the bytes themselves, and too few of them would be a
    SIGBUS. So they are asked for before: by ``prepare``, or by ``place`` for a segment that was not prepared.
    """

    def __init__(self, fd: int, nbytes: int, segment: int) -> None:
        self.key = key(fd, nbytes)
        self._fd, self._segment, self._nbytes = fd, segment, nbytes
        self._mapped: dict[int, mmap.mmap] = {}

    def prepare(self) -> None:
        """Have and map all of it. Raises OSError when there is not so much."""
        for start in range(0, self._nbytes, self._segment):
            self._map(start)

    def place(self, start: int) -> tuple[mmap.mmap, int]:
        """The segment that ``start`` is in, and where in it. Raises OSError when there is no memory for it."""
        base = start - start % self._segment
        return self._mapped.get(base) or self._map(base), start - base

    def done(self, end: int) -> None:
        """All before ``end`` is complete and will not be looked at again."""
        base = (end - 1) - (end - 1) % self._segment
        if end == min(base + self._segment, self._nbytes):
            self._mapped.pop(base).close()

    def close(self) -> None:
        """Unmap what is left: only without any mapping can the file be sealed."""
        while self._mapped:
            self._mapped.popitem()[1].close()

    def _map(self, base: int) -> mmap.mmap:
        length = min(self._segment, self._nbytes - base)
        memory = mmap.mmap(self._fd, length, mmap.MAP_SHARED, offset=base)
        self._mapped[base] = memory
        with contextlib.suppress(OSError):
            # Where the machine allows it for shared memory: a fault and an unmapping for 2 MiB instead of 4 KiB.
            memory.madvise(mmap.MADV_HUGEPAGE)
        try:
            memory.madvise(_POPULATE_WRITE)
        except OSError as error:
            if error.errno != errno.EINVAL:
                # EFAULT, where a write would have been a SIGBUS.
                message = f"bytes {base} to {base + length} of the staging have no memory"
                raise OSError(errno.ENOMEM, message) from error
            # An older kernel: the pages are there at least, if not mapped.
            os.posix_fallocate(self._fd, base, length)
        return memory


def key(fd: int, nbytes: int) -> Key:
    """Equal for two descriptors of the same file."""
    status = os.fstat(fd)
    return status.st_dev, status.st_ino, nbytes
