"""The trainer's side of the publish socket: one connection a process, kept open so that the agent knows.

Safe to use from several threads, one publish at a time; a forked child is another process to the agent, with a
connection of its own. No thread is left behind, and nothing waits beyond its deadline.
"""

import atexit
import ctypes
import mmap
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
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
"""How long an agent may take to be there and to greet: it may just be starting."""
GOODBYE_SECONDS: Final = 1.0
_RETRY_SECONDS: Final = 0.1

Pieces = Callable[[int], Iterable[memoryview]]
"""The bytes of tensor ``index`` in C order, in writable memory that stays until the next is asked for."""
Progress = Callable[[int, int], None]


class RefusedByAgentError(ManifestError):
    """The agent's answer; the conversation goes on."""


class Connection:
    """An open connection to an agent."""

    _MAX_UNREAD: Final = 8

    def __init__(self, channel: Channel) -> None:
        self.channel = channel

    @classmethod
    def open(cls, path: Path, deadline: Deadline) -> Self:
        """Connect and be greeted. Raises OSError, TimeoutError, ChannelClosedError, MalformedError."""
        soon = deadline.sooner(CONNECT_SECONDS)
        while True:
            try:
                return cls(_greeted(path, soon))
            except TimeoutError as error:
                if not deadline.remaining:
                    raise
                why = f"nobody answered for {CONNECT_SECONDS:.0f} s: is the agent stopped, or short of CPU?"
                raise ChannelClosedError(why) from error
            except (FileNotFoundError, ConnectionError, BlockingIOError):
                # An agent that is being restarted: nothing tells when its socket is there but looking.
                if not soon.remaining:
                    raise
                time.sleep(_RETRY_SECONDS)

    def publish(
        self,
        version: VersionId,
        manifest: Manifest,
        description: bytes,
        pieces: Pieces,
        deadline: Deadline,
        progress: Progress | None,
    ) -> str:
        """Copy a version over; returns its digest. Raises RefusedByAgentError, TimeoutError, ChannelClosedError.

        After anything but a refusal the connection is closed: half a message may have passed.
        """
        try:
            begin = Begin(version.run, version.version, len(description), _process.token, os.getpid())
            self.channel.send(begin, deadline)
            self.channel.send_bytes(description, deadline)
            ready = self.answer(Ready, deadline)
            _Sender(self, ready, deadline, progress).send(manifest, pieces)
            self.channel.send(Seal(), deadline)
            return str(self.answer(Accepted, deadline).digest)
        except RefusedByAgentError:
            raise
        except ChannelClosedError as error:
            why = self._last_word() or str(error)
            self.channel.close()
            raise ChannelClosedError(why) from error
        except BaseException:
            self.channel.close()
            raise

    def _last_word(self) -> str:
        """Why the agent closed the connection, if it said so while this end was still sending."""
        for _ in range(self._MAX_UNREAD):
            # The first read may only tell of what the agent has not read.
            with suppress(ChannelClosedError, TimeoutError, MalformedError):
                message = self.channel.receive(Deadline(_RETRY_SECONDS))
                if isinstance(message, (Broken, Refused)):
                    return message.message
        return ""

    def answer(self, kind: type[Any], deadline: Deadline) -> Any:
        """The next message, which has to be of that kind."""
        message = self.channel.receive(deadline)
        if isinstance(message, Refused):
            raise RefusedByAgentError(message.code, message.message)
        if isinstance(message, Broken):
            raise ChannelClosedError(message.message)
        if not isinstance(message, kind):
            raise MalformedError(f"the agent answered {message} where {kind.__name__} was due")
        return message


def _greeted(path: Path, deadline: Deadline) -> Channel:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    channel = Channel(connection, FROM_AGENT)
    try:
        with short_name(path) as address:
            connection.connect(address)
        greeting = channel.receive(deadline)
        if not isinstance(greeting, Greeting) or greeting.protocol != PROTOCOL:
            raise MalformedError(f"the agent greets with {greeting}, this client speaks protocol {PROTOCOL}")
    except BaseException:
        channel.close()
        raise
    return channel


class _Sender:
    """Fills the slots in turn; one is filled while the agent copies the others out."""

    def __init__(
        self, connection: Connection, ready: Ready, deadline: Deadline, progress: Progress | None
    ) -> None:
        self._connection, self._ready, self._deadline, self._progress = connection, ready, deadline, progress
        self._slot, self._used, self._free, self._sent = 0, 0, ready.slots, 0
        fd = connection.channel.take_fd()
        try:
            # Unmapped with the last reference: an exception's traceback may still hold one.
            memory = mmap.mmap(fd, ready.slots * ready.slot_bytes)
        finally:
            os.close(fd)
        self._start = ctypes.c_char.from_buffer(memory)

    def send(self, manifest: Manifest, pieces: Pieces) -> None:
        """Send the whole image, and wait until it is taken."""
        ends = (*manifest.offsets[1:], manifest.nbytes)
        for index, (spec, end) in enumerate(zip(manifest.tensors, ends, strict=True)):
            missing = spec.nbytes
            for piece in pieces(index):
                missing -= len(piece)
                if missing < 0:
                    break
                self._put(piece)
            if missing:
                raise RuntimeError(f"tensor {spec.name!r} got another size while it was published")
            self._pad(end - manifest.offsets[index] - spec.nbytes)
        if self._used:
            self._hand_over()
        while self._free < self._ready.slots:
            self._taken()

    def _put(self, data: memoryview) -> None:
        at = 0
        while at < len(data):
            target, count = self._room(len(data) - at)
            # Lets other threads of the trainer run, unlike an assignment to a slice.
            ctypes.memmove(target, ctypes.addressof(ctypes.c_char.from_buffer(data, at)), count)
            self._used += count
            at += count

    def _pad(self, missing: int) -> None:
        while missing:
            target, count = self._room(missing)
            ctypes.memset(target, 0, count)
            self._used += count
            missing -= count

    def _room(self, wanted: int) -> tuple[int, int]:
        """Where the next bytes go, and how many of them."""
        if self._used == self._ready.slot_bytes:
            self._hand_over()
        if self._used == 0 and self._free == 0:
            self._taken()
        address = ctypes.addressof(self._start) + self._slot * self._ready.slot_bytes + self._used
        return address, min(wanted, self._ready.slot_bytes - self._used)

    def _hand_over(self) -> None:
        self._connection.channel.send(Filled(self._used), self._deadline)
        self._sent += self._used
        self._slot, self._used = (self._slot + 1) % self._ready.slots, 0
        self._free -= 1
        if self._progress is not None:
            self._progress(self._sent, self._ready.nbytes)

    def _taken(self) -> None:
        self._connection.answer(Taken, self._deadline)
        self._free += 1


# ------------------------------------------------------------------------------------------------- one a process


class _Process:
    """What a process has one of. A forked child gets all of it anew."""

    def __init__(self) -> None:
        self.token = secrets.token_hex(8)
        self.lock = threading.Lock()
        self.connections: dict[Path, Connection] = {}


_process = _Process()


def process_token() -> str:
    """Random, one for each process."""
    return _process.token


def copy_over(
    path: Path,
    version: VersionId,
    manifest: Manifest,
    description: bytes,
    pieces: Pieces,
    deadline: Deadline,
    progress: Progress | None,
) -> str:
    """Publish over this process's connection to the agent at ``path``; returns the digest.

    Raises what Connection.open and Connection.publish raise.
    """
    process, what = _process, (version, manifest, description, pieces, deadline, progress)
    if not process.lock.acquire(timeout=min(deadline.remaining, threading.TIMEOUT_MAX)):
        raise TimeoutError("another thread of this process is publishing")
    try:
        kept = process.connections.get(path)
        if kept is not None and kept.channel.alive:
            # The agent may be restarted at any moment: what it had not answered is said to the next one.
            with suppress(ChannelClosedError):
                return kept.publish(*what)
        if kept is not None:
            kept.channel.close()
        process.connections[path] = Connection.open(path, deadline)
        return process.connections[path].publish(*what)
    finally:
        process.lock.release()


def wait_for(path: Path, version: VersionId, deadline: Deadline) -> Settled:
    """What became of a version; PENDING when that is not known at the deadline, which also an agent's end outlives."""
    why = ""
    while deadline.remaining:
        channel = None
        try:
            # A connection of its own, so that other threads can publish meanwhile.
            channel = Connection.open(path, deadline).channel
            channel.send(Wait(version), deadline)
            settled = channel.receive(deadline)
            if isinstance(settled, Settled):
                return settled
            why = f"; the agent answered {settled}"
        except TimeoutError:
            break
        except (OSError, MalformedError) as error:
            why = f"; the agent went away: {error}"
        finally:
            if channel is not None:
                channel.close()
        time.sleep(min(_RETRY_SECONDS, deadline.remaining))
    return Settled(PublishOutcome.PENDING, "", f"not known after {deadline.seconds:.0f} s{why}")


def _after_fork() -> None:
    """The agent sees a process's end by its connection, so no child may hold it open."""
    global _process  # noqa: PLW0603 (the one place where it changes)
    for connection in _process.connections.values():
        connection.channel.close()
    _process = _Process()


def _goodbye() -> None:
    # An exception that nobody caught is no end as it should be: the agent just sees the connection close.
    ended_well = getattr(sys, "last_value", None) is None
    for connection in _process.connections.values():
        if ended_well:
            with suppress(OSError):
                connection.channel.send(Goodbye(), Deadline(GOODBYE_SECONDS))
        connection.channel.close()


os.register_at_fork(after_in_child=_after_fork)
atexit.register(_goodbye)
