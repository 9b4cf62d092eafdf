"""A gloo group of its own: neither torch's default group nor any of its global state is touched.

torch's own names for what is used here begin with an underscore or are not documented; torch is pinned, and a
contract test holds them.
"""

import contextlib
from datetime import timedelta
from typing import Final

import torch
from torch import Tensor
from torch.distributed import BroadcastOptions, ProcessGroupGloo, Work

from weightsync_engine.transfer.communicator import TransportError, TransportTimeoutError
from weightsync_engine.transfer.rendezvous import LEAST_SECONDS, Meeting, plain

_LEFT_SECONDS: Final = 5.0
"""What gloo gets on top of a broadcast's time: its own end of it closes the connections, and peers would blame us."""
_IN_FLIGHT: Final = 4
"""Broadcasts that gloo works on at a time; further ones wait in its queue."""


class GlooWork:
    """A broadcast under way."""

    __slots__ = ("_work",)

    def __init__(self, work: Work) -> None:
        self._work = work

    def wait(self, seconds: float) -> None:
        """Return once it is done here. Raises TransportError, TransportTimeoutError after ``seconds``."""
        try:
            self._work.wait(timedelta(seconds=max(seconds, LEAST_SECONDS)))
        except RuntimeError as error:
            if not self._work.is_completed():
                raise TransportTimeoutError(f"a broadcast was not done within {seconds:.1f} s") from error
            raise TransportError(plain(error)) from error


class GlooCommunicator:
    """One rank of one gloo group."""

    device = torch.device("cpu")

    def __init__(self, meeting: Meeting) -> None:
        """Join, once all others have come. Raises RendezvousError."""
        self.rank, self.world_size = meeting.rank, meeting.world_size
        # Rank 0's store lives as long as somebody holds it.
        self._meeting = meeting
        options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._timeout = timedelta(seconds=meeting.left)
        options._threads = _IN_FLIGHT
        options._devices = [ProcessGroupGloo.create_device(hostname=meeting.host)]
        meeting.enter()
        try:
            # Connects all pairs of ranks: it returns when everybody is there.
            self._group: ProcessGroupGloo | None = ProcessGroupGloo(
                meeting.store("gloo"), self.rank, self.world_size, options
            )
        except RuntimeError as error:
            raise meeting.failed(plain(error)) from error

    def broadcast_async(self, tensor: Tensor, src: int, seconds: float) -> GlooWork:
        """Begin to bring ``tensor`` from ``src`` to everybody. Raises TransportError."""
        if self._group is None:
            raise TransportError("the group was left already")
        options = BroadcastOptions()
        options.rootRank, options.rootTensor = src, 0
        # Without it gloo would take what was left of the group's own time when it came about.
        options.timeout = timedelta(seconds=max(seconds, LEAST_SECONDS) + _LEFT_SECONDS)
        try:
            return GlooWork(self._group.broadcast([tensor], options))  # type: ignore[attr-defined]
        except RuntimeError as error:
            raise TransportError(plain(error)) from error

    def broadcast(self, tensor: Tensor, src: int, seconds: float) -> None:
        """The same, and wait for it."""
        self.broadcast_async(tensor, src, seconds).wait(seconds)

    def close(self) -> None:
        """Leave the group; idempotent."""
        group, self._group = self._group, None
        if group is not None:
            with contextlib.suppress(RuntimeError):
                group.shutdown()
