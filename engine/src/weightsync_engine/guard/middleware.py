"""The ASGI middleware: who may pass, who waits, who is refused and why."""

import asyncio
import json
import os
import sys
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any, Final

from weightsync_contract.messages import VersionId
from weightsync_engine.boot import BootError, boot_id, end_engine
from weightsync_engine.guard.files import PermitFile, TokenFile
from weightsync_engine.guard.labels import Labelled, Message, Send
from weightsync_engine.guard.routes import OWN, RESTART, STATUS, Access, access, route_path
from weightsync_engine.permit import Mode, Permit
from weightsync_engine.worker.protocol import Hello
from weightsync_engine.worker.server import WorkerServer
from weightsync_engine.worker.sockets import forget_ended
from weightsync_engine.worker.state import WorkerState

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

DIRECTORY: Final = "WEIGHTSYNC_DIR"
DEFAULT_DIRECTORY: Final = "/run/weightsync"
HOLD_SECONDS: Final = "WEIGHTSYNC_HOLD_SECONDS"
"""How long a request may wait for a commit to end, by environment; 60 unless given."""

_RETRY_SECONDS: Final = 5
_POLICY_VIOLATION: Final = 1008


class Guard:
    """Wraps an engine's application. Never lets through what it can't judge.

    The directory that is shared with the agent comes from the environment variable WEIGHTSYNC_DIR. ``end`` is
    what a restart calls; it does not return in production.
    """

    def __init__(
        self, app: App, *, directory: Path | None = None, end: Callable[[], object] = end_engine
    ) -> None:
        self._app = app
        self._end = end
        self._directory = directory or Path(os.environ.get(DIRECTORY, DEFAULT_DIRECTORY))
        self._hold_seconds = float(os.environ.get(HOLD_SECONDS, "60"))
        self._boot, self._trouble = "", ""
        try:
            self._boot = boot_id()
        except BootError as error:
            self._trouble = str(error)
        # An empty boot is no permit's.
        self._permit = PermitFile(self._directory / "permit", self._boot)
        self._token = TokenFile(self._directory / "control-token")
        self._listen()

    def close(self) -> None:
        """Give up the socket; for whoever takes a guard down without ending its process."""
        self._server.close()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One connection, as ASGI has it."""
        kind = scope["type"]
        if kind == "lifespan":
            await self._app(scope, receive, send)
        elif kind == "http":
            await self._http(scope, receive, send)
        elif kind == "websocket":
            if self._token.grants(scope["headers"]):
                await self._app(scope, receive, send)
            else:
                await send({"type": "websocket.close", "code": _POLICY_VIOLATION, "reason": "agent only"})
        else:
            raise RuntimeError(f"a connection of type {kind!r}, which the guard can't judge")

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = route_path(scope)
        allowed = access(path)
        if allowed is Access.OPEN:
            await self._app(scope, receive, send)
        elif allowed is Access.PERMIT:
            await self._infer(scope, receive, send)
        elif not self._token.grants(scope["headers"]):
            message = f"{path!r} is for the pod's weightsync agent only: send its token"
            await _answer(send, 401, _error(message), [(b"www-authenticate", b"Bearer")])
        elif path == OWN or path.startswith(f"{OWN}/"):
            await self._own(path, scope["method"], send)
        else:
            await self._app(scope, receive, send)

    async def _infer(self, scope: Scope, receive: Receive, send: Send) -> None:
        permit = await self._permit.settled(self._hold_seconds)
        if permit is None or permit.mode is not Mode.SERVE:
            retry = [(b"retry-after", str(_RETRY_SECONDS).encode())]
            await _answer(send, 503, _error(self._refusal(permit)), retry)
            return
        await self._app(scope, receive, Labelled(send, self._present, permit.version))

    def _present(self) -> VersionId | None:
        permit = self._permit.read()
        return permit.version if permit else None

    def _refusal(self, permit: Permit | None) -> str:
        if self._trouble:
            return f"this engine serves nobody: {self._trouble}"
        if permit is None:
            return (
                f"this engine has no permit for its boot {self._boot}: its weights are not, or no longer, a"
                " version that it may serve. Its weightsync agent gives it one after a commit"
            )
        return f"new weights are being applied, for longer than {self._hold_seconds:g} s: try again"

    async def _own(self, path: str, method: str, send: Send) -> None:
        match method, path:
            case "GET", _ if path == STATUS:
                await _answer(send, 200, self._status())
            case "POST", _ if path == RESTART:
                print("weightsync: told to end this engine", file=sys.stderr, flush=True)  # noqa: T201
                await _answer(send, 200, {"ending": self._boot})
                # The answer is with the kernel once the loop has turned; what comes next ends this process.
                await asyncio.sleep(0.01)
                self._end()
            case _:
                await _answer(
                    send, 404, _error(f"no {method} {path}: there are GET {STATUS}, POST {RESTART}")
                )

    def _status(self) -> dict[str, Any]:
        permit = self._permit.read()
        shown = None
        if permit:
            run, version = (permit.version.run, permit.version.version) if permit.version else (None, None)
            shown = {"mode": permit.mode.value, "run": run, "version": version}
        return {"boot": self._boot, "pid": os.getpid(), "permit": shown, "trouble": self._trouble}

    def _listen(self) -> None:
        """A way to end this process though its event loop hangs; boot.end_engine says why this one must."""
        hello = Hello(self._boot, -1, 0, "api", os.getpid())
        self._server = WorkerServer(self._directory, f"api-{os.getpid()}", WorkerState(hello), self._end)
        try:
            forget_ended(self._directory)
            self._server.start()
        except OSError as error:
            self._server.close()
            print(f"weightsync: no socket for the agent: {error}", file=sys.stderr, flush=True)  # noqa: T201


def _error(message: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "weightsync_guard"}}


async def _answer(
    send: Send, status: int, document: dict[str, Any], headers: list[tuple[bytes, bytes]] | None = None
) -> None:
    body = json.dumps(document).encode()
    fields = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    start = {"type": "http.response.start", "status": status, "headers": [*fields, *(headers or [])]}
    await send(start)
    await send({"type": "http.response.body", "body": body})
