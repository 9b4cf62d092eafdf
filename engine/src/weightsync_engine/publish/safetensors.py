"""Reads a safetensors file by hand: the format is a length, a JSON header and the data. No byte is trusted."""

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

from weightsync_contract.manifest import DTYPE_BYTES, ManifestError
from weightsync_contract.reasons import PublishCode
from weightsync_engine.publish.protocol import Description

_LENGTH_BYTES: Final = 8
_MAX_HEADER_BYTES: Final = 256 << 20
_PIECE_BYTES: Final = 1 << 20
_DTYPES: Final = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I16": "int16",
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "F32": "float32",
    "I64": "int64",
    "F64": "float64",
}


@dataclass(frozen=True)
class TensorFile:
    """An open file: what is in it, in the order of the data, and the bytes of each tensor.

    Read and not mapped: a file that is cut meanwhile would end the trainer (SIGBUS).
    """

    path: Path
    file: BinaryIO
    description: Description
    spans: tuple[tuple[int, int], ...]
    """Where each tensor lies in the file, in bytes from its start."""
    state: tuple[int, int]

    def tensor(self, index: int) -> Iterator[memoryview]:
        """The bytes of one tensor, each piece until the next. Raises ManifestError when the file has changed."""
        at, end = self.spans[index]
        buffer = memoryview(bytearray(min(end - at, _PIECE_BYTES)))
        while at < end:
            try:
                count = os.preadv(self.file.fileno(), [buffer[: end - at]], at)
            except OSError as error:
                raise ManifestError(PublishCode.BAD_FILE, f"{self.path} can't be read: {error}") from error
            if not count:
                break
            yield buffer[:count]
            at += count
        if at < end or _state(self.file) != self.state:
            raise ManifestError(PublishCode.BAD_FILE, f"{self.path} was changed while it was published")


@contextmanager
def read_file(path: Path) -> Iterator[TensorFile]:
    """Open a file. Raises ManifestError with BAD_FILE, naming what is wrong with it."""
    try:
        file = path.open("rb")
    except OSError as error:
        raise ManifestError(PublishCode.BAD_FILE, f"{path} can't be read: {error}") from error
    with file:
        yield _parse(path, file)


def _state(file: BinaryIO) -> tuple[int, int]:
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns


def _parse(path: Path, file: BinaryIO) -> TensorFile:
    try:
        state = _state(file)
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        start = _LENGTH_BYTES + length
        if length > _MAX_HEADER_BYTES or start > state[0]:
            raise _bad(path, f"its header is to have {length} bytes, but the file has {state[0]}")
        header = json.loads(file.read(length), object_pairs_hook=_once)
    except OSError as error:
        raise ManifestError(PublishCode.BAD_FILE, f"{path} can't be read: {error}") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, ManifestError):
            raise
        raise _bad(path, f"its header is no JSON: {error}") from error
    if not isinstance(header, dict):
        raise _bad(path, "its header is no JSON object")
    size = state[0] - start
    rows = sorted(
        (_row(path, name, entry, size) for name, entry in header.items() if name != "__metadata__"),
        key=lambda row: row[3],
    )
    at = 0
    for name, _, _, (begin, end) in rows:
        if begin < at:
            raise _bad(path, f"tensor {name!r} overlaps the one before it")
        at = end
    description = Description(tuple(r[0] for r in rows), tuple(r[1] for r in rows), tuple(r[2] for r in rows))
    spans = tuple((start + begin, start + end) for *_, (begin, end) in rows)
    return TensorFile(path, file, description, spans, state)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name is there twice")
    return found


def _row(path: Path, name: str, entry: Any, size: int) -> tuple[str, str, tuple[int, ...], tuple[int, int]]:
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(start), int(end)]}:
            pass
        case _:
            raise _bad(path, f"tensor {name!r} is described as {entry!r:.80}")
    if dtype not in _DTYPES:
        raise _bad(path, f"tensor {name!r} has dtype {dtype!r}: known are {', '.join(_DTYPES)}")
    if not all(type(each) is int and each >= 0 for each in shape):
        raise _bad(path, f"tensor {name!r} has shape {shape!r:.80}")
    wanted = math.prod(shape) * DTYPE_BYTES[_DTYPES[dtype]]
    if not 0 <= start <= end <= size or end - start != wanted:
        raise _bad(path, f"tensor {name!r} is to be {wanted} bytes, its data is {start} to {end} of {size}")
    return name, _DTYPES[dtype], tuple(shape), (start, end)


def _bad(path: Path, why: str) -> ManifestError:
    return ManifestError(PublishCode.BAD_FILE, f"{path}: {why}; write it again with the safetensors library")
