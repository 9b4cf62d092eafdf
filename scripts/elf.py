"""What a 64-bit little-endian ELF shared object needs and defines.

Pure Python, so that making the environment asks for a C compiler but not for readelf or nm.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SHT_DYNAMIC, SHT_DYNSYM = 6, 11
SHT_GNU_VERNEED, SHT_GNU_VERSYM = 0x6FFFFFFE, 0x6FFFFFFF
DT_NULL, DT_NEEDED = 0, 1
SHN_UNDEF = 0
# The high bit of a version index says that the symbol is hidden; it is no part of the number.
VERSION_MASK = 0x7FFF

_SECTION = struct.Struct("<IIQQQQIIQQ")
_SYMBOL = struct.Struct("<IBBHQQ")
_DYNAMIC = struct.Struct("<qQ")
_VERNEED = struct.Struct("<HHIII")
_VERNAUX = struct.Struct("<IHHII")


class NotElf(ValueError):
    """The file is no 64-bit little-endian ELF object."""


@dataclass(frozen=True)
class Version:
    """A symbol version and the library that is to provide it."""

    library: str
    name: str


@dataclass(frozen=True)
class SharedObject:
    needed: frozenset[str]
    defined: frozenset[str]
    undefined: dict[str, Version | None]


@dataclass(frozen=True)
class _Section:
    kind: int
    offset: int
    size: int
    link: int
    info: int


class _Reader:
    def __init__(self, data: mmap.mmap | bytes) -> None:
        if data[:6] != b"\x7fELF\x02\x01":
            raise NotElf("no 64-bit little-endian ELF header")
        self._data = data
        (start,) = struct.unpack_from("<Q", data, 0x28)
        size, count = struct.unpack_from("<HH", data, 0x3A)
        self._sections = [self._section(start + index * size) for index in range(count)]

    def _section(self, at: int) -> _Section:
        _, kind, _, _, offset, size, link, info, _, _ = _SECTION.unpack_from(self._data, at)
        return _Section(kind, offset, size, link, info)

    def _first(self, kind: int) -> _Section | None:
        return next((section for section in self._sections if section.kind == kind), None)

    def _string(self, table: int, at: int) -> str:
        start = self._sections[table].offset + at
        return self._data[start : self._data.find(b"\0", start)].decode()

    def needed(self) -> Iterator[str]:
        section = self._first(SHT_DYNAMIC)
        if section is None:
            return
        for at in range(section.offset, section.offset + section.size, _DYNAMIC.size):
            tag, value = _DYNAMIC.unpack_from(self._data, at)
            if tag == DT_NULL:
                return
            if tag == DT_NEEDED:
                yield self._string(section.link, value)

    def _versions(self) -> dict[int, Version]:
        section = self._first(SHT_GNU_VERNEED)
        found: dict[int, Version] = {}
        if section is None:
            return found
        at = section.offset
        for _ in range(section.info):
            _, count, library, first, step = _VERNEED.unpack_from(self._data, at)
            entry = at + first
            for _ in range(count):
                _, _, index, name, entry_step = _VERNAUX.unpack_from(self._data, entry)
                found[index & VERSION_MASK] = Version(
                    self._string(section.link, library), self._string(section.link, name)
                )
                entry += entry_step
            at += step
        return found

    def symbols(self) -> Iterator[tuple[str, bool, Version | None]]:
        """Name, whether it is defined here, and the version that is wanted of another library."""
        section, versym = self._first(SHT_DYNSYM), self._first(SHT_GNU_VERSYM)
        if section is None:
            return
        versions = self._versions()
        for number in range(1, section.size // _SYMBOL.size):
            at = section.offset + number * _SYMBOL.size
            name, _, _, index, _, _ = _SYMBOL.unpack_from(self._data, at)
            version = None
            if versym is not None:
                (wanted,) = struct.unpack_from("<H", self._data, versym.offset + 2 * number)
                version = versions.get(wanted & VERSION_MASK)
            yield self._string(section.link, name), index != SHN_UNDEF, version


def read(path: Path) -> SharedObject:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        reader = _Reader(data)
        defined: set[str] = set()
        undefined: dict[str, Version | None] = {}
        for name, here, version in reader.symbols():
            if here:
                defined.add(name)
            else:
                undefined[name] = version
        return SharedObject(frozenset(reader.needed()), frozenset(defined), undefined)
