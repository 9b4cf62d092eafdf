"""A version's tensors, as views of the memory that it is staged in, on the host or on the GPU."""

import mmap
from collections.abc import Iterator

import torch

from weightsync_engine.worker.state import Attached


def dtype_of(name: str) -> torch.dtype:
    """torch's dtype of a manifest's dtype name."""
    found = getattr(torch, name)
    assert isinstance(found, torch.dtype)
    return found


def views(attached: Attached) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor in wire order, none copied, all in one storage; they keep the memory alive while they are."""
    manifest, memory = attached.manifest, attached.memory
    image = memory if isinstance(memory, torch.Tensor) else _mapped(memory)
    for spec, offset in zip(manifest.tensors, manifest.offsets, strict=True):
        elements = image[offset : offset + spec.nbytes].view(dtype_of(spec.dtype))
        yield spec.name, elements.view(spec.shape)


def _mapped(memory: mmap.mmap) -> torch.Tensor:
    return torch.frombuffer(memory, dtype=torch.uint8) if len(memory) else torch.empty(0, dtype=torch.uint8)
