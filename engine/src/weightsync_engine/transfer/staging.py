"""Memory that is received into: shared with a file, and had piece by piece so that nothing is stuck in it."""

import errno
import mmap
import os
from typing import Final

_POPULATE_WRITE: Final = 23  # Linux 5.14; the mmap module has no name for it
_SLICE_BYTES: Final = 64 << 20
Key = tuple[int, int, int]


class Staging:
    """The first ``nbytes`` of a file, mapped for writing.

    Pages that come with the first write cost more than the bytes themselves, and too few of them would be a
    SIGBUS. So they are asked for before: by ``prepare``, or by ``need`` just before a piece is received.
    """

    def __init__(self, fd: int, nbytes: int) -> None:
        self.key = key(fd, nbytes)
        self.memory = mmap.mmap(fd, nbytes, mmap.MAP_SHARED)
        self._fd, self._nbytes = fd, nbytes
        self._prepared = False

    def prepare(self) -> None:
        """Have and map all of it. Raises OSError when there is not so much."""
        for start in range(0, self._nbytes, _SLICE_BYTES):
            self.need(start, min(start + _SLICE_BYTES, self._nbytes))
        self._prepared = True

    def need(self, start: int, end: int) -> None:
        """Have and map ``start`` to ``end``. Raises OSError."""
        if self._prepared:
            return
        start -= start % mmap.PAGESIZE
        try:
            self.memory.madvise(_POPULATE_WRITE, start, end - start)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            # An older kernel: the pages are there at least, if not mapped.
            os.posix_fallocate(self._fd, start, end - start)

    def close(self) -> None:
        """Unmap it: only then can the file be sealed."""
        self.memory.close()


def key(fd: int, nbytes: int) -> Key:
    """Equal for two descriptors of the same file."""
    status = os.fstat(fd)
    return status.st_dev, status.st_ino, nbytes
