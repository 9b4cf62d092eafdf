"""How staged memory is mapped, filled and given up."""

import fcntl
import itertools
import mmap
import os
import threading
import time
from collections.abc import Iterator

import pytest
import torch

from weightsync_engine.transfer import staging
from weightsync_engine.transfer.flat import broadcast_image, spans
from weightsync_engine.transfer.gloo import GlooCommunicator, GlooWork
from weightsync_engine.transfer.rendezvous import listen
from weightsync_engine.transfer.staging import Staging

PAGE = os.sysconf("SC_PAGESIZE")
NBYTES = 8 * PAGE + 256


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


def test_what_is_written_is_in_the_file(fd: int) -> None:
    content = os.urandom(NBYTES)
    mapped = Staging(fd, NBYTES)
    mapped.memory[:] = content
    mapped.close()
    assert os.pread(fd, NBYTES, 0) == content


def test_all_memory_is_had_before_anything_is_written(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weightsync_engine.transfer.staging.STEP_BYTES", PAGE)
    assert allocated(fd) == 0
    Staging(fd, NBYTES).close()
    assert allocated(fd) >= NBYTES


def test_a_file_that_is_mapped_is_not_sealed_and_one_that_was_closed_is(fd: int) -> None:
    mapped = Staging(fd, NBYTES)
    assert not seals(fd)
    mapped.close()
    assert seals(fd)


def test_closing_waits_for_who_still_has_a_piece(fd: int) -> None:
    mapped = Staging(fd, NBYTES)
    piece = memoryview(mapped.memory)[:256]
    closing = threading.Thread(target=mapped.close)
    closing.start()
    try:
        assert not seals(fd)
    finally:
        piece.release()
        closing.join(10)
    assert not closing.is_alive()
    assert seals(fd)


def test_a_file_that_can_not_be_written_is_no_staging(fd: int) -> None:
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    with pytest.raises(OSError, match="not permitted"):
        Staging(fd, NBYTES)


def test_memory_that_is_not_there_is_an_error_and_not_a_signal(fd: int) -> None:
    with mmap.mmap(fd, NBYTES, mmap.MAP_SHARED) as memory:
        # Past its end a file has no pages, as beyond a container's limit.
        os.ftruncate(fd, PAGE)
        with pytest.raises(OSError, match=rf"bytes {PAGE} to {2 * PAGE} of the staging have no memory"):
            staging._have(memory, fd, PAGE, PAGE)


@pytest.mark.parametrize("longest", [256, 5_000_000, 1 << 30])
def test_pieces_cover_the_image_in_order(longest: int) -> None:
    nbytes = (128 << 20) + 512 if longest > 256 else 1024
    pieces = list(spans(nbytes, longest))
    assert [pieces[0][0], pieces[-1][1]] == [0, nbytes]
    assert all(one[1] == other[0] for one, other in itertools.pairwise(pieces))
    assert all(0 < end - start <= longest for start, end in pieces)


class CountingGroup(GlooCommunicator):
    """A real group that remembers how many broadcasts were under way at once."""

    flying = most = 0

    def broadcast_async(self, tensor: torch.Tensor, src: int, seconds: float) -> GlooWork:
        self.flying += 1
        self.most = max(self.most, self.flying)
        return super().broadcast_async(tensor, src, seconds)


@pytest.mark.parametrize("in_flight", [1, 3])
def test_only_so_many_pieces_are_under_way_and_they_land_in_order(in_flight: int) -> None:
    group = CountingGroup(listen("127.0.0.1", 0, 1, "n", 10.0))
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
