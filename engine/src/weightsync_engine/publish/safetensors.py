"""Reads a safetensors file by hand: the format is a length, a JSON header and the data. No byte is trusted."""

import json
import math
import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from weightsync_contract.manifest import DTYPE_BYTES, ManifestError
from weightsync_contract.reasons import PublishCode
from weightsync_engine.publish.protocol import Description

_LENGTH_BYTES: Final = 8
_MAX_HEADER_BYTES: Final = 256 << 20
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
    """An open file: what is in it, in the order of the data, and the bytes of each tensor."""

    description: Description
    spans: tuple[tuple[int, int], ...]
    view: memoryview

    def tensor(self, index: int) -> memoryview:
        """The bytes of one tensor."""
        start, end = self.spans[index]
        return self.view[start:end]


@contextmanager
def read_file(path: Path) -> Iterator[TensorFile]:
    """Map a file. Raises ManifestError with BAD_FILE, naming what is wrong with it."""
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            if size < _LENGTH_BYTES:
                raise _bad(path, f"{size} bytes are no safetensors file")
            # Never closed by hand: an error on its way up may still hold a view of it.
            memory = memoryview(mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ))
            yield _parse(path, memory)
    except OSError as error:
        raise _bad(path, str(error)) from error


def _parse(path: Path, view: memoryview) -> TensorFile:
    length = int.from_bytes(view[:_LENGTH_BYTES], "little")
    if length > min(_MAX_HEADER_BYTES, len(view) - _LENGTH_BYTES):
        raise _bad(path, f"its header is to have {length} bytes, but the file has {len(view)}")
    try:
        header = json.loads(bytes(view[_LENGTH_BYTES : _LENGTH_BYTES + length]))
    except (ValueError, RecursionError) as error:
        raise _bad(path, f"its header is no JSON: {error}") from error
    if not isinstance(header, dict):
        raise _bad(path, "its header is no JSON object")
    data = view[_LENGTH_BYTES + length :]
    rows = sorted(
        (_row(path, name, entry, len(data)) for name, entry in header.items() if name != "__metadata__"),
        key=lambda row: row[3],
    )
    at = 0
    for name, _, _, (start, end) in rows:
        if start < at:
            raise _bad(path, f"tensor {name!r} overlaps the one before it")
        at = end
    return TensorFile(
        Description(tuple(r[0] for r in rows), tuple(r[1] for r in rows), tuple(r[2] for r in rows)),
        tuple(r[3] for r in rows),
        data,
    )


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
