"""What the digest finds."""

import os

import pytest

from weightsync_engine.digest import LEAF_BYTES, ImageDigest, digest_image

LAYOUT = "sha256:" + "0" * 64
IMAGE = os.urandom(2 * LEAF_BYTES + 4096)


def test_it_does_not_depend_on_how_the_image_is_cut() -> None:
    whole = digest_image(LAYOUT, IMAGE)
    for size in (7, 4096, LEAF_BYTES, LEAF_BYTES + 1, len(IMAGE)):
        digest = ImageDigest(LAYOUT)
        for start in range(0, len(IMAGE), size):
            digest.update(IMAGE[start : start + size])
        assert digest.value() == whole


def test_it_names_its_algorithm() -> None:
    name, _, value = digest_image(LAYOUT, IMAGE).partition(":")
    assert name == "xxh3-128-tree"
    assert len(value) == 32


def flipped(image: bytes) -> bytes:
    out = bytearray(image)
    out[12345] ^= 1
    return bytes(out)


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(flipped(IMAGE), id="one bit flipped"),
        pytest.param(IMAGE[8:16] + IMAGE[:8] + IMAGE[16:], id="two words swapped"),
        pytest.param(
            IMAGE[LEAF_BYTES : 2 * LEAF_BYTES] + IMAGE[:LEAF_BYTES] + IMAGE[2 * LEAF_BYTES :],
            id="two leaves swapped",
        ),
        pytest.param(IMAGE[:-1], id="a byte short"),
        pytest.param(IMAGE + b"\0", id="a zero too many"),
        pytest.param(IMAGE[:4096] + bytes(4096) + IMAGE[8192:], id="a page that never came"),
    ],
)
def test_other_bytes_have_another_digest(other: bytes) -> None:
    assert digest_image(LAYOUT, other) != digest_image(LAYOUT, IMAGE)


def test_equal_bytes_of_another_layout_have_another_digest() -> None:
    assert digest_image("sha256:" + "1" * 64, IMAGE) != digest_image(LAYOUT, IMAGE)
