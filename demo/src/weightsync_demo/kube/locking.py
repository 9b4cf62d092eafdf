"""One process at a time."""

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from weightsync_demo.waiting import wait_for


@contextmanager
def exclusive(path: Path, timeout: float, waiting: Callable[[], None]) -> Iterator[int]:
    """Hold the lock file `path`; yields its descriptor, which keeps the lock in any child that inherits it.

    `waiting` is called once if another process holds the lock. Raises TimeoutError after `timeout` seconds.
    The kernel lets go of the lock when its last holder ends, however it ends; the file itself is never
    removed, since a removed one could be locked twice.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        if not _locked(descriptor):
            waiting()
            wait_for(lambda: _locked(descriptor), timeout, f"the lock {path}", interval=0.5)
        yield descriptor
    finally:
        os.close(descriptor)


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
