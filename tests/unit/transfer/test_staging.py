"""How staged memory is mapped, filled and given up, segment by segment."""

import fcntl
import os
import time
from collections.abc import Iterator

import pytest
import torch

from weightsync_engine.transfer.flat import broadcast_image, spans
from weightsync_engine.transfer.gloo import GlooCommunicator, GlooWork
from weightsync_engine.transfer.staging import SEGMENT_BYTES, Staging, segment_bytes

PAGE = os.sysconf("SC_PAGESIZE")
SEGMENT = 4 * PAGE
NBYTES = 2 * SEGMENT + 256


@pytest.fixture
def fd() -> Iterator[int]:
    fd = os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, NBYTES)
    yield fd
    os.close(fd)


def allocated(fd: int) -> int:
    return os.fstat(fd).st_blocks * 512


def seals(fd: int) -> bool:
    try:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    except OSError:
        return False
    return True


@pytest.mark.parametrize("prepared", [True, False])
def test_what_is_written_by_segments_is_in_the_file(fd: int, prepared: bool) -> None:
    content = os.urandom(NBYTES)
    staging = Staging(fd, NBYTES, SEGMENT)
    if prepared:
        staging.prepare()
    for start in range(0, NBYTES, 1000):
        for at in range(start, min(start + 1000, NBYTES)):
            memory, offset = staging.place(at)
            memory[offset] = content[at]
    staging.close()
    assert os.pread(fd, NBYTES, 0) == content


def test_preparing_has_all_memory_and_a_place_has_its_segment(fd: int) -> None:
    staging = Staging(fd, NBYTES, SEGMENT)
    assert allocated(fd) == 0
    staging.place(SEGMENT + 5)
    assert allocated(fd) == SEGMENT
    staging.prepare()
    assert allocated(fd) >= NBYTES
    staging.close()


def test_a_segment_is_given_up_when_its_last_byte_is_there_and_not_before(fd: int) -> None:
    staging = Staging(fd, NBYTES, SEGMENT)
    staging.prepare()
    memory, _ = staging.place(0)
    staging.done(SEGMENT - 256)
    assert not memory.closed
    staging.done(SEGMENT)
    assert memory.closed
    assert not seals(fd)
    staging.done(2 * SEGMENT)
    assert not seals(fd)
    staging.done(NBYTES)
    assert seals(fd)


def test_a_file_with_anything_mapped_is_not_sealed_and_closing_maps_nothing(fd: int) -> None:
    staging = Staging(fd, NBYTES, SEGMENT)
    staging.prepare()
    assert not seals(fd)
    staging.close()
    assert seals(fd)


def test_a_file_that_can_not_be_written_is_no_staging(fd: int) -> None:
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    with pytest.raises(OSError, match="not permitted"):
        Staging(fd, NBYTES, SEGMENT).prepare()


@pytest.mark.parametrize(
    "nbytes", [256, SEGMENT_BYTES, SEGMENT_BYTES * 1024, SEGMENT_BYTES * 1024 + 256, 2 << 40]
)
def test_few_segments_however_large_the_image(nbytes: int) -> None:
    segment = segment_bytes(nbytes)
    assert segment % SEGMENT_BYTES == 0
    assert -(-nbytes // segment) <= 1024


@pytest.mark.parametrize("longest", [SEGMENT_BYTES, 5_000_000, 3 * SEGMENT_BYTES])
def test_no_piece_crosses_a_segment(longest: int) -> None:
    for start, end in spans(2 * SEGMENT_BYTES + 512, longest):
        assert start // SEGMENT_BYTES == (end - 1) // SEGMENT_BYTES


class CountingGroup(GlooCommunicator):
    """A real group that remembers how many broadcasts were under way at once."""

    flying = most = 0

    def broadcast_async(self, tensor: torch.Tensor, src: int, seconds: float) -> GlooWork:
        self.flying += 1
        self.most = max(self.most, self.flying)
        return super().broadcast_async(tensor, src, seconds)


@pytest.mark.parametrize("in_flight", [1, 3])
def test_only_so_many_pieces_are_under_way_and_they_land_in_order(in_flight: int) -> None:
    group = CountingGroup.join("127.0.0.1", 0, 0, 1, "n", 10.0)
    landed = []

    def done(start: int, end: int) -> None:
        group.flying -= 1
        landed.append((start, end))

    image = torch.zeros(10_000, dtype=torch.uint8)
    pieces = list(spans(10_000, 900))
    deadline = time.monotonic() + 10
    broadcast_image(group, lambda start, end: image[start:end], iter(pieces), in_flight, deadline, done)
    group.close()
    assert landed == pieces
    assert group.most == in_flight
