"""Device memory that a worker owns and a version is received into, while the worker goes on serving.

The worker owns it, and not the agent: a process that ends in mid-copy must not take the engine's CUDA context with it.
"""

import os
import re
from collections.abc import Iterable
from typing import Final

import torch
from torch import Tensor

VARIABLE: Final = "WEIGHTSYNC_ARENA"
"""Bytes that an engine keeps for a received version, as ``16GiB``, or ``auto``: what its own parameters have."""

_UNITS: Final = {"": 1, "KI": 1 << 10, "MI": 1 << 20, "GI": 1 << 30, "K": 10**3, "M": 10**6, "G": 10**9}
_SHARE: Final = 1.01
"""Of the parameters' bytes: an image begins each tensor at a multiple of 256."""


class Arena:
    """Memory for one version at a time, had when the engine starts: so its own profiling counts it."""

    def __init__(self, nbytes: int) -> None:
        """Raises DeviceMemoryError."""
        from weightsync_engine.transfer.cuda.ipc import OwnMemory

        self._memory = OwnMemory(nbytes)
        self.nbytes = nbytes
        self.fd = self._memory.place().write()
        """Tells where it is; valid as long as this process is."""
        status = os.fstat(self.fd)
        self._inode = status.st_dev, status.st_ino

    def is_place(self, fd: int) -> bool:
        """Does this descriptor tell of this arena?"""
        status = os.fstat(fd)
        return (status.st_dev, status.st_ino) == self._inode

    def image(self, nbytes: int) -> Tensor:
        """The image that was received into it: uint8, on the GPU."""
        return self._memory.tensor()[:nbytes]


def open_arena(device: torch.device, parameters: Iterable[Tensor]) -> Arena | None:
    """What an engine was told to keep by ``WEIGHTSYNC_ARENA``; None for nothing.

    Raises ValueError for a value that means nothing, DeviceMemoryError.
    """
    nbytes = wanted_bytes(os.environ.get(VARIABLE, ""), sum(each.nbytes for each in parameters))
    if not nbytes:
        return None
    if device.type != "cuda":
        raise ValueError(f"{VARIABLE} is set, but the model is on {device}: only a GPU has an arena")
    return Arena(nbytes)


def wanted_bytes(value: str, parameters: int) -> int:
    """How much an engine was told to keep; ``parameters`` is how many bytes its own have. 0 for none.

    Raises ValueError for what is neither empty, ``auto``, nor a size.
    """
    if not value:
        return 0
    if value == "auto":
        return int(parameters * _SHARE) + (64 << 20)
    found = re.fullmatch(r"(\d+)\s*([KMG]?I?)B?", value.strip().upper())
    if found is None or found[2] not in _UNITS:
        raise ValueError(f"{VARIABLE}={value!r} is no size such as 16GiB, and not auto")
    return int(found[1]) * _UNITS[found[2]]
