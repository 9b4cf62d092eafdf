"""Answers an agent's questions on a thread of an engine's process; never holds up the engine."""

import contextlib
import json
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from weightsync_contract import logs
from weightsync_contract.codec import MalformedError, from_document, to_document
from weightsync_engine.boot import end_engine
from weightsync_engine.worker.protocol import MAX_LINE, SOCKETS, Image
from weightsync_engine.worker.sockets import short_name
from weightsync_engine.worker.state import RefusedError, WorkerState

log = logs.get(__name__)

READ_SECONDS: Final = 10.0
"""From a question's first byte to its end."""
MAX_CONNECTIONS: Final = 8
_CHUNK: Final = 1 << 16
_MAX_FDS: Final = 4
_BACKLOG: Final = 128

Handler = Callable[[dict[str, Any], int | None], dict[str, Any] | None]


class WorkerServer:
    """Listens at ``<directory>/workers/<name>.sock`` from ``start`` until ``close``.

    A name is a rank's number, or ``api-<pid>`` for a process that only serves the API. A socket that a former
    boot left behind is replaced. Raises OSError when the socket can't be made.
    """

    def __init__(
        self, directory: Path, name: str, state: WorkerState, end: Callable[[], object] = end_engine
    ) -> None:
        self.path = directory / SOCKETS / f"{name}.sock"
        self._state = state
        self._end = end
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self._free = threading.BoundedSemaphore(MAX_CONNECTIONS)
        self._handlers: dict[str, Handler] = {
            "hello": lambda question, fd: to_document(self._state.hello),
            "status": lambda question, fd: to_document(self._state.status()),
            "manifest": self._manifest,
            "attach": self._attach,
            "drop": lambda question, fd: self._state.drop(),
        }

    def start(self) -> None:
        """Bind, then answer on daemon threads."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Bound under another name and renamed: whoever finds the socket finds it listening.
        scratch = self.path.with_suffix(f".{os.getpid()}")
        scratch.unlink(missing_ok=True)
        with short_name(scratch) as address:
            self._listener.bind(address)
        scratch.chmod(0o600)
        # A full backlog is a refusal at once, not a wait.
        self._listener.listen(_BACKLOG)
        scratch.replace(self.path)
        threading.Thread(target=self._accept, name="weightsync-socket", daemon=True).start()

    def close(self) -> None:
        """Listen no more. The file stays: the next boot replaces it, and until then nobody answers there."""
        with contextlib.suppress(OSError):
            # Wakes the thread in accept, which closing alone would not.
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            self._free.acquire()
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            answering = threading.Thread(target=self._serve, args=(connection,), daemon=True)
            answering.start()

    def _serve(self, connection: socket.socket) -> None:
        with connection:
            try:
                while self._answer_one(connection):
                    pass
            except OSError:
                pass  # the other side is gone, or took too long
            finally:
                self._free.release()

    def _answer_one(self, connection: socket.socket) -> bool:
        fds: list[int] = []
        try:
            try:
                line = _read(connection, fds)
            except RefusedError as error:
                # What follows can't be told from the rest of it.
                _send(connection, {"ok": False, "error": str(error)})
                return False
            if line is None:
                return False
            return self._answer(connection, line, fds)
        finally:
            for fd in fds:
                os.close(fd)

    def _answer(self, connection: socket.socket, line: bytes, fds: list[int]) -> bool:
        try:
            question = json.loads(line)
            op = question["op"]
            if op == "exit":
                log.warning("told to end", why=question.get("reason"))
                _send(connection, {"ok": True})
                self._end()
                return False
            if op == "arena":
                _send(connection, {"ok": True}, self._state.arena(_size(question)))
                return True
            answer = self._handlers[op](question, fds[0] if fds else None)
        except RefusedError as error:
            _send(connection, {"ok": False, "error": str(error)})
        except (ValueError, TypeError, KeyError, RecursionError, MalformedError) as error:
            _send(connection, {"ok": False, "error": f"malformed question: {error!r:.200}"})
        else:
            _send(connection, {"ok": True, **(answer or {})})
        return True

    def _manifest(self, question: dict[str, Any], fd: int | None) -> None:
        layout, data = question["layout"], question["data"]
        if not isinstance(layout, str) or not isinstance(data, str):
            raise RefusedError("a manifest is a layout id and JSON text")
        self._state.keep_manifest(layout, data)

    def _attach(self, question: dict[str, Any], fd: int | None) -> None:
        if fd is None:
            raise RefusedError("attach without a file descriptor")
        self._state.attach(from_document(Image, question), _size(question), fd)


def _size(question: dict[str, Any]) -> int:
    nbytes = question["nbytes"]
    if type(nbytes) is not int:
        raise RefusedError("nbytes is a whole number")
    return nbytes


def _read(connection: socket.socket, fds: list[int]) -> bytes | None:
    """One line, and in ``fds`` the descriptors that came with it; None at the end of the connection."""
    line = bytearray()
    connection.settimeout(None)
    while not line.endswith(b"\n"):
        data, received, flags, _ = socket.recv_fds(connection, _CHUNK, _MAX_FDS)
        fds.extend(received)
        connection.settimeout(READ_SECONDS)
        if not data:
            return None
        line += data
        if len(line) > MAX_LINE or len(fds) > _MAX_FDS or flags & socket.MSG_CTRUNC:
            raise RefusedError(f"a question of more than {MAX_LINE} bytes or {_MAX_FDS} descriptors")
        if b"\n" in data[:-1]:
            raise RefusedError("one question at a time")
    return bytes(line)


def _send(connection: socket.socket, answer: dict[str, Any], fd: int | None = None) -> None:
    """With a descriptor, which stays ours, where the answer has one."""
    connection.settimeout(READ_SECONDS)
    data = json.dumps(answer, separators=(",", ":")).encode() + b"\n"
    if fd is not None:
        data = data[socket.send_fds(connection, [data], [fd]) :]
    connection.sendall(data)
