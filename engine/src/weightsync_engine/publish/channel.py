"""Both ends of the publish socket: whole messages with a deadline, blocking, one thread at a time each way."""

import contextlib
import math
import os
import select
import socket
import struct
import time
from collections.abc import Mapping
from typing import Any, Final

from weightsync_contract.codec import MalformedError
from weightsync_engine.publish.protocol import MAX_LINE_BYTES, FromAgent, FromClient, decode, encode

_READ_BYTES: Final = 64 * 1024
_POLL_SECONDS: Final = 3600.0


class ChannelClosedError(ConnectionError):
    """The other end is gone. What it had not answered did not happen, as far as is known here."""


class Deadline:
    """A moment on the monotonic clock that any number of waits share."""

    __slots__ = ("_at", "seconds")

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._at = time.monotonic() + seconds

    @property
    def remaining(self) -> float:
        """Seconds left, never negative."""
        return max(0.0, self._at - time.monotonic())

    def sooner(self, seconds: float) -> "Deadline":
        """The earlier of this one and ``seconds`` from now."""
        return Deadline(min(self.remaining, seconds))


NEVER: Final = Deadline(math.inf)


class Channel:
    """A connection. Every method raises TimeoutError at its deadline and ChannelClosedError when the peer is gone.

    After either the channel is of no use any more: half a message may have passed.
    """

    def __init__(self, connection: socket.socket, kinds: Mapping[str, type[Any]]) -> None:
        connection.setblocking(False)
        self._socket = connection
        self._kinds = kinds
        self._buffer = bytearray()
        self._fds: list[int] = []

    def send(self, message: FromClient | FromAgent, deadline: Deadline, fd: int | None = None) -> None:
        """Send one message, with a descriptor if given (the caller keeps its own)."""
        line = encode(message)
        if fd is not None:
            sent = self._ready(select.POLLOUT, deadline, lambda: socket.send_fds(self._socket, [line], [fd]))
            line = line[sent:]
        self.send_bytes(line, deadline)

    def send_bytes(self, data: bytes | memoryview, deadline: Deadline) -> None:
        """Send all of ``data``."""
        rest = [memoryview(data)]
        while rest[0]:
            rest[0] = rest[0][self._ready(select.POLLOUT, deadline, lambda: self._socket.send(rest[0])) :]

    def receive(self, deadline: Deadline) -> Any:
        """The next message. Raises MalformedError for a line that is none."""
        while (end := self._buffer.find(b"\n")) < 0:
            if len(self._buffer) > MAX_LINE_BYTES:
                raise MalformedError(f"a line of more than {MAX_LINE_BYTES} bytes")
            self._fill(deadline)
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        return decode(self._kinds, line)

    def receive_bytes(self, count: int, deadline: Deadline) -> bytes:
        """The next ``count`` bytes."""
        while len(self._buffer) < count:
            self._fill(deadline)
        data = bytes(self._buffer[:count])
        del self._buffer[:count]
        return data

    def take_fd(self) -> int:
        """The oldest descriptor that came and was not taken; it is the caller's now. Raises MalformedError."""
        if not self._fds:
            raise MalformedError("a message came without its descriptor")
        return self._fds.pop(0)

    @property
    def alive(self) -> bool:
        """Whether the peer still has its end open, also if it has sent things that were not read yet."""
        poll = select.poll()
        try:
            poll.register(self._socket, select.POLLRDHUP)
        except ValueError:
            return False
        return not poll.poll(0)

    @property
    def peer_pid(self) -> int:
        """The pid that the kernel names for the other end; 0 where its PID namespace is not ours."""
        size = struct.calcsize("3i")
        credentials = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
        return int(struct.unpack("3i", credentials)[0])

    def interrupt(self) -> None:
        """End it from another thread: whoever waits in it gets ChannelClosedError. It still has to be closed."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close this end; idempotent."""
        self._socket.close()
        for fd in self._fds:
            os.close(fd)
        self._fds.clear()

    def _fill(self, deadline: Deadline) -> None:
        data, fds, _, _ = self._ready(
            select.POLLIN,
            deadline,
            lambda: socket.recv_fds(self._socket, _READ_BYTES, 1, socket.MSG_CMSG_CLOEXEC),
        )
        self._fds += fds
        if not data:
            raise ChannelClosedError("the other end closed the connection")
        self._buffer += data

    def _ready(self, event: int, deadline: Deadline, act: Any) -> Any:
        poll = select.poll()
        try:
            poll.register(self._socket, event)
            while remaining := deadline.remaining:
                if not poll.poll(math.ceil(min(remaining, _POLL_SECONDS) * 1000)):
                    continue
                with contextlib.suppress(BlockingIOError):
                    return act()
        except (OSError, ValueError) as error:
            raise ChannelClosedError(f"the connection is gone: {error}") from error
        raise TimeoutError(f"the other end was waited for {deadline.seconds:.1f} s")
