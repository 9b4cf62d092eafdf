"""Host memory that a GPU reads and writes by itself."""

import mmap
from typing import Final

import torch

_READ_ONLY: Final = 8  # cudaHostRegisterReadOnly


class PinningError(RuntimeError):
    """The driver refuses to pin it: a limit, or a file on a file system that can't be pinned."""


class Pinned:
    """Mapped memory, pinned from here to ``close``. Raises PinningError."""

    def __init__(self, memory: mmap.mmap, nbytes: int, writable: bool) -> None:
        self._pointer = torch.frombuffer(memory, dtype=torch.uint8, count=nbytes).data_ptr()
        flags = 0 if writable else _READ_ONLY
        status = torch.cuda.cudart().cudaHostRegister(self._pointer, nbytes, flags)
        if int(status) != 0:
            raise PinningError(f"{nbytes} bytes of host memory can't be pinned: {status}")

    def close(self) -> None:
        """Unpin it: only then can it be unmapped."""
        torch.cuda.cudart().cudaHostUnregister(self._pointer)
