"""The agent's side of its children: start them, speak with them, and kill them whenever that is wanted."""

import asyncio
import os
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Final, Self

from weightsync_engine.transfer import protocol

_READ_BYTES: Final = 1 << 20


class ChildProcess:
    """One child. Every method but ``events`` may be called at any time, also when the child is long gone."""

    def __init__(self, process: asyncio.subprocess.Process, connection: socket.socket) -> None:
        self._process = process
        self._socket = connection
        self._sending = asyncio.Lock()

    @classmethod
    async def spawn(cls) -> Self:
        """Start one; it is warm when ``Started`` comes. Raises OSError."""
        ours, theirs = socket.socketpair()
        try:
            ours.setblocking(False)
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "weightsync_engine.transfer.child",
                str(theirs.fileno()),
                stdin=asyncio.subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                # It moves bytes, and shares its cores with an engine.
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                start_new_session=True,
            )
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        return cls(process, ours)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it has not been seen to end."""
        return self._process.returncode is None

    async def send(self, command: protocol.Command, fd: int | None = None) -> None:
        """Tell it, with a descriptor where the command has one (ours stays open).

        Raises OSError when it is gone.
        """
        data = memoryview(protocol.encode(command))
        loop = asyncio.get_running_loop()
        async with self._sending:
            if fd is not None:
                data = data[await self._send_with(data, fd) :]
            await loop.sock_sendall(self._socket, data)

    async def _send_with(self, data: memoryview, fd: int) -> int:
        loop = asyncio.get_running_loop()
        while True:
            with suppress(BlockingIOError):
                return socket.send_fds(self._socket, [data], [fd])
            writable = asyncio.Event()
            loop.add_writer(self._socket, writable.set)
            try:
                await writable.wait()
            finally:
                loop.remove_writer(self._socket)

    async def events(self) -> AsyncIterator[protocol.Event]:
        """What it says, until it ends. To be read once, by one reader."""
        loop, buffer = asyncio.get_running_loop(), bytearray()
        while True:
            try:
                data = await loop.sock_recv(self._socket, _READ_BYTES)
            except ConnectionError:
                return
            if not data:
                return
            buffer += data
            if b"\n" not in data:
                continue
            *lines, rest = bytes(buffer).split(b"\n")
            buffer = bytearray(rest)
            for line in lines:
                yield protocol.decode_event(line)

    def kill(self) -> None:
        """SIGKILL, at once."""
        with suppress(ProcessLookupError):
            if self.alive:
                self._process.kill()

    async def wait(self) -> int:
        """Its exit status, once it has ended; its socket is closed then."""
        status = await self._process.wait()
        self._socket.close()
        return status


class ChildPool:
    """Keeps one warm child, so that a new epoch does not wait for torch's import. Made in a running loop."""

    def __init__(self) -> None:
        self._spare: ChildProcess | None = None
        self._making = asyncio.create_task(self._make())

    async def take(self) -> ChildProcess:
        """A child of the caller's own, warm if possible. Raises OSError."""
        with suppress(OSError):
            await self._making
        spare, self._spare = self._spare, None
        if spare is not None and not spare.alive:
            await spare.wait()
            spare = None
        child = spare or await ChildProcess.spawn()
        self._making = asyncio.create_task(self._make())
        return child

    async def close(self) -> None:
        """End the spare."""
        with suppress(OSError):
            await self._making
        if self._spare is not None:
            self._spare.kill()
            await self._spare.wait()
            self._spare = None

    async def _make(self) -> None:
        if self._spare is None:
            self._spare = await ChildProcess.spawn()
