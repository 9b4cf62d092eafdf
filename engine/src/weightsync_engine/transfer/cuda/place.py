"""Where device memory of another process is: a small sealed file that is passed by descriptor, as host memory is.

Who made it knows it again by its inode, whoever brings it.
"""

import fcntl
import json
import os
from dataclasses import asdict, dataclass
from typing import Final, Self

_SEALS: Final = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_MAX_BYTES: Final = 4096


@dataclass(frozen=True, slots=True)
class Place:
    """``nbytes`` bytes on a GPU. ``handle`` is CUDA's for other processes, in hex; ``gpu`` the GPU's UUID."""

    handle: str
    nbytes: int
    gpu: str

    def write(self) -> int:
        """A descriptor of a sealed file that says it. Raises OSError."""
        fd = os.memfd_create("weightsync-arena", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.write(fd, json.dumps(asdict(self)).encode())
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
        return fd

    @classmethod
    def read(cls, fd: int) -> Self:
        """What a descriptor says. Raises ValueError for another file."""
        try:
            return cls(**json.loads(os.pread(fd, _MAX_BYTES, 0)))
        except (TypeError, UnicodeDecodeError, OSError) as error:
            raise ValueError(f"the descriptor tells of no device memory: {error}") from error
