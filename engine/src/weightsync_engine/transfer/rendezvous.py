"""Where the ranks of a group meet: rank 0's store, reached by its endpoint and the epoch's nonce.

Whatever library moves the bytes later, here it shows who is missing, and that all mean the same group: its nonce,
its size, and the same version of the same library. Connecting alone would tell none of it, or hang.

torch's own names for what is used here begin with an underscore or are not documented; torch is pinned, and a
contract test holds them.
"""

import contextlib
import hashlib
import json
import re
import socket
import time
from datetime import timedelta
from typing import Final

from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from weightsync_engine.transfer.communicator import RendezvousError, RendezvousTimeoutError

LEAST_SECONDS: Final = 0.001
_GROUP: Final = "weightsync/group"
_WHERE: Final = re.compile(r"^\[[^\]]*\] ")
_ADVICE: Final = " This is typically caused by"


class Meeting:
    """One rank's place in the store of a group that is to come about until ``deadline`` (monotonic seconds)."""

    def __init__(
        self, store: TCPStore, host: str, rank: int, world_size: int, nonce: str, deadline: float
    ) -> None:
        self.host = host
        """This rank's own address, of the interface that leads to the others."""
        self.port: int = store.port
        self.rank, self.world_size, self.deadline = rank, world_size, deadline
        self._store, self._nonce = store, nonce

    @property
    def left(self) -> float:
        """Seconds until the deadline; never 0."""
        return max(self.deadline - time.monotonic(), LEAST_SECONDS)

    def enter(self) -> None:
        """Be seen by the others. Raises RendezvousError when another process is this rank."""
        if self._store.add(self._key(f"rank/{self.rank}"), 1) != 1:
            raise RendezvousError(f"another process is rank {self.rank} of this group already")

    def store(self, name: str) -> PrefixStore:
        """A part of the store for a library that meets by itself."""
        return PrefixStore(self._key(name), self._store)

    def tell(self, name: str, data: bytes) -> None:
        """Rank 0: say something to all."""
        self._store.set(self._key(name), data.hex())

    def hear(self, name: str) -> bytes:
        """What rank 0 said. Raises RendezvousTimeoutError at the deadline."""
        try:
            self._store.wait([self._key(name)], timedelta(seconds=self.left))
            return bytes.fromhex(self._store.get(self._key(name)).decode())
        except RuntimeError as error:
            raise RendezvousTimeoutError(f"rank 0 never told {name}: {plain(error)}") from error

    def gather(self) -> None:
        """Return once every rank has entered. Raises RendezvousTimeoutError, naming those that did not."""
        try:
            ranks = [self._key(f"rank/{rank}") for rank in range(self.world_size)]
            self._store.wait(ranks, timedelta(seconds=self.left))
        except RuntimeError as error:
            raise self.failed(plain(error)) from error

    def failed(self, why: str) -> RendezvousError:
        """What to raise when the group did not come about: in time, ``why``; too late, who is missing."""
        if time.monotonic() < self.deadline:
            return RendezvousError(
                f"rank {self.rank} of {self.world_size} could not connect to all others: {why}"
            )
        late = f"rank {self.rank} of {self.world_size} could not connect to all others in time"
        with contextlib.suppress(RuntimeError):
            ranks = range(self.world_size)
            absent = [str(rank) for rank in ranks if not self._store.check([self._key(f"rank/{rank}")])]
            if absent:
                late = f"{late}: {', '.join(absent)} never came"
        return RendezvousTimeoutError(late)

    def _key(self, name: str) -> str:
        return f"weightsync/{self._nonce}/{name}"


def listen(host: str, port: int, world_size: int, nonce: str, seconds: float, library: str = "") -> Meeting:
    """Be rank 0, bound before anybody is told where it is; port 0 takes a free one, see ``Meeting.port``.

    ``library`` is what all ranks must have, as in ``NCCL 2.32.3``. Raises RendezvousError when the port is taken.
    """
    try:
        # On that address only; the store by itself would listen on all.
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family)
    except OSError as error:
        raise RendezvousError(
            f"rank 0 can't listen at {host}:{port}: {error.strerror}; another process may "
            "have the port: set transport.port to 0 or to a free one"
        ) from error
    bound: int = listener.getsockname()[1]
    store = TCPStore(
        host,
        bound,
        None,
        True,
        timedelta(seconds=seconds),
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )
    group = {"nonce": _hash(nonce), "world_size": world_size, "library": library}
    store.set(_GROUP, json.dumps(group))
    return Meeting(store, host, 0, world_size, nonce, time.monotonic() + seconds)


def reach(
    host: str, port: int, rank: int, world_size: int, nonce: str, seconds: float, library: str = ""
) -> Meeting:
    """Be another rank. Raises RendezvousError for a group that is not the one that is meant."""
    deadline = time.monotonic() + seconds
    if not 0 < rank < world_size:
        raise RendezvousError(f"rank {rank} is none of a group of {world_size}")
    try:
        store = TCPStore(host, port, None, False, timedelta(seconds=seconds), wait_for_workers=False)
    except RuntimeError as error:
        raise RendezvousTimeoutError(f"nobody listens at {host}:{port}: {plain(error)}") from error
    _same_group(store, nonce, world_size, library, f"{host}:{port}")
    return Meeting(store, _own_address(host, port), rank, world_size, nonce, deadline)


def plain(error: RuntimeError) -> str:
    """What torch says, without its source's line and its advice about other people's logs."""
    return _WHERE.sub("", str(error).splitlines()[0]).split(_ADVICE)[0]


def _hash(nonce: str) -> str:
    """What may be told to a stranger."""
    return hashlib.sha256(nonce.encode()).hexdigest()


def _same_group(store: TCPStore, nonce: str, world_size: int, library: str, endpoint: str) -> None:
    """Whoever listens there must mean the same group: a stale rank 0 of another epoch is no peer."""
    try:
        # Waits: we may be faster than rank 0, between its listening and its saying for what.
        found = json.loads(store.get(_GROUP))
    except RuntimeError as error:
        raise RendezvousTimeoutError(f"whoever listens at {endpoint} is no rank 0: {plain(error)}") from error
    if found["nonce"] != _hash(nonce):
        raise RendezvousError(f"{endpoint} belongs to another epoch: its nonce is not ours")
    if found["world_size"] != world_size:
        raise RendezvousError(
            f"rank 0 at {endpoint} expects {found['world_size']} ranks, this one {world_size}"
        )
    if found.get("library", "") != library:
        theirs = found.get("library") or "another library"
        raise RendezvousError(
            f"rank 0 at {endpoint} has {theirs}, this rank {library or 'another one'}: "
            "give all agents the same image"
        )


def _own_address(host: str, port: int) -> str:
    """The address of the interface that leads to rank 0: peers must reach it."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, port))
        return str(probe.getsockname()[0])
