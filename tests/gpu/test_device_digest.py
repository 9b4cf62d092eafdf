"""The digest taken on a GPU is the one that a CPU takes."""

import os

import pytest
import torch

from weightsync_engine.digest import LEAF_BYTES, digest_image
from weightsync_engine.transfer.cuda.leaves import DeviceDigest

pytestmark = pytest.mark.gpu

LAYOUT = "sha256:0"


def on_gpu(image: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(image), dtype=torch.uint8).cuda()


@pytest.mark.parametrize("nbytes", [256, LEAF_BYTES, 5 * LEAF_BYTES + 512, 64 << 20])
@pytest.mark.parametrize("step", [LEAF_BYTES // 2 + 256, 3 * LEAF_BYTES, 1 << 30])
def test_both_find_the_same_however_the_image_comes(nbytes: int, step: int) -> None:
    image = os.urandom(nbytes)
    digest = DeviceDigest(LAYOUT, on_gpu(image))
    for complete in range(min(step, nbytes), nbytes + 1, step):
        digest.update(complete)
    assert digest.value() == digest_image(LAYOUT, image)


@pytest.mark.parametrize("at", [0, LEAF_BYTES, 3 * LEAF_BYTES - 1, 5 * LEAF_BYTES + 511])
def test_a_flipped_bit_is_found_wherever_it_is(at: int) -> None:
    image = bytearray(os.urandom(5 * LEAF_BYTES + 512))
    before = digest_image(LAYOUT, image)
    image[at] ^= 1
    assert DeviceDigest(LAYOUT, on_gpu(image)).value() != before
