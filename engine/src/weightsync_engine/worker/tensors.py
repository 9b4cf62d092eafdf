"""A version's tensors, as views of the memory that it is staged in, on the host or on the GPU."""

from collections.abc import Iterator

import torch

from weightsync_contract.manifest import TensorSpec
from weightsync_engine.worker.state import Attached


def dtype_of(name: str) -> torch.dtype:
    """torch's dtype of a manifest's dtype name."""
    found = getattr(torch, name)
    assert isinstance(found, torch.dtype)
    return found


def views(attached: Attached) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor in wire order, none copied; they keep the memory alive for as long as they are."""
    manifest = attached.manifest
    for spec, offset in zip(manifest.tensors, manifest.offsets, strict=True):
        yield spec.name, _view(attached, spec, offset)


def _view(attached: Attached, spec: TensorSpec, offset: int) -> torch.Tensor:
    dtype = dtype_of(spec.dtype)
    memory = attached.memory
    if isinstance(memory, torch.Tensor):
        return memory[offset : offset + spec.nbytes].view(dtype).view(spec.shape)
    if not spec.nbytes:
        return torch.empty(spec.shape, dtype=dtype)
    count = spec.nbytes // dtype.itemsize
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=offset).view(spec.shape)
