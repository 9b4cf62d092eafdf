"""The file that tells where an engine's memory on its GPU is, and how much an engine keeps."""

import os

import pytest
import torch

from weightsync_engine.transfer.cuda.place import Place
from weightsync_engine.worker.arena import open_arena, wanted_bytes

PLACE = Place("ab" * 64, 1 << 30, "GPU-0")


@pytest.fixture
def fd():
    fd = PLACE.write()
    yield fd
    os.close(fd)


def test_it_is_read_as_it_was_written(fd: int) -> None:
    assert Place.read(fd) == PLACE


def test_nobody_who_gets_it_can_change_it(fd: int) -> None:
    with pytest.raises(PermissionError):
        os.pwrite(fd, b"x", 0)
    with pytest.raises(PermissionError):
        os.ftruncate(fd, 0)


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b'{"handle": "00"}', b"\xff"])
def test_another_file_is_refused(content: bytes) -> None:
    fd = os.memfd_create("another")
    try:
        os.pwrite(fd, content, 0)
        with pytest.raises(ValueError, match=r"tells of no device memory|Expecting value"):
            Place.read(fd)
    finally:
        os.close(fd)


@pytest.mark.parametrize(
    ("value", "nbytes"),
    [("", 0), ("16GiB", 16 << 30), ("500 MB", 500 * 10**6), ("1024", 1024), ("auto", 1010 + (64 << 20))],
)
def test_an_engine_keeps_what_it_is_told(value: str, nbytes: int) -> None:
    assert wanted_bytes(value, 1000) == nbytes


@pytest.mark.parametrize("value", ["much", "-1", "1.5GiB", "16TiB"])
def test_what_is_no_size_is_refused_by_name(value: str) -> None:
    with pytest.raises(ValueError, match="WEIGHTSYNC_ARENA"):
        wanted_bytes(value, 1000)


def test_a_model_that_is_on_no_gpu_has_no_arena(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEIGHTSYNC_ARENA", "auto")
    with pytest.raises(ValueError, match="the model is on cpu"):
        open_arena(torch.device("cpu"), [torch.zeros(3)])
    monkeypatch.delenv("WEIGHTSYNC_ARENA")
    assert open_arena(torch.device("cpu"), [torch.zeros(3)]) is None
