"""The digest of a version: XXH3-128 over the layout id and then the flat image, streamed.

It finds what goes wrong by accident (flipped bits, torn or swapped chunks); it is no protection against
forgery.
"""

from typing import Final

import xxhash

ALGORITHM: Final = "xxh3-128"


class ImageDigest:
    """Takes the flat image in wire order, in pieces of any size."""

    def __init__(self, layout: str) -> None:
        self._hash = xxhash.xxh3_128(layout.encode("ascii"))

    def update(self, data: bytes | bytearray | memoryview) -> None:
        """Take the next bytes. Releases the GIL for long ones."""
        self._hash.update(data)

    def value(self) -> str:
        """``xxh3-128:<hex>`` of all that was taken."""
        return f"{ALGORITHM}:{self._hash.hexdigest()}"


def digest_image(layout: str, image: bytes | bytearray | memoryview) -> str:
    """The digest of a whole flat image."""
    digest = ImageDigest(layout)
    digest.update(image)
    return digest.value()
