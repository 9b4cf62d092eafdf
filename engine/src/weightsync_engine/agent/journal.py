"""The journal on disk: one line a change, each with a checksum, durable before anything rests on it.

A torn last line is what a crash leaves: nothing rested on it yet, so it is dropped. Any other line that can't
be read means that something which was durable is lost, and the whole record counts as unknown.
"""

import json
import os
import zlib
from pathlib import Path
from typing import Final

from weightsync_contract.codec import MalformedError, from_document, to_document
from weightsync_engine.agent.core.journal import Entry, Journal, Record, Seen

COMPACT_LINES: Final = 512
"""A longer journal is rewritten as what its lines add up to."""

_KINDS: Final[dict[str, type[Entry]]] = {"record": Record, "seen": Seen}


class JournalFile:
    """An open journal. Not for two writers: one agent owns its state directory."""

    def __init__(self, path: Path) -> None:
        """Read what is there, and cut off a torn last line. Raises OSError."""
        self._path = path
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            data = path.read_bytes()
            self._journal, self._lines, self._length = _read(data)
            if self._length != len(data):
                os.ftruncate(self._file, self._length)
            os.lseek(self._file, self._length, os.SEEK_SET)
            _sync_directory(path.parent)
        except BaseException:
            self.close()
            raise

    @property
    def journal(self) -> Journal:
        """What the lines add up to."""
        return self._journal

    def write(self, entry: Entry) -> None:
        """Make ``entry`` durable. Raises OSError; it may then be there or not."""
        journal = self._journal.add(entry)
        if isinstance(entry, Record) and (journal.corrupt or self._lines >= COMPACT_LINES):
            # A record says all about the serving side: what could not be read does not matter any more.
            self._rewrite(Journal(journal.record, journal.seen))
            return
        line = _line(entry)
        try:
            _write_all(self._file, line)
            os.fdatasync(self._file)
        except OSError:
            # The next line goes over what is left of this one; a rest of it behind that is a torn last line.
            os.lseek(self._file, self._length, os.SEEK_SET)
            raise
        self._journal, self._lines, self._length = journal, self._lines + 1, self._length + len(line)

    def close(self) -> None:
        """Close the file; idempotent."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _rewrite(self, journal: Journal) -> None:
        entries: list[Entry] = [*journal.seen]
        if journal.record:
            entries.append(journal.record)
        data = b"".join(_line(entry) for entry in entries)
        scratch = self._path.with_name(self._path.name + ".new")
        file = os.open(scratch, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            _write_all(file, data)
            os.fsync(file)
            scratch.replace(self._path)
            _sync_directory(self._path.parent)
        except OSError:
            os.close(file)
            raise
        self.close()
        self._file, self._journal, self._lines, self._length = file, journal, len(entries), len(data)


def _line(entry: Entry) -> bytes:
    kind = "record" if isinstance(entry, Record) else "seen"
    body = json.dumps({"kind": kind, **to_document(entry)}, separators=(",", ":")).encode()
    return b"%08x %s\n" % (zlib.crc32(body), body)


def _read(data: bytes) -> tuple[Journal, int, int]:
    """The journal, its lines, and the length up to which they are whole."""
    journal, length = Journal(), 0
    lines = data.split(b"\n")
    torn, whole = lines[-1], lines[:-1]
    for number, line in enumerate(whole):
        entry = _entry(line)
        if entry is not None:
            journal = journal.add(entry)
        elif number == len(whole) - 1 and not torn:
            return journal, number, length
        else:
            journal = Journal(None, journal.seen, corrupt=True)
        length += len(line) + 1
    if journal.corrupt:
        journal = Journal(None, journal.seen, corrupt=True)
    return journal, len(whole), length


def _entry(line: bytes) -> Entry | None:
    checksum, _, body = line.partition(b" ")
    try:
        if int(checksum, 16) != zlib.crc32(body):
            return None
        document = json.loads(body)
        return from_document(_KINDS[document["kind"]], document)
    except (ValueError, KeyError, TypeError, MalformedError):
        return None


def _write_all(file: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]


def _sync_directory(path: Path) -> None:
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
