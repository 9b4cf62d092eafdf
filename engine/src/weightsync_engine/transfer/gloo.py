"""A gloo group of its own: neither torch's default group nor any of its global state is touched.

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
from typing import Final, Self

from torch import Tensor
from torch.distributed import (  # type: ignore[attr-defined]
    BroadcastOptions,
    PrefixStore,
    ProcessGroupGloo,
    TCPStore,
    Work,
)

from weightsync_engine.transfer.communicator import (
    RendezvousError,
    RendezvousTimeoutError,
    TransportError,
    TransportTimeoutError,
)

_LEFT_SECONDS: Final = 5.0
"""What gloo gets on top of a broadcast's time: its own end of it closes the connections, and peers would blame us."""
_IN_FLIGHT: Final = 4
"""Broadcasts that gloo works on at a time; further ones wait in its queue."""
_LEAST_SECONDS: Final = 0.001
_GROUP: Final = "weightsync/group"
_WHERE: Final = re.compile(r"^\[[^\]]*\] ")
_ADVICE: Final = " This is typically caused by"


class GlooWork:
    """A broadcast under way."""

    __slots__ = ("_work",)

    def __init__(self, work: Work) -> None:
        self._work = work

    def wait(self, seconds: float) -> None:
        """Return once it is done here. Raises TransportError, TransportTimeoutError after ``seconds``."""
        try:
            self._work.wait(timedelta(seconds=max(seconds, _LEAST_SECONDS)))
        except RuntimeError as error:
            if not self._work.is_completed():
                raise TransportTimeoutError(f"a broadcast was not done within {seconds:.1f} s") from error
            raise TransportError(_plain(error)) from error


class Rendezvous:
    """Rank 0's store, bound before anybody is told where it is. Port 0: a free one, see ``port``."""

    def __init__(self, host: str, port: int, world_size: int, nonce: str, seconds: float) -> None:
        try:
            # On that address only; the store by itself would listen on all.
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            listener = socket.create_server((host, port), family=family)
        except OSError as error:
            raise RendezvousError(
                f"rank 0 can't listen at {host}:{port}: {error.strerror}; another process may "
                "have the port: set transport.port to 0 or to a free one"
            ) from error
        self.port: int = listener.getsockname()[1]
        self._store = TCPStore(
            host,
            self.port,
            None,
            True,
            timedelta(seconds=seconds),
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )
        self._host, self._world_size, self._nonce = host, world_size, nonce
        self._deadline = time.monotonic() + seconds
        self._store.set(_GROUP, json.dumps({"nonce": _hash(nonce), "world_size": world_size}))

    def join(self) -> "GlooCommunicator":
        """Be rank 0, once all others have come. Raises RendezvousError."""
        return GlooCommunicator(self._host, self._store, 0, self._world_size, self._nonce, self._deadline)


class GlooCommunicator:
    """One rank of one gloo group."""

    def __init__(
        self, host: str, store: TCPStore, rank: int, world_size: int, nonce: str, deadline: float
    ) -> None:
        self.rank, self.world_size = rank, world_size
        self._store = store
        options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._timeout = timedelta(seconds=max(deadline - time.monotonic(), _LEAST_SECONDS))
        options._threads = _IN_FLIGHT
        options._devices = [ProcessGroupGloo.create_device(hostname=host)]
        try:
            if store.add(_key(nonce, f"rank/{rank}"), 1) != 1:
                raise RendezvousError(f"another process is rank {rank} of this group already")
            # Connects all pairs of ranks: it returns when everybody is there.
            self._group: ProcessGroupGloo | None = ProcessGroupGloo(
                PrefixStore(_key(nonce, "gloo"), store), rank, world_size, options
            )
        except RendezvousError:
            raise
        except RuntimeError as error:
            if time.monotonic() < deadline:
                raise RendezvousError(
                    f"rank {rank} of {world_size} could not connect to all others: {_plain(error)}"
                ) from error
            raise RendezvousTimeoutError(_missing(store, rank, world_size, nonce)) from error

    @classmethod
    def join(cls, host: str, port: int, rank: int, world_size: int, nonce: str, seconds: float) -> Self:
        """Be a rank other than 0, or rank 0 that also listens. Raises RendezvousError."""
        deadline = time.monotonic() + seconds
        if rank == 0:
            rendezvous = Rendezvous(host, port, world_size, nonce, seconds)
            return cls(host, rendezvous._store, 0, world_size, nonce, deadline)
        if not 0 < rank < world_size:
            raise RendezvousError(f"rank {rank} is none of a group of {world_size}")
        try:
            store = TCPStore(host, port, None, False, timedelta(seconds=seconds), wait_for_workers=False)
        except RuntimeError as error:
            raise RendezvousTimeoutError(f"nobody listens at {host}:{port}: {_plain(error)}") from error
        _same_group(store, nonce, world_size, f"{host}:{port}")
        return cls(_own_address(host, port), store, rank, world_size, nonce, deadline)

    def broadcast_async(self, tensor: Tensor, src: int, seconds: float) -> GlooWork:
        """Begin to bring ``tensor`` from ``src`` to everybody. Raises TransportError."""
        if self._group is None:
            raise TransportError("the group was left already")
        options = BroadcastOptions()
        options.rootRank, options.rootTensor = src, 0
        # Without it gloo would take what was left of the group's own time when it came about.
        options.timeout = timedelta(seconds=max(seconds, _LEAST_SECONDS) + _LEFT_SECONDS)
        try:
            return GlooWork(self._group.broadcast([tensor], options))  # type: ignore[attr-defined]
        except RuntimeError as error:
            raise TransportError(_plain(error)) from error

    def broadcast(self, tensor: Tensor, src: int, seconds: float) -> None:
        """The same, and wait for it."""
        self.broadcast_async(tensor, src, seconds).wait(seconds)

    def close(self) -> None:
        """Leave the group; idempotent."""
        group, self._group = self._group, None
        if group is not None:
            with contextlib.suppress(RuntimeError):
                group.shutdown()


def _key(nonce: str, name: str) -> str:
    return f"weightsync/{nonce}/{name}"


def _hash(nonce: str) -> str:
    """What may be told to a stranger."""
    return hashlib.sha256(nonce.encode()).hexdigest()


def _plain(error: RuntimeError) -> str:
    """What gloo says, without its source's line and its advice about other people's logs."""
    return _WHERE.sub("", str(error).splitlines()[0]).split(_ADVICE)[0]


def _missing(store: TCPStore, rank: int, world_size: int, nonce: str) -> str:
    late = f"rank {rank} of {world_size} could not connect to all others in time"
    with contextlib.suppress(RuntimeError):
        absent = [str(n) for n in range(world_size) if not store.check([_key(nonce, f"rank/{n}")])]
        return f"{late}: {', '.join(absent)} never came" if absent else late
    return late


def _same_group(store: TCPStore, nonce: str, world_size: int, endpoint: str) -> None:
    """Whoever listens there must mean the same group: a stale rank 0 of another epoch is no peer."""
    try:
        # Waits: we may be faster than rank 0, between its listening and its saying for what.
        found = json.loads(store.get(_GROUP))
    except RuntimeError as error:
        raise RendezvousTimeoutError(
            f"whoever listens at {endpoint} is no rank 0: {_plain(error)}"
        ) from error
    if found["nonce"] != _hash(nonce):
        raise RendezvousError(f"{endpoint} belongs to another epoch: its nonce is not ours")
    if found["world_size"] != world_size:
        raise RendezvousError(
            f"rank 0 at {endpoint} expects {found['world_size']} ranks, this one {world_size}"
        )


def _own_address(host: str, port: int) -> str:
    """The address of the interface that leads to rank 0: gloo binds one, and peers must reach it."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, port))
        return str(probe.getsockname()[0])
