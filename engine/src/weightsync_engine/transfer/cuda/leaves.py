"""The digest of an image in a GPU's memory, taken where it lies."""

from typing import Any, Final

import numpy
import torch
from torch import Tensor

from weightsync_engine.digest import LEAF_BYTES, root
from weightsync_engine.transfer.cuda import source

_THREADS: Final = 128
_LANES: Final = 8


class DeviceDigest:
    """What ``digest.ImageDigest`` finds, of a flat image on a GPU (uint8, one dimension, at a multiple of 256)."""

    def __init__(self, layout: str, image: Tensor) -> None:
        self._layout, self._image = layout, image
        self._count = -(-image.numel() // LEAF_BYTES)
        self._sums = torch.empty(self._count * _LANES, dtype=torch.int64, device=image.device)
        self._kernels = _Kernels.on(image.device)
        self._hashed = 0

    def update(self, complete: int) -> None:
        """Hash what is there now: the first ``complete`` bytes. Queued on the current stream."""
        whole = complete == self._image.numel()
        until = self._count if whole else complete // LEAF_BYTES
        if until > self._hashed:
            self._kernels.lanes(self._image, self._hashed, until - self._hashed, self._sums)
            self._hashed = until

    def value(self) -> str:
        """The digest of all of it; waits for the GPU."""
        self.update(self._image.numel())
        found = torch.empty(self._count * 2, dtype=torch.int64, device=self._image.device)
        self._kernels.digests(self._sums, self._image.numel(), self._count, found)
        words = found.cpu().numpy().view(numpy.uint64).reshape(-1, 2)[:, ::-1]
        return root(self._layout, words.astype(">u8").tobytes())


class _Kernels:
    """The two kernels, compiled once a process and device."""

    _of: Final[dict[int, "_Kernels"]] = {}

    @classmethod
    def on(cls, device: torch.device) -> "_Kernels":
        if device.index not in cls._of:
            cls._of[device.index] = cls(device.index)
        return cls._of[device.index]

    def __init__(self, index: int) -> None:
        from cuda.core import Device, Program, ProgramOptions

        device = Device(index)
        device.set_current()
        major, minor = device.compute_capability
        options = ProgramOptions(std="c++17", arch=f"sm_{major}{minor}")
        program = Program(source.leaves(), "c++", options)
        module = program.compile("cubin")
        self._lanes, self._digests = module.get_kernel("lanes"), module.get_kernel("digests")

    def lanes(self, image: Tensor, first: int, count: int, sums: Tensor) -> None:
        numbers = numpy.uint64(image.numel()), numpy.uint64(first), numpy.uint64(count)
        self._launch(self._lanes, count * _LANES, image.data_ptr(), *numbers, sums.data_ptr())

    def digests(self, sums: Tensor, nbytes: int, count: int, found: Tensor) -> None:
        numbers = numpy.uint64(nbytes), numpy.uint64(count)
        self._launch(self._digests, count, sums.data_ptr(), *numbers, found.data_ptr())

    @staticmethod
    def _launch(kernel: Any, threads: int, *arguments: Any) -> None:
        from cuda.core import LaunchConfig, Stream, launch

        config = LaunchConfig(grid=-(-threads // _THREADS), block=_THREADS)
        launch(Stream.from_handle(torch.cuda.current_stream().cuda_stream), config, kernel, *arguments)
