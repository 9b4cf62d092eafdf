"""The trainer's side of the publish socket: one connection a process, kept open so that the agent knows.

Safe to use from several threads, one publish at a time; a forked child makes a connection of its own.
"""

import atexit
import mmap
import os
import secrets
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final, Self

from weightsync_contract.codec import MalformedError
from weightsync_contract.manifest import Manifest, ManifestError
from weightsync_contract.messages import VersionId
from weightsync_engine.publish.channel import Channel, ChannelClosedError, Deadline
from weightsync_engine.publish.protocol import (
    FROM_AGENT,
    PROTOCOL,
    Accepted,
    Begin,
    Broken,
    Filled,
    Goodbye,
    Greeting,
    PublishOutcome,
    Ready,
    Refused,
    Seal,
    Settled,
    Taken,
    Wait,
)
from weightsync_engine.worker.sockets import short_name

CONNECT_SECONDS: Final = 5.0
GOODBYE_SECONDS: Final = 1.0

_lock = threading.Lock()
_connections: dict[tuple[int, Path], "Connection"] = {}
_process = (os.getpid(), secrets.token_hex(8))


def _token() -> str:
    global _process  # noqa: PLW0603 (a forked child is another publisher)
    if _process[0] != os.getpid():
        _process = (os.getpid(), secrets.token_hex(8))
    return _process[1]


class Connection:
    """An open connection to an agent."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel

    @classmethod
    def open(cls, path: Path, deadline: Deadline) -> Self:
        """Connect and be greeted. Raises OSError, TimeoutError, ChannelClosedError, MalformedError."""
        soon = deadline.sooner(CONNECT_SECONDS)
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            connection.settimeout(max(soon.remaining, 0.001))
            with short_name(path) as address:
                connection.connect(address)
        except BaseException:
            connection.close()
            raise
        channel = Channel(connection, FROM_AGENT)
        try:
            greeting = channel.receive(soon)
            if not isinstance(greeting, Greeting) or greeting.protocol != PROTOCOL:
                raise MalformedError(
                    f"the agent greets with {greeting}, this client speaks protocol {PROTOCOL}"
                )
        except BaseException:
            channel.close()
            raise
        return cls(channel)

    @classmethod
    def wait_for(cls, path: Path, version: VersionId, deadline: Deadline) -> tuple[PublishOutcome, str, str]:
        """What became of a version, as far as it is known at the deadline."""
        channel = None
        try:
            # A connection of its own, so that others can publish meanwhile.
            channel = cls.open(path, deadline).channel
            channel.send(Wait(version), deadline)
            settled = channel.receive(deadline)
        except TimeoutError:
            return PublishOutcome.PENDING, "", "not known when time was over"
        except (ChannelClosedError, OSError) as error:
            return PublishOutcome.PENDING, "", f"the agent went away: {error}"
        finally:
            if channel is not None:
                channel.close()
        if not isinstance(settled, Settled):
            raise MalformedError(f"the agent answered {settled}")
        return settled.outcome, settled.reason, settled.message

    def publish(
        self,
        version: VersionId,
        manifest: Manifest,
        description: bytes,
        tensor: Callable[[int], memoryview],
        deadline: Deadline,
        progress: Callable[[int, int], None] | None,
    ) -> str:
        """Copy a version over; returns its digest. Raises ManifestError when it is refused."""
        begin = Begin(version.run, version.version, len(description), _token(), os.getpid())
        self.channel.send(begin, deadline)
        self.channel.send_bytes(description, deadline)
        ready = self._answer(Ready, deadline)
        fd = self.channel.take_fd()
        try:
            with mmap.mmap(fd, ready.slots * ready.slot_bytes) as memory, memoryview(memory) as view:
                sender = _Sender(self, ready, view, deadline)
                for index, spec in enumerate(manifest.tensors):
                    sender.put(tensor(index))
                    sender.pad(manifest.offsets[index] + spec.nbytes, _end(manifest, index))
                    if progress is not None:
                        progress(_end(manifest, index), manifest.nbytes)
                sender.flush()
        finally:
            os.close(fd)
        self.channel.send(Seal(), deadline)
        accepted = self._answer(Accepted, deadline)
        return str(accepted.digest)

    def _answer(self, kind: type[Any], deadline: Deadline) -> Any:
        message = self.channel.receive(deadline)
        if isinstance(message, Refused):
            raise ManifestError(message.code, message.message)
        if isinstance(message, Broken):
            raise ChannelClosedError(message.message)
        if not isinstance(message, kind):
            raise MalformedError(f"the agent answered {message} where {kind.__name__} was due")
        return message


class _Sender:
    """Fills the slots in turn; one is filled while the agent copies the others out."""

    def __init__(self, connection: Connection, ready: Ready, view: memoryview, deadline: Deadline) -> None:
        self._connection, self._ready, self._view, self._deadline = connection, ready, view, deadline
        self._slot, self._used, self._free = 0, 0, ready.slots

    def put(self, data: memoryview) -> None:
        """Send the next bytes of the image."""
        at = 0
        while at < len(data):
            room = self._room()
            count = min(room, len(data) - at)
            start = self._slot * self._ready.slot_bytes + self._used
            self._view[start : start + count] = data[at : at + count]
            self._used += count
            at += count

    def pad(self, start: int, end: int) -> None:
        """Send the zeros of a gap."""
        self.put(memoryview(bytes(end - start)))

    def flush(self) -> None:
        """Hand over what the present slot holds, and wait until all are taken."""
        if self._used:
            self._hand_over()
        while self._free < self._ready.slots:
            self._taken()

    def _room(self) -> int:
        if self._used == self._ready.slot_bytes:
            self._hand_over()
        if self._used == 0 and self._free == 0:
            self._taken()
        return self._ready.slot_bytes - self._used

    def _hand_over(self) -> None:
        self._connection.channel.send(Filled(self._used), self._deadline)
        self._slot, self._used = (self._slot + 1) % self._ready.slots, 0
        self._free -= 1

    def _taken(self) -> None:
        self._connection._answer(Taken, self._deadline)
        self._free += 1


def _end(manifest: Manifest, index: int) -> int:
    following = index + 1
    return manifest.offsets[following] if following < len(manifest.offsets) else manifest.nbytes


@contextmanager
def publisher(path: Path, deadline: Deadline) -> Iterator[Connection]:
    """This process's connection to the agent at ``path``, for one publish; opened when there is none."""
    if not _lock.acquire(timeout=max(deadline.remaining, 0.001)):
        raise TimeoutError("another thread of this process is publishing")
    key = (os.getpid(), path)
    try:
        connection = _connections.get(key)
        if connection is None or not connection.channel.alive:
            if connection is not None:
                connection.channel.close()
            connection = _connections[key] = Connection.open(path, deadline)
        try:
            yield connection
        except ManifestError as error:
            # A refusal before the image leaves the connection as it was; one after it, too.
            del error
            raise
        except BaseException:
            # Half a message may have passed.
            connection.channel.close()
            _connections.pop(key, None)
            raise
    finally:
        _lock.release()


@atexit.register
def _goodbye() -> None:
    for (pid, _), connection in list(_connections.items()):
        if pid == os.getpid():
            with suppress(OSError, TimeoutError):
                connection.channel.send(Goodbye(), Deadline(GOODBYE_SECONDS))
            connection.channel.close()
