"""The process that is a rank: ``python -m weightsync_engine.transfer.child FD``.

It does one command after the other in its main thread, where a hang is: the timer that ends it then, and the
reports of progress, are threads of their own. It ends with its parent, however that one ends.
"""

import ctypes
import importlib
import mmap
import os
import signal
import socket
import sys
import threading
import time
import warnings
import zlib
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Final, NoReturn

import torch

from weightsync_contract.manifest import Manifest
from weightsync_contract.messages import Mode
from weightsync_contract.reasons import FailureCode
from weightsync_engine.transfer import protocol
from weightsync_engine.transfer.announce import Announcement, announce, announced
from weightsync_engine.transfer.backends import library, open_communicator
from weightsync_engine.transfer.carriers import Carrier, HostCarrier, Route, carrier_for
from weightsync_engine.transfer.communicator import (
    Communicator,
    RendezvousError,
    RendezvousTimeoutError,
    TransportError,
    TransportTimeoutError,
)
from weightsync_engine.transfer.flat import Limit, Span, broadcast_image, piece_bytes, spans, tensor_spans
from weightsync_engine.transfer.landing import HostLanding, Landing
from weightsync_engine.transfer.rendezvous import Meeting, listen, reach
from weightsync_engine.transfer.staging import key

PROGRESS_SECONDS: Final = 0.2
_READ_BYTES: Final = 1 << 20
_PR_SET_PDEATHSIG: Final = 1
_MAX_MANIFEST_BYTES: Final = 512 << 20
_GRACE_SECONDS: Final = 0.5
"""Who waits ends in time by itself and says for what; the timer is there for calls that hang."""


class Child:
    """Answers one parent over one socket."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._lock = threading.Lock()
        self._group: Communicator | None = None
        self._carrier: Carrier = HostCarrier()
        self._moved = 0
        self._rate = 0.0
        """Bytes a second of the last image that this rank sent to this group; 0 before the first."""
        self._prepared: Landing | None = None
        self._filled: Landing | None = None

    def run(self) -> NoReturn:
        """Do what is told until the parent is gone."""
        self.say(protocol.Started())
        for command, fd in self._commands():
            with self._deadline(command):
                try:
                    self._do(command, fd)
                except (RendezvousError, TransportError, OSError, ValueError, RuntimeError) as error:
                    self._fail(_code(command, error), f"{str(error) or repr(error)}")
                finally:
                    if fd is not None:
                        os.close(fd)
            self._unmap()
        # Threads of gloo may hang in a call: nothing here is worth waiting for them.
        os._exit(0)

    def say(self, event: protocol.Event) -> None:
        """Tell the parent; one that is gone needs no answer."""
        try:
            with self._lock:
                self._socket.sendall(protocol.encode(event))
        except OSError:
            os._exit(0)

    def _fail(self, code: FailureCode, message: str) -> NoReturn:
        self.say(protocol.Failed(code, message))
        os._exit(1)

    def _commands(self) -> Iterator[tuple[protocol.Command, int | None]]:
        buffer, fds = bytearray(), deque[int]()
        while True:
            while (end := buffer.find(b"\n")) < 0:
                data, found, _, _ = socket.recv_fds(self._socket, _READ_BYTES, 4)
                if not data:
                    return
                fds.extend(found)
                buffer += data
            line = bytes(buffer[:end])
            del buffer[: end + 1]
            command = protocol.decode_command(line)
            yield command, fds.popleft() if isinstance(command, protocol.WITH_FD) else None

    @contextmanager
    def _deadline(self, command: protocol.Command) -> Iterator[None]:
        name, seconds = type(command).__name__, command.seconds
        code = protocol.TIMEOUTS[type(command)]
        message = f"{name} was not done within {seconds:.1f} s"
        timer = threading.Timer(seconds + _GRACE_SECONDS, self._fail, (code, message))
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _do(self, command: protocol.Command, fd: int | None) -> None:
        match command:
            case protocol.Listen():
                self._listen(command)
            case protocol.Join():
                self._reach(command)
            case protocol.SendManifest():
                self._send_manifest(command)
            case protocol.ReceiveManifest():
                self._receive_manifest(command)
            case protocol.Prepare() if fd is not None:
                self._prepare(command, fd)
            case protocol.Send() if fd is not None:
                self._send(command, fd)
            case protocol.Receive() if fd is not None:
                self._receive(command, fd)

    def _listen(self, command: protocol.Listen) -> None:
        meeting = listen(
            command.host,
            command.port,
            command.world_size,
            command.nonce,
            command.seconds,
            library(command.backend),
        )
        host = f"[{command.host}]" if ":" in command.host else command.host
        self.say(protocol.Listening(f"{host}:{meeting.port}"))
        self._join(command.backend, meeting)

    def _reach(self, command: protocol.Join) -> None:
        host, _, port = command.endpoint.rpartition(":")
        meeting = reach(
            host.strip("[]"),
            int(port),
            command.rank,
            command.world_size,
            command.nonce,
            command.seconds,
            library(command.backend),
        )
        self._join(command.backend, meeting)

    def _join(self, backend: str, meeting: Meeting) -> None:
        self._group = open_communicator(backend, meeting)
        self._carrier = carrier_for(self._group)
        self.say(protocol.Ready())

    @property
    def _joined(self) -> Communicator:
        if self._group is None:
            raise RuntimeError("the child is in no group: Listen or Join comes first")
        return self._group

    def _send_manifest(self, command: protocol.SendManifest) -> None:
        data = zlib.compress(command.data.encode())
        announce(self._joined, Announcement("manifest", len(data), layout=command.layout), command.seconds)
        packed = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        self._joined.broadcast(packed.to(self._joined.device), 0, command.seconds)
        self.say(protocol.ManifestSent())

    def _receive_manifest(self, command: protocol.ReceiveManifest) -> None:
        length = announced(self._joined, Announcement("manifest", 0), command.seconds).nbytes
        if not 0 < length <= _MAX_MANIFEST_BYTES:
            raise TransportError(f"rank 0 announced a manifest of {length} bytes")
        data = torch.zeros(length, dtype=torch.uint8, device=self._joined.device)
        self._joined.broadcast(data, 0, command.seconds)
        text = zlib.decompressobj().decompress(data.cpu().numpy().tobytes(), _MAX_MANIFEST_BYTES)
        manifest = Manifest.decode(text)
        self.say(protocol.ManifestReceived(manifest.layout, text.decode()))

    def _prepare(self, command: protocol.Prepare, fd: int) -> None:
        self._forget()
        self._prepared = self._have(command, fd)
        self.say(protocol.Prepared())

    def _have(self, command: protocol.Prepare | protocol.Receive, fd: int) -> Landing:
        if command.device:
            from weightsync_engine.transfer.cuda.arena import ArenaLanding

            return ArenaLanding(fd, command.nbytes)
        return HostLanding(fd, command.nbytes, self._carrier)

    def _forget(self) -> None:
        prepared, self._prepared = self._prepared, None
        if prepared:
            prepared.close()

    def _landing(self, command: protocol.Receive, fd: int) -> Landing:
        """What was prepared, if it is this file."""
        if self._prepared is None or self._prepared.key != key(fd, command.nbytes):
            self._forget()
            return self._have(command, fd)
        prepared, self._prepared = self._prepared, None
        return prepared

    def _unmap(self) -> None:
        """After ``Received`` and out of its deadline: nobody is to wait for it who only waits for the bytes."""
        filled, self._filled = self._filled, None
        if filled:
            filled.close()
            self.say(protocol.Unmapped())

    def _send(self, command: protocol.Send, fd: int) -> None:
        deadline = time.monotonic() + command.seconds
        longest = piece_bytes(command.buffer_bytes, command.limit_rate or self._rate)
        announce(self._joined, _announcement(command, longest), command.seconds)
        # Not closed after a failure: gloo's threads may still read it, and the process ends.
        memory = mmap.mmap(fd, command.nbytes, mmap.MAP_SHARED, mmap.PROT_READ)
        limit = Limit(command.limit_rate)
        began = time.monotonic()
        with warnings.catch_warnings():
            # torch warns that the memory is read-only; so it is meant.
            warnings.simplefilter("ignore", UserWarning)
            pieces = _pieces(command, longest)
            longest, count = _longest(pieces), command.num_buffers
            route = self._carrier.sending(memory, command.nbytes, longest, count, self._came)
            self._move(command, pieces, deadline, route, limit)
        self._rate = command.nbytes / max(time.monotonic() - began, 1e-6)
        memory.close()
        self.say(protocol.Sent())

    def _receive(self, command: protocol.Receive, fd: int) -> None:
        deadline = time.monotonic() + command.seconds
        longest = announced(self._joined, _announcement(command, 0), command.seconds).piece_bytes
        if longest < 1:
            raise TransportError(f"rank 0 announced pieces of {longest} bytes")
        self._filled = landing = self._landing(command, fd)
        pieces = _pieces(command, longest)
        longest, count = _longest(pieces), command.num_buffers
        route = landing.receiving(command.layout, command.verify, longest, count, self._came)
        self._move(command, pieces, deadline, route, Limit(0))
        self.say(protocol.Received(landing.digest()))

    def _came(self, start: int, end: int) -> None:
        self._moved = end

    def _move(
        self,
        command: protocol.Send | protocol.Receive,
        pieces: list[Span],
        deadline: float,
        carried: AbstractContextManager[Route],
        limit: Limit,
    ) -> None:
        self._moved = 0
        with self._telling_progress(), carried as route:

            def piece(start: int, end: int) -> torch.Tensor:
                limit.after(start)
                return route.piece(start, end)

            broadcast_image(self._joined, piece, iter(pieces), command.num_buffers, deadline, route.landed)
            route.finish()

    @contextmanager
    def _telling_progress(self) -> Iterator[None]:
        over = threading.Event()

        def tell() -> None:
            while not over.wait(PROGRESS_SECONDS):
                self.say(protocol.Progress(self._moved))

        thread = threading.Thread(target=tell, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


def _announcement(command: protocol.Send | protocol.Receive, longest: int) -> Announcement:
    return Announcement("image", command.nbytes, longest, command.layout, command.version, command.mode.value)


def _pieces(command: protocol.Send | protocol.Receive, longest: int) -> list[Span]:
    if command.mode is Mode.PER_TENSOR:
        return list(tensor_spans(Manifest.decode(command.manifest)))
    return list(spans(command.nbytes, longest))


def _longest(pieces: list[Span]) -> int:
    return max((end - start for start, end in pieces), default=0)


def _code(command: protocol.Command, error: Exception) -> FailureCode:
    if isinstance(error, (TransportTimeoutError, RendezvousTimeoutError)):
        return protocol.TIMEOUTS[type(command)]
    if isinstance(command, protocol.Prepare) or (
        isinstance(command, protocol.Receive) and isinstance(error, OSError)
    ):
        return FailureCode.STAGING_FAILED
    if isinstance(error, TransportError):
        return FailureCode.PEER_LOST
    return FailureCode.CHILD_FAILED


def main() -> NoReturn:
    """Entry point; the socket's descriptor is the one argument."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # The agent's own signals are not for the child: it ends when its parent says so or is gone.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    with suppress(ImportError):
        # Where it is installed; a group that needs it is not to wait for its import.
        importlib.import_module("nccl.core")
    Child(socket.socket(fileno=int(sys.argv[1]))).run()


if __name__ == "__main__":
    main()
