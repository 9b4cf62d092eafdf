"""The GPU's kernels for the digest, compiled for the CPU: what they compute is what xxhash computes."""

import ctypes
import os
import shutil
import struct
import subprocess

import pytest
import xxhash

from weightsync_engine.digest import LEAF_BYTES, digest_image, root
from weightsync_engine.transfer.cuda import source

THREADS = """
struct place { unsigned x; };
static struct place blockIdx, blockDim, threadIdx;
void run(int kernel, const void *image, unsigned long long nbytes, unsigned long long first,
         unsigned long long count, unsigned long long *sums, unsigned long long *found)
{
    unsigned threads = (unsigned)(kernel ? count : count * 8);
    blockDim.x = 64;
    for (blockIdx.x = 0; blockIdx.x * blockDim.x < threads; blockIdx.x++)
        for (threadIdx.x = 0; threadIdx.x < blockDim.x; threadIdx.x++)
            if (kernel) digests(sums, nbytes, count, found); else lanes(image, nbytes, first, count, sums);
}
"""


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which("cc") or shutil.which("gcc")
    assert compiler, "a C compiler is what the README asks for"
    folder = tmp_path_factory.mktemp("leaves")
    before, _, run = THREADS.partition("void run")
    text = before + source.leaves() + "\nvoid run" + run
    (folder / "leaves.c").write_text(text)
    library = folder / "leaves.so"
    subprocess.run(
        [compiler, "-O1", "-shared", "-fPIC", "-o", library, folder / "leaves.c"], check=True, timeout=60
    )
    return ctypes.CDLL(str(library))


def leaves_of(kernels: ctypes.CDLL, image: bytes, at_a_time: int) -> bytes:
    count = -(-len(image) // LEAF_BYTES)
    sums = (ctypes.c_uint64 * (count * 8))()
    found = (ctypes.c_uint64 * (count * 2))()
    # The kernels read pairs of words, aligned as device memory is.
    memory = ctypes.create_string_buffer(len(image) + 64)
    start = -ctypes.addressof(memory) % 64
    ctypes.memmove(ctypes.addressof(memory) + start, image, len(image))
    where = ctypes.c_void_p(ctypes.addressof(memory) + start)
    size = ctypes.c_uint64(len(image))
    for first in range(0, count, at_a_time):
        some = ctypes.c_uint64(min(at_a_time, count - first))
        kernels.run(0, where, size, ctypes.c_uint64(first), some, sums, found)
    kernels.run(1, where, size, ctypes.c_uint64(0), ctypes.c_uint64(count), sums, found)
    return b"".join(struct.pack(">QQ", found[at + 1], found[at]) for at in range(0, count * 2, 2))


@pytest.mark.parametrize("nbytes", [256, 1024, 1280, LEAF_BYTES, LEAF_BYTES + 256, 3 * LEAF_BYTES - 512])
@pytest.mark.parametrize("at_a_time", [1, 100])
def test_the_kernels_find_the_digest_that_the_cpu_finds(
    kernels: ctypes.CDLL, nbytes: int, at_a_time: int
) -> None:
    image = os.urandom(nbytes)
    found = leaves_of(kernels, image, at_a_time)
    assert found[:16] == xxhash.xxh3_128_digest(image[:LEAF_BYTES])
    assert root("sha256:0", found) == digest_image("sha256:0", image)
