"""The WebSocket that agents dial: hello, checks, welcome; every refusal says why before it closes."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from aiohttp import WSMsgType, web

from weightsync_contract import logs
from weightsync_contract.codec import MalformedError
from weightsync_contract.frames import decode_from_agent
from weightsync_contract.messages import Hello, Refused
from weightsync_contract.names import MAX_FRAME_BYTES, SESSION_PATH
from weightsync_contract.reasons import RefusalCode
from weightsync_operator.session.auth import Authenticator, RefusedError, session_seconds
from weightsync_operator.session.connection import KeepAlive, Session, refusal_of, send_refusal
from weightsync_operator.session.registry import Registry

log = logs.get(__name__)

_HELLO_SECONDS: Final = 5.0
_CLOSE_SECONDS: Final = 2.0
# Room to receive a frame that is too large and to say so; beyond this the socket is closed with code 1009.
_RECEIVE_BYTES: Final = 4 * MAX_FRAME_BYTES


@dataclass(frozen=True, slots=True)
class Leadership:
    """Whether agents may be taken, and where to send them if not."""

    ready: bool
    address: str = ""


class SessionServer:
    """Takes agents' connections as long as ``leadership`` says so."""

    def __init__(
        self,
        registry: Registry,
        authenticator: Authenticator,
        leadership: Callable[[], Leadership],
        may_send: Callable[[], bool],
        keep_alive: KeepAlive,
    ) -> None:
        self._registry = registry
        self._authenticator = authenticator
        self._leadership = leadership
        self._may_send = may_send
        self._keep_alive = keep_alive

    def add_routes(self, app: web.Application) -> None:
        app.router.add_get(SESSION_PATH, self._handle)

    async def _handle(self, request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse(max_msg_size=_RECEIVE_BYTES, timeout=_CLOSE_SECONDS, compress=False)
        await socket.prepare(request)
        try:
            session, seconds = await self._open(socket, bearer_token(request))
        except RefusedError as error:
            address = self._leadership().address if error.code is RefusalCode.NOT_LEADER else ""
            if error.code is not RefusalCode.NOT_LEADER:
                log.warning("session refused", peer=request.remote, code=error.code, message=error.message)
            await send_refusal(socket, Refused(error.code, error.message, address))
            return socket
        self._registry.opened(session)
        try:
            await session.run(lambda message: self._registry.heard(session, message), seconds)
        finally:
            self._registry.closed(session)
        return socket

    async def _open(self, socket: web.WebSocketResponse, token: str) -> tuple[Session, float]:
        self._check_leading()
        hello = await _receive_hello(socket)
        await self._authenticator.check(token, hello)
        self._check_leading()
        return Session(socket, hello, self._keep_alive, self._may_send), session_seconds(token)

    def _check_leading(self) -> None:
        if not self._leadership().ready:
            raise RefusedError(RefusalCode.NOT_LEADER, "this replica does not lead: dial the leader")


def bearer_token(request: web.Request) -> str:
    """The token of the Authorization header; empty if there is none."""
    scheme, _, token = request.headers.get("Authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


async def _receive_hello(socket: web.WebSocketResponse) -> Hello:
    try:
        async with asyncio.timeout(_HELLO_SECONDS):
            message = await socket.receive()
    except TimeoutError:
        raise RefusedError(RefusalCode.SILENT, f"no hello within {_HELLO_SECONDS:g} s") from None
    if message.type is not WSMsgType.TEXT:
        raise RefusedError(RefusalCode.MALFORMED, "the first frame must be a hello, as JSON text")
    try:
        hello = decode_from_agent(message.data)
    except MalformedError as error:
        raise RefusedError(refusal_of(error), str(error)) from error
    if not isinstance(hello, Hello):
        raise RefusedError(RefusalCode.MALFORMED, "$.type: the first frame must be a hello")
    return hello
