"""Where the sockets of an engine's processes are."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from weightsync_engine.worker.protocol import SOCKETS


def rank_sockets(directory: Path) -> dict[int, Path]:
    """The sockets of ranks that are or were there, by rank."""
    found = {path.stem: path for path in (directory / SOCKETS).glob("*.sock")}
    return {int(name): path for name, path in sorted(found.items()) if name.isdigit()}


def all_sockets(directory: Path) -> list[Path]:
    """The sockets of every process of the engine, those that serve the API included."""
    return sorted((directory / SOCKETS).glob("*.sock"))


def forget_ended(directory: Path) -> None:
    """Remove the sockets of API processes that ended. Raises OSError."""
    for path in (directory / SOCKETS).glob("api-*.sock"):
        if not Path(f"/proc/{path.stem.removeprefix('api-')}").exists():
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def short_name(path: Path) -> Iterator[str]:
    """An address for the socket at ``path`` that fits the kernel's 107 bytes, however long the path is."""
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)
