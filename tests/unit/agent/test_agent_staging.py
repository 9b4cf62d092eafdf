"""Staged memory: what is sealed can't be changed, and what can't be had is said before."""

import mmap
import os

import pytest

from weightsync_engine.agent.staging import RESERVE_BYTES, StagingArea, StagingError, available

PAGES = 1 << 16


@pytest.fixture
def area():
    area = StagingArea()
    yield area
    area.close()


def test_what_is_sealed_can_be_read_and_not_changed(area):
    fd = area.create(1, PAGES)
    os.pwrite(fd, b"weights", 0)
    area.seal(1)
    assert os.pread(fd, 7, 0) == b"weights"
    for change in (
        lambda: os.pwrite(fd, b"x", 0),
        lambda: os.ftruncate(fd, 0),
        lambda: os.ftruncate(fd, 2 * PAGES),
        lambda: mmap.mmap(fd, PAGES),
    ):
        with pytest.raises(OSError, match="not permitted"):
            change()
    with mmap.mmap(fd, PAGES, prot=mmap.PROT_READ) as view:
        assert view[:7] == b"weights"


def test_what_somebody_can_still_write_is_not_sealed(area):
    fd = area.create(1, PAGES)
    with mmap.mmap(fd, PAGES), pytest.raises(StagingError, match="mapped for writing"):
        area.seal(1)
    area.seal(1)


def test_dropped_memory_is_gone_and_others_are_not(area):
    area.create(1, PAGES)
    kept = area.create(2, PAGES)
    area.drop(1)
    area.drop(1)
    with pytest.raises(StagingError, match="no staged memory 1"):
        area.fd(1)
    assert area.fd(2) == kept


def machine(tmp_path, available_kib, limit="max", current=0, inactive=0):
    meminfo, cgroup = tmp_path / "meminfo", tmp_path / "cgroup"
    meminfo.write_text(f"MemTotal: 99999999 kB\nMemAvailable: {available_kib} kB\n")
    cgroup.mkdir()
    (cgroup / "memory.max").write_text(f"{limit}\n")
    (cgroup / "memory.current").write_text(f"{current}\n")
    (cgroup / "memory.stat").write_text(f"anon 5\ninactive_file {inactive}\n")
    return meminfo, cgroup


@pytest.mark.parametrize(
    ("given", "free"),
    [
        ({}, 1 << 30),
        ({"limit": 1 << 29}, 1 << 29),
        ({"limit": 1 << 29, "current": 1 << 28}, 1 << 28),
        ({"limit": 1 << 29, "current": 1 << 28, "inactive": 1 << 27}, (1 << 28) + (1 << 27)),
        ({"limit": 1 << 40}, 1 << 30),
    ],
)
def test_room_is_the_machines_or_the_containers(tmp_path, given, free):
    assert available(*machine(tmp_path, 1 << 20, **given)) == free


def test_memory_that_is_not_there_is_not_promised(tmp_path):
    area = StagingArea(*machine(tmp_path, 1 << 20))
    room = (1 << 30) - RESERVE_BYTES
    with pytest.raises(StagingError, match=r"needs 961 MiB.* 1,024 MiB are free: raise the memory limit"):
        area.create(1, room + (1 << 20))
    area.create(1, room)
    area.close()


def test_a_machine_that_says_nothing_is_believed_to_have_room(tmp_path):
    assert available(tmp_path / "none", tmp_path / "nowhere") is None
