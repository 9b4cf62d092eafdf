"""What a version is made of: names, dtypes and shapes in wire order, and where each tensor lies."""

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, Self

from weightsync_contract.names import TENSOR_ALIGNMENT
from weightsync_contract.reasons import PublishCode

DTYPE_BYTES: Final[dict[str, int]] = {
    "bool": 1,
    "uint8": 1,
    "int8": 1,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "int16": 2,
    "float16": 2,
    "bfloat16": 2,
    "int32": 4,
    "float32": 4,
    "int64": 8,
    "float64": 8,
}
"""Element size in bytes of every dtype that can be published, by torch's name for it."""

MAX_TENSORS: Final = 1_000_000
MAX_NAME_BYTES: Final = 1024
MAX_DIMENSIONS: Final = 64
MAX_BYTES: Final = 1 << 50
"""More than any machine holds, and little enough for every number that is computed of it."""


class ManifestError(ValueError):
    """A manifest that can't be published; ``code`` says why, the message names the tensor and what to do."""

    def __init__(self, code: PublishCode, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor: its checkpoint name, torch's dtype name and its shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's elements, without padding."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


def aligned(nbytes: int) -> int:
    """Round ``nbytes`` up to the alignment of tensors in the flat image."""
    return -(-nbytes // TENSOR_ALIGNMENT) * TENSOR_ALIGNMENT


@dataclass(frozen=True)
class Manifest:
    """The tensors of a version in wire order.

    The flat image of a version is ``nbytes`` long; tensor ``i`` starts at ``offsets[i]``, the gaps are zero.
    Raises ManifestError when built from tensors that no version can have.
    """

    tensors: tuple[TensorSpec, ...]

    def __post_init__(self) -> None:
        _check(self.tensors)

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Where each tensor starts in the flat image, in bytes."""
        out, at = [], 0
        for tensor in self.tensors:
            out.append(at)
            at += aligned(tensor.nbytes)
        return tuple(out)

    @cached_property
    def nbytes(self) -> int:
        """Length of the flat image in bytes, padding included."""
        return sum(aligned(tensor.nbytes) for tensor in self.tensors)

    @cached_property
    def layout(self) -> str:
        """The layout id: equal for two manifests exactly when names, dtypes, shapes and order are equal."""
        return "sha256:" + hashlib.sha256(self.encode()).hexdigest()

    def encode(self) -> bytes:
        """Canonical JSON, the bytes that the layout id is taken of."""
        rows = [[t.name, t.dtype, list(t.shape)] for t in self.tensors]
        return json.dumps(rows, separators=(",", ":"), ensure_ascii=True).encode()

    @classmethod
    def decode(cls, data: bytes | str) -> Self:
        """Parse what ``encode`` wrote. Raises ManifestError, naming the row, for anything else."""
        try:
            rows = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise ManifestError(PublishCode.MALFORMED, f"the manifest is no JSON: {error}") from error
        if not isinstance(rows, list):
            raise ManifestError(PublishCode.MALFORMED, "the manifest is no list of [name, dtype, shape]")
        return cls(tuple(_row(number, row) for number, row in enumerate(rows)))

    @classmethod
    def from_lists(
        cls, names: Sequence[str], dtype_names: Sequence[str], shapes: Sequence[Iterable[int]]
    ) -> Self:
        """Build from a weight update's three parallel lists. Raises ManifestError when lengths differ."""
        for label, other in (("dtype_names", dtype_names), ("shapes", shapes)):
            if len(other) != len(names):
                raise ManifestError(
                    PublishCode.UNEQUAL_LENGTHS,
                    f"{label} has {len(other)} entries but names has {len(names)}: give one for each tensor",
                )
        rows = zip(names, dtype_names, shapes, strict=True)
        return cls(tuple(TensorSpec(name, dtype, _sizes(name, shape)) for name, dtype, shape in rows))


def _sizes(name: str, shape: Any) -> tuple[int, ...]:
    try:
        return tuple(shape)
    except TypeError:
        raise ManifestError(
            PublishCode.BAD_SHAPE, f"tensor {name!r:.80} has shape {shape!r:.80}: give a list of sizes"
        ) from None


def _row(number: int, row: Any) -> TensorSpec:
    match row:
        case [str(name), str(dtype), list(shape)]:
            return TensorSpec(name, dtype, tuple(shape))
    raise ManifestError(PublishCode.MALFORMED, f"row {number} of the manifest is no [name, dtype, shape]")


def _check(tensors: tuple[TensorSpec, ...]) -> None:
    if not tensors:
        raise ManifestError(PublishCode.EMPTY, "there is no tensor to publish")
    if len(tensors) > MAX_TENSORS:
        raise ManifestError(
            PublishCode.TOO_LARGE,
            f"{len(tensors)} tensors: more than {MAX_TENSORS} can't be published at once",
        )
    seen: set[str] = set()
    total = 0
    for tensor in tensors:
        if type(tensor.name) is not str:
            raise ManifestError(PublishCode.BAD_NAME, f"tensor name {tensor.name!r:.80} is no text")
        if not (tensor.name.isprintable() and 0 < len(tensor.name.encode()) <= MAX_NAME_BYTES):
            raise ManifestError(
                PublishCode.BAD_NAME,
                f"tensor name {tensor.name[:64]!r}: give 1 to {MAX_NAME_BYTES} bytes of printable text",
            )
        if tensor.name in seen:
            raise ManifestError(PublishCode.DUPLICATE_NAME, f"tensor {tensor.name!r} is there twice")
        seen.add(tensor.name)
        if type(tensor.dtype) is not str or tensor.dtype not in DTYPE_BYTES:
            known = ", ".join(DTYPE_BYTES)
            raise ManifestError(
                PublishCode.UNKNOWN_DTYPE,
                f"tensor {tensor.name!r} has dtype {tensor.dtype!r:.80}: publish it as one of {known}",
            )
        sizes = tensor.shape
        if len(sizes) > MAX_DIMENSIONS or not all(type(n) is int and 0 <= n <= MAX_BYTES for n in sizes):
            raise ManifestError(
                PublishCode.BAD_SHAPE,
                f"tensor {tensor.name!r} has shape {list(sizes)!r:.200}: sizes are whole numbers from 0, "
                f"{MAX_DIMENSIONS} of them at most",
            )
        total += tensor.nbytes
        if total > MAX_BYTES:
            raise ManifestError(
                PublishCode.TOO_LARGE, f"with tensor {tensor.name!r} the version exceeds {MAX_BYTES:,} bytes"
            )
