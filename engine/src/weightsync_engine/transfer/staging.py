"""Memory that is received into: shared with a file, had before it is needed, and unmapped once all bytes are here."""

import contextlib
import errno
import mmap
import os
import time
from typing import Final

STEP_BYTES: Final = 64 << 20
"""Had in one call, which holds Python's lock: a timer of the child's has to get its turn between two."""
_POPULATE_WRITE: Final = 23  # Linux 5.14; the mmap module has no name for it
_RETRY_SECONDS: Final = 0.001

Key = tuple[int, int, int]


class Staging:
    """The first ``nbytes`` of a file, mapped for writing, with all its memory.

    Pages that come with the first write cost more than the bytes themselves, and too few of them would be a
    SIGBUS. So they are asked for before. Raises OSError when there is not so much memory.
    """

    def __init__(self, fd: int, nbytes: int) -> None:
        self.key = key(fd, nbytes)
        self.memory = mmap.mmap(fd, nbytes, mmap.MAP_SHARED)
        with contextlib.suppress(OSError):
            # Where the machine allows it for shared memory: a fault and an unmapping for 2 MiB instead of 4 KiB.
            self.memory.madvise(mmap.MADV_HUGEPAGE)
        for start in range(0, nbytes, STEP_BYTES):
            _have(self.memory, fd, start, min(STEP_BYTES, nbytes - start))

    def close(self) -> None:
        """Unmap it: only then can the file be sealed.

        gloo's threads let go of the last tensor a moment after its broadcast is over. Who waits for this has the
        deadline: the agent kills a child that does not come to its end.
        """
        while True:
            try:
                self.memory.close()
            except BufferError:
                time.sleep(_RETRY_SECONDS)
            else:
                return


def _have(memory: mmap.mmap, fd: int, start: int, length: int) -> None:
    try:
        memory.madvise(_POPULATE_WRITE, start, length)
    except OSError as error:
        if error.errno != errno.EINVAL:
            # EFAULT, where a write would have been a SIGBUS.
            message = f"bytes {start} to {start + length} of the staging have no memory"
            raise OSError(errno.ENOMEM, message) from error
        # An older kernel: the pages are there at least, if not mapped.
        os.posix_fallocate(fd, start, length)


def key(fd: int, nbytes: int) -> Key:
    """Equal for two descriptors of the same file."""
    status = os.fstat(fd)
    return status.st_dev, status.st_ino, nbytes
