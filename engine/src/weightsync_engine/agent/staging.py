"""Staged memory: anonymous, passed by descriptor, and sealed once what is in it was verified.

Memory that can't be had is an answer before a byte moves, not a kill by the kernel in mid-transfer.
"""

import errno
import fcntl
import os
from pathlib import Path
from typing import Final

_SEALS: Final = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_MEMINFO: Final = Path("/proc/meminfo")
_CGROUP: Final = Path("/sys/fs/cgroup")
RESERVE_BYTES: Final = 64 << 20
"""Left for the agent and its child beside the staged version."""


class StagingError(Exception):
    """Memory can't be had or can't be sealed; the message says why and what to do."""


class StagingArea:
    """The pieces of memory that an agent holds, by slot: its own, or its engine's."""

    def __init__(self, meminfo: Path = _MEMINFO, cgroup: Path = _CGROUP) -> None:
        self._fds: dict[int, int] = {}
        self._adopted: set[int] = set()
        self._dropped = 0
        self._meminfo, self._cgroup = meminfo, cgroup

    def create(self, slot: int, nbytes: int) -> int:
        """Have a file of ``nbytes`` in memory; its descriptor stays ours. Raises StagingError."""
        room = available(self._meminfo, self._cgroup)
        if room is not None and nbytes + RESERVE_BYTES > room:
            raise StagingError(
                f"staging needs {_mib(nbytes)} and {_mib(RESERVE_BYTES)} beside it, but "
                f"{_mib(room)} are free: "
                "raise the memory limit of the agent's container, or free memory on the node"
            )
        try:
            fd = os.memfd_create(f"weightsync-{slot}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            try:
                os.ftruncate(fd, nbytes)
            except OSError:
                os.close(fd)
                raise
        except OSError as error:
            raise StagingError(f"no memory file of {_mib(nbytes)} for staging: {error.strerror}") from error
        self._fds[slot] = fd
        return fd

    def adopt(self, slot: int, fd: int) -> bool:
        """Take a descriptor that tells where memory of the engine's own is; False if the slot was dropped meanwhile.

        Then the descriptor is closed. The engine keeps what is there: sealing it changes nothing.
        """
        if slot <= self._dropped:
            os.close(fd)
            return False
        self._fds[slot] = fd
        self._adopted.add(slot)
        return True

    def seal(self, slot: int) -> None:
        """Nobody can write, shrink or grow it any more, the agent itself included. Raises StagingError."""
        if slot in self._adopted:
            return
        try:
            fcntl.fcntl(self.fd(slot), fcntl.F_ADD_SEALS, _SEALS)
        except OSError as error:
            why = "somebody still has it mapped for writing" if error.errno == errno.EBUSY else error.strerror
            raise StagingError(f"the staged memory can't be sealed: {why}") from error

    def fd(self, slot: int) -> int:
        """The descriptor of a slot. Raises StagingError when there is no such slot."""
        if slot not in self._fds:
            raise StagingError(f"there is no staged memory {slot}")
        return self._fds[slot]

    def drop(self, slot: int) -> None:
        """Give it back; idempotent. Whoever still has it mapped keeps it alive until then."""
        self._dropped = max(self._dropped, slot)
        self._adopted.discard(slot)
        fd = self._fds.pop(slot, None)
        if fd is not None:
            os.close(fd)

    def close(self) -> None:
        """Give all back."""
        for slot in tuple(self._fds):
            self.drop(slot)


def available(meminfo: Path = _MEMINFO, cgroup: Path = _CGROUP) -> int | None:
    """Bytes that this process may still have: the machine's or its cgroup's. None if nobody says."""
    rooms = [room for room in (_machine(meminfo), _group(cgroup)) if room is not None]
    return min(rooms, default=None)


def _machine(meminfo: Path) -> int | None:
    try:
        for line in meminfo.read_text().splitlines():
            name, _, value = line.partition(":")
            if name == "MemAvailable":
                return int(value.split()[0]) * 1024
    except (OSError, ValueError, IndexError):
        return None
    return None


def _group(cgroup: Path) -> int | None:
    """cgroup v2: the limit, less what is used and can't be taken back at once."""
    try:
        limit = (cgroup / "memory.max").read_text().strip()
        if limit == "max":
            return None
        used = int((cgroup / "memory.current").read_text())
        statistics = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
        return int(limit) - used + int(statistics.get("inactive_file", 0))
    except (OSError, ValueError):
        return None


def _mib(nbytes: int) -> str:
    return f"{nbytes / (1 << 20):,.0f} MiB"
