"""Asks a process of an engine over its socket; the agent's side."""

import array
import json
import os
import socket
import time
from pathlib import Path
from typing import Any, TypeVar

from weightsync_contract.codec import MalformedError, from_document, to_document
from weightsync_contract.manifest import Manifest
from weightsync_engine.worker.protocol import MAX_LINE, Hello, Image, WorkerStatus
from weightsync_engine.worker.sockets import short_name

T = TypeVar("T")


class UnreachableError(Exception):
    """Nobody answered: no such socket, none behind it, or not in time."""


class WorkerRefusedError(Exception):
    """The process answered no; the message says why. Nothing has changed there."""


class WorkerClient:
    """One connection a question, ``seconds`` for each. Blocks: for use on a thread.

    Every method raises UnreachableError, and WorkerRefusedError where the other side may refuse.
    """

    def __init__(self, path: Path, seconds: float) -> None:
        self._path = path
        self._seconds = seconds

    def hello(self) -> Hello:
        """Who is there?"""
        return self._typed(Hello, {"op": "hello"})

    def status(self) -> WorkerStatus:
        """Where is it?"""
        return self._typed(WorkerStatus, {"op": "status"})

    def manifest(self, manifest: Manifest) -> None:
        """Give it the manifest."""
        self._ask({"op": "manifest", "layout": manifest.layout, "data": manifest.encode().decode()})

    def attach(self, image: Image, nbytes: int, fd: int) -> None:
        """Give it a version's staged memory; ``fd`` stays the caller's."""
        self._ask({"op": "attach", "nbytes": nbytes, **to_document(image)}, fd)

    def arena(self, nbytes: int) -> int:
        """A descriptor, the caller's from here on, of this rank's device memory for ``nbytes``."""
        received: list[int] = []
        try:
            self._ask({"op": "arena", "nbytes": nbytes}, received=received)
            return received.pop(0)
        except IndexError:
            raise UnreachableError(f"{self._path}: an answer without a descriptor") from None
        finally:
            for fd in received:
                os.close(fd)

    def drop(self) -> None:
        """Let it let go of the staged memory."""
        self._ask({"op": "drop"})

    def exit(self, reason: str) -> None:
        """End the engine."""
        self._ask({"op": "exit", "reason": reason})

    def _typed(self, kind: type[T], question: dict[str, Any]) -> T:
        try:
            return from_document(kind, self._ask(question))
        except MalformedError as error:
            raise UnreachableError(f"{self._path}: an answer of another form: {error}") from error

    def _ask(
        self, question: dict[str, Any], fd: int | None = None, received: list[int] | None = None
    ) -> dict[str, Any]:
        """Descriptors that come with the answer go to ``received``; without it none can come."""
        until = time.monotonic() + self._seconds
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
                connection.settimeout(self._seconds)
                with short_name(self._path) as address:
                    connection.connect(address)
                data = json.dumps(question, separators=(",", ":")).encode() + b"\n"
                if fd is not None:
                    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
                    data = data[connection.sendmsg([data], rights) :]
                connection.sendall(data)
                answer = json.loads(_read_line(connection, until, received))
        except (OSError, ValueError) as error:
            raise UnreachableError(f"{self._path}: {error!r}") from error
        if not isinstance(answer, dict):
            raise UnreachableError(f"{self._path}: an answer of another form")
        if answer.get("ok") is not True:
            raise WorkerRefusedError(str(answer.get("error") or "refused without a reason"))
        return answer


def _read_line(connection: socket.socket, until: float, received: list[int] | None) -> bytes:
    line = bytearray()
    while not line.endswith(b"\n"):
        connection.settimeout(max(0.001, until - time.monotonic()))
        if received is None:
            data = connection.recv(1 << 16)
        else:
            data, fds, _, _ = socket.recv_fds(connection, 1 << 16, 4)
            received.extend(fds)
        if not data:
            raise ConnectionError("closed without an answer")
        line += data
        if len(line) > MAX_LINE:
            raise ConnectionError(f"an answer of more than {MAX_LINE} bytes")
    return bytes(line)
