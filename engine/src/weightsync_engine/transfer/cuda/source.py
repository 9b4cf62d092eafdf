"""The source text of our kernels, with the tables that they need. No CUDA here."""

import struct
from importlib.resources import files
from typing import Final

from weightsync_engine.digest import LEAF_BYTES

_SECRET: Final = bytes.fromhex(
    "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671fcb79e64eccc0e578825ad07dccff7221"
    "b8084674f743248ee03590e6813a264c3c2852bb91c300cb88d0658b1b532ea371644897a20df94e3819ef46a9deacd8"
    "a8fa763fe39c343ff9dcbbc7c70b4f1d8a51e04bcdb45931c89f7ec9d9787364eac5ac8334d3ebc3c581a0fffa1363eb"
    "170ddd51b7f0da49d316552629d4689e2b16be587d47a1fc8ff8b8d17ad031ce45cb3a8f95160428afd7fbcabb4b407e"
)
"""XXH3's own secret, used where none is given."""

_START: Final = (
    0xC2B2AE3D,
    0x9E3779B185EBCA87,
    0xC2B2AE3D27D4EB4F,
    0x165667B19E3779F9,
    0x85EBCA77C2B2AE63,
    0x85EBCA77,
    0x27D4EB2F165667C5,
    0x9E3779B1,
)
"""What XXH3's eight accumulators begin with."""


def leaves() -> str:
    """The kernels that hash an image's leaves."""
    text = files(__package__).joinpath("leaves.c").read_text()
    tables = {
        "START": _START,
        "SECRET": _words(0, 24),
        "LAST": _words(192 - 64 - 7, 8),
        "LOW": _words(11, 8),
        "HIGH_OF": _words(192 - 64 - 11, 8),
    }
    lines = [f"#define LEAF_BYTES {LEAF_BYTES}ULL"]
    lines += [
        f"#define {name} {{{', '.join(f'{word:#x}ULL' for word in words)}}}" for name, words in tables.items()
    ]
    lines += [
        "#ifdef __CUDACC__",
        "#define TABLE __constant__",
        "#define DEVICE __device__ __forceinline__",
        "#else",
        "#define TABLE const",
        "#define DEVICE inline",
        "#endif",
    ]
    return "\n".join((*lines, text))


def _words(offset: int, count: int) -> tuple[int, ...]:
    return struct.unpack_from(f"<{count}Q", _SECRET, offset)
