"""Host memory that a GPU reads and writes by itself."""

import mmap
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final

import torch

BLOCK_BYTES: Final = 64 << 20
"""What is pinned at once where pinning goes on beside the copies; whole pages."""
_READ_ONLY: Final = 8  # cudaHostRegisterReadOnly


class PinningError(RuntimeError):
    """The driver refuses to pin it: a limit, or a file on a file system that can't be pinned."""


class Pinned:
    """Mapped memory, pinned from here to ``close``. Raises PinningError."""

    def __init__(self, memory: mmap.mmap, nbytes: int, writable: bool, start: int = 0) -> None:
        self._pointer = torch.frombuffer(memory, dtype=torch.uint8, count=nbytes, offset=start).data_ptr()
        flags = 0 if writable else _READ_ONLY
        status = torch.cuda.cudart().cudaHostRegister(self._pointer, nbytes, flags)
        if int(status) != 0:
            raise PinningError(f"{nbytes} bytes of host memory can't be pinned: {status}")

    def close(self) -> None:
        """Unpin it: only then can it be unmapped."""
        torch.cuda.cudart().cudaHostUnregister(self._pointer)


class PinnedAhead:
    """Memory to read from, pinned block by block on a thread while the blocks before are copied.

    Pinning all of it first would take as long as the copies. Raises PinningError when not even the first can be.
    """

    def __init__(self, memory: mmap.mmap, nbytes: int) -> None:
        starts = range(0, nbytes, BLOCK_BYTES)
        first = Pinned(memory, min(BLOCK_BYTES, nbytes), False)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="pin")
        self._blocks: list[Future[Pinned]] = [
            self._thread.submit(Pinned, memory, min(BLOCK_BYTES, nbytes - start), False, start)
            for start in starts[1:]
        ]
        done: Future[Pinned] = Future()
        done.set_result(first)
        self._blocks.insert(0, done)

    def parts(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """A piece's parts, each within one block that is pinned. Raises PinningError."""
        while start < end:
            block = start // BLOCK_BYTES
            self._blocks[block].result()
            until = min(end, (block + 1) * BLOCK_BYTES)
            yield start, until
            start = until

    def close(self) -> None:
        """Unpin all that was pinned."""
        self._thread.shutdown(cancel_futures=True)
        for block in self._blocks:
            if not block.cancelled() and block.exception() is None:
                block.result().close()
