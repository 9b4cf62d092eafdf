"""The journal on disk: what survives, and what is not believed."""

import errno
import os
from dataclasses import replace

import pytest

from weightsync_contract.messages import ServingState, VersionId
from weightsync_engine.agent import journal as module
from weightsync_engine.agent.core.journal import Journal, Record, Seen
from weightsync_engine.agent.journal import JournalFile

APPLYING = Record(ServingState.APPLYING, "b1", VersionId("run", 2), "d2", weightsync="cr-1")
SERVING = Record(ServingState.SERVING, "b1", VersionId("run", 1), "d1", fences=(1.5, 2.5), weightsync="cr-1")
ENTRIES = [Seen("cr-1", 1), SERVING, Seen("cr-2", 7, 3), Seen("cr-1", 2, 9), APPLYING]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "journal"


def write(path, entries):
    file = JournalFile(path)
    for entry in entries:
        file.write(entry)
    file.close()


def read(path):
    file = JournalFile(path)
    file.close()
    return file.journal


def test_what_was_written_is_read(path):
    write(path, ENTRIES)
    journal = read(path)
    assert journal.record == APPLYING
    assert set(journal.seen) == {Seen("cr-1", 2, 9), Seen("cr-2", 7, 3)}
    assert not journal.corrupt
    assert journal.highest_term == 7


def test_no_journal_is_an_empty_one(path):
    assert read(path) == Journal()


def test_every_cut_of_the_last_line_leaves_what_was_before(path):
    write(path, ENTRIES[:-1])
    before, whole = read(path), path.stat().st_size
    write(path, ENTRIES[-1:])
    data = path.read_bytes()
    for length in range(whole, len(data)):
        path.write_bytes(data[:length])
        assert read(path) == before, length
        assert path.stat().st_size == whole, "a torn line is cut off, so that the next one is whole"


def test_a_torn_line_does_not_spoil_the_next(path):
    write(path, [SERVING])
    with path.open("ab") as file:
        file.write(b'0000dead {"kind":')
    write(path, [APPLYING])
    assert read(path).record == APPLYING


def test_a_last_line_of_which_not_every_page_arrived_is_torn(path):
    write(path, [SERVING, APPLYING])
    data = bytearray(path.read_bytes())
    data[-20:-1] = bytes(19)
    path.write_bytes(data)
    journal = read(path)
    assert journal.record == SERVING
    assert not journal.corrupt


def test_a_last_line_of_zeros_is_torn(path):
    write(path, [SERVING])
    with path.open("ab") as file:
        file.write(bytes(100))
    assert read(path).record == SERVING


@pytest.mark.parametrize("line", [0, 1, 3])
def test_any_other_changed_line_makes_the_record_unknown(path, line):
    write(path, ENTRIES)
    lines = path.read_bytes().splitlines(keepends=True)
    lines[line] = lines[line].replace(b"cr-", b"cX-")
    path.write_bytes(b"".join(lines))
    journal = read(path)
    assert journal.corrupt
    assert journal.record is None
    assert journal.highest_term == 7


def test_a_line_of_another_kind_is_not_skipped(path):
    write(path, [SERVING])
    body = b'{"kind":"later"}'
    data = path.read_bytes()
    path.write_bytes(b"%08x %s\n" % (module.zlib.crc32(body), body) + data)
    assert read(path).corrupt


def test_what_can_not_be_read_stays_so_until_a_record_says_all(path):
    write(path, ENTRIES)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"xx" + b"".join(lines))
    write(path, [Seen("cr-1", 3)])
    assert read(path).corrupt, "a term says nothing about the engine"
    fenced = Record(ServingState.FENCED, "b1")
    write(path, [fenced])
    journal = read(path)
    assert journal.record == fenced
    assert not journal.corrupt
    assert journal.of("cr-1").term == 3


def test_a_long_journal_is_rewritten_as_what_it_says(path, monkeypatch):
    monkeypatch.setattr(module, "COMPACT_LINES", 10)
    write(path, [Seen("cr-1", 4, 2)])
    write(path, [Record(ServingState.SERVING, f"b{number}") for number in range(100)])
    journal = read(path)
    assert journal.record.boot == "b99"
    assert journal.of("cr-1") == Seen("cr-1", 4, 2)
    assert len(path.read_bytes().splitlines()) <= 11


def test_a_crash_in_a_rewrite_leaves_the_journal(path, monkeypatch):
    monkeypatch.setattr(module, "COMPACT_LINES", 1)
    write(path, [SERVING])

    def no_space(*_):
        raise OSError(errno.ENOSPC, "no space left on device")

    file = JournalFile(path)
    monkeypatch.setattr(module.os, "fsync", no_space)
    with pytest.raises(OSError, match="no space"):
        file.write(APPLYING)
    monkeypatch.undo()
    file.close()
    assert read(path).record == SERVING


def test_a_write_that_fails_leaves_no_half_line(path, monkeypatch):
    file = JournalFile(path)
    file.write(SERVING)
    real = os.write

    def half(fd, data):
        if len(data) > 5:
            return real(fd, data[:-5])
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr(module.os, "write", half)
    with pytest.raises(OSError, match="no space"):
        file.write(replace(APPLYING, message="longer than what is written next" * 10))
    monkeypatch.undo()
    assert file.journal.record == SERVING
    file.write(Record(ServingState.WITHHELD, "b1"))
    file.close()
    journal = read(path)
    assert journal.record.state is ServingState.WITHHELD
    assert not journal.corrupt


def test_an_entry_is_durable_before_write_returns(path, monkeypatch):
    synced = []
    real = os.fdatasync
    monkeypatch.setattr(module.os, "fdatasync", lambda fd: (synced.append(path.stat().st_size), real(fd)))
    file = JournalFile(path)
    file.write(SERVING)
    file.close()
    assert synced == [path.stat().st_size]
