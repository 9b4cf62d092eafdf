"""The bytes of tensors that are on a GPU, through pinned memory: the bus's rate instead of a fraction of it.

torch is the trainer's: it is used where a tensor of it was given, and never imported.
"""

import ctypes
import sys
from collections.abc import Iterator
from typing import Any, Final

PIECE_BYTES: Final = 32 << 20
"""Longest piece: one is copied on while the next one comes from the GPU."""


class FromDevice:
    """Pinned memory for one publish; it is the pieces' until the next one is asked for."""

    def __init__(self) -> None:
        self._buffers: list[Any] = []

    def pieces(self, tensor: Any) -> Iterator[memoryview]:
        """The elements of a CUDA tensor in C order. Copied in the order of its device's current stream."""
        torch = sys.modules["torch"]
        if not self._buffers:
            self._buffers = [torch.empty(PIECE_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        flat = tensor.contiguous().reshape(-1).view(torch.uint8)
        coming: tuple[Any, Any] | None = None
        with torch.cuda.device(tensor.device):
            for number, start in enumerate(range(0, flat.numel(), PIECE_BYTES)):
                part = flat[start : start + PIECE_BYTES]
                pinned = self._buffers[number % 2][: part.numel()]
                pinned.copy_(part, non_blocking=True)
                event = torch.cuda.Event()
                event.record()
                if coming:
                    yield _landed(*coming)
                coming = event, pinned
        if coming:
            yield _landed(*coming)


def _landed(event: Any, pinned: Any) -> memoryview:
    event.synchronize()
    return memoryview((ctypes.c_ubyte * pinned.numel()).from_address(pinned.data_ptr())).cast("B")
