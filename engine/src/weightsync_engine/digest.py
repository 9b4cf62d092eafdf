"""The digest of a version: XXH3-128 of the layout id and of the XXH3-128 of each 128 KiB of the flat image.

It finds what goes wrong by accident (flipped bits, torn or swapped chunks); it is no protection against
forgery. Leaves can be hashed in any order and side by side, by a GPU too (``transfer.cuda.leaves``).
"""

from typing import Final

import xxhash

ALGORITHM: Final = "xxh3-128-tree"
LEAF_BYTES: Final = 128 << 10
"""Bytes that are hashed as one; only the last leaf may be shorter."""


class ImageDigest:
    """Takes the flat image in wire order, in pieces of any size."""

    def __init__(self, layout: str) -> None:
        self._layout = layout
        self._leaves = bytearray()
        self._leaf = xxhash.xxh3_128()
        self._filled = 0
        """Bytes of the leaf that has begun."""

    def update(self, data: bytes | bytearray | memoryview) -> None:
        """Take the next bytes."""
        with memoryview(data) as view:
            at = 0
            if self._filled:
                at = min(LEAF_BYTES - self._filled, len(view))
                self._begun(view[:at])
            while at + LEAF_BYTES <= len(view):
                self._leaves += xxhash.xxh3_128_digest(view[at : at + LEAF_BYTES])
                at += LEAF_BYTES
            self._begun(view[at:])

    def _begun(self, part: memoryview) -> None:
        self._leaf.update(part)
        self._filled += len(part)
        if self._filled == LEAF_BYTES:
            self._leaves += self._leaf.digest()
            self._leaf, self._filled = xxhash.xxh3_128(), 0

    def value(self) -> str:
        """``xxh3-128-tree:<hex>`` of all that was taken."""
        last = self._leaf.digest() if self._filled else b""
        return root(self._layout, bytes(self._leaves) + last)


def root(layout: str, leaves: bytes) -> str:
    """The digest of the image whose leaves, in order, have these 16 bytes each (big-endian, as xxhash gives)."""
    top = xxhash.xxh3_128(layout.encode("ascii"))
    top.update(leaves)
    return f"{ALGORITHM}:{top.hexdigest()}"


def digest_image(layout: str, image: bytes | bytearray | memoryview) -> str:
    """The digest of a whole flat image."""
    digest = ImageDigest(layout)
    digest.update(image)
    return digest.value()
