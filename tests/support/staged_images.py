"""Versions as an agent stages them: a manifest and sealed memory."""

import contextlib
import fcntl
import os
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from weightsync_contract.manifest import Manifest, TensorSpec
from weightsync_contract.messages import VersionId
from weightsync_engine.adapter import Staged
from weightsync_engine.digest import digest_image

ALL_SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


def manifest_of(weights: Mapping[str, Tensor]) -> Manifest:
    return Manifest(
        tuple(
            TensorSpec(name, str(t.dtype).removeprefix("torch."), tuple(t.shape))
            for name, t in weights.items()
        )
    )


def flat_image(weights: Mapping[str, Tensor]) -> bytes:
    manifest = manifest_of(weights)
    image = bytearray(manifest.nbytes)
    for tensor, offset in zip(weights.values(), manifest.offsets, strict=True):
        data = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        image[offset : offset + len(data)] = data
    return bytes(image)


def memory(data: bytes, seals: int = ALL_SEALS) -> int:
    fd = os.memfd_create("staged", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.write(fd, data)
    if seals:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


@contextlib.contextmanager
def staged(weights: Mapping[str, Tensor], version: int, run: str = "run-a") -> Iterator[Staged]:
    manifest, data = manifest_of(weights), flat_image(weights)
    fd = memory(data)
    try:
        digest = digest_image(manifest.layout, data)
        yield Staged(VersionId(run, version), manifest.layout, digest, manifest.nbytes, fd, manifest)
    finally:
        os.close(fd)
