"""Device memory that two processes share: allocated and owned by one, imported by the other.

By the driver's own allocator and not torch's: what is exported must be an allocation of its own, whatever pools and
expandable segments torch was told to use.
"""

import ctypes
from typing import Any, Final

import torch
from cuda.bindings import runtime
from torch import Tensor

from weightsync_engine.transfer.cuda.place import Place

_HANDLE_BYTES: Final = 64  # CUDA_IPC_HANDLE_SIZE; the bindings give no access to it by name
_ADVICE: Final = (
    "engine and agent need the same user id, and one /dev/shm: "
    "an emptyDir of medium Memory that both containers mount"
)


class DeviceMemoryError(RuntimeError):
    """It can't be had or opened; the message says why and what to do."""


class OwnMemory:
    """``nbytes`` on the current GPU, zeroed. Raises DeviceMemoryError when there is not so much."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.pointer = int(_checked(f"{nbytes} bytes of GPU memory", *runtime.cudaMalloc(nbytes)))
        _checked("zeroing them", *runtime.cudaMemset(self.pointer, 0, nbytes))

    def place(self) -> Place:
        """What another process needs to open it."""
        handle = _checked("exporting GPU memory", *runtime.cudaIpcGetMemHandle(self.pointer))
        return Place(ctypes.string_at(handle.getPtr(), _HANDLE_BYTES).hex(), self.nbytes, gpu())

    def tensor(self) -> Tensor:
        """All of it, uint8."""
        return _tensor(self.pointer, self.nbytes)


class OpenedMemory:
    """Another process's memory, from here to ``close``. Raises DeviceMemoryError."""

    def __init__(self, place: Place) -> None:
        if place.gpu != gpu():
            raise DeviceMemoryError(
                f"the engine's memory is on {place.gpu}, and this process sees {gpu()}: "
                "give the agent's container the engine's own GPU"
            )
        handle = runtime.cudaIpcMemHandle_t()
        ctypes.memmove(handle.getPtr(), bytes.fromhex(place.handle), _HANDLE_BYTES)
        self.nbytes = place.nbytes
        try:
            opened = runtime.cudaIpcOpenMemHandle(handle, runtime.cudaIpcMemLazyEnablePeerAccess)
            self.pointer = int(_checked("opening the engine's GPU memory", *opened))
        except DeviceMemoryError as error:
            raise DeviceMemoryError(f"{error}: {_ADVICE}") from error

    def tensor(self) -> Tensor:
        """All of it, uint8; not to be used after ``close``."""
        return _tensor(self.pointer, self.nbytes)

    def close(self) -> None:
        """Let go of it: nothing of this process can write there any more."""
        torch.cuda.synchronize()
        _checked("closing the engine's GPU memory", *runtime.cudaIpcCloseMemHandle(self.pointer))


def gpu() -> str:
    """The current GPU's UUID."""
    return str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)


class _Array:
    """What torch takes for an array on a GPU."""

    def __init__(self, pointer: int, nbytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (pointer, False),
            "version": 3,
        }


def _tensor(pointer: int, nbytes: int) -> Tensor:
    return torch.as_tensor(_Array(pointer, nbytes), device=torch.device("cuda", torch.cuda.current_device()))


def _checked(what: str, status: Any, *values: Any) -> Any:
    if int(status) != 0:
        _, name = runtime.cudaGetErrorName(status)
        raise DeviceMemoryError(f"{what}: {name.decode() if isinstance(name, bytes) else name}")
    return values[0] if values else None
