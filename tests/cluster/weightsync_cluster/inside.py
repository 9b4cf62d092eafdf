"""Requests from within a network namespace, by a thread of this process."""

import ctypes
import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

_CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)


@contextmanager
def network_of(pid: int) -> Iterator[None]:
    """This thread, and none besides, is in the network namespace of process `pid` within the block.

    A socket stays in the namespace in which it was made.
    """
    with Path("/proc/thread-self/ns/net").open() as own, Path(f"/proc/{pid}/ns/net").open() as other:
        _enter(other.fileno())
        try:
            yield
        finally:
            _enter(own.fileno())


def _enter(descriptor: int) -> None:
    if _libc.setns(descriptor, _CLONE_NEWNET) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"setns: {os.strerror(error)}")


@dataclass(frozen=True)
class Answer:
    """What came back for a request."""

    status: int
    text: str


def get(url: str, timeout: float) -> Answer:
    """The answer to one GET, whatever its status; OSError where none comes within `timeout` s a step."""
    # The environment's proxies are of another network.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=timeout) as response:
            return Answer(response.status, response.read().decode())
    except urllib.error.HTTPError as error:
        with error:
            return Answer(error.code, error.read().decode())
    except HTTPException as error:
        raise OSError(f"{url}: {error!r}") from error
