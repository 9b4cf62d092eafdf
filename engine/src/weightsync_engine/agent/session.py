"""The agent's end of the session: dial, say who we are, send what we are, hear what is wanted; for ever.

The session carries whole states, so nothing is queued and nothing is lost: the newest report is sent, and
sent again when there was silence. Losing it changes nothing but that nobody hears us.
"""

import asyncio
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import aiohttp

from weightsync_contract import logs
from weightsync_contract.codec import MalformedError
from weightsync_contract.frames import OversizedError, decode_from_operator, encode
from weightsync_contract.messages import (
    Desired,
    Hello,
    Nack,
    Observed,
    Refused,
    Released,
    TransferState,
    Welcome,
)
from weightsync_contract.names import MAX_FRAME_BYTES, SESSION_PATH
from weightsync_contract.reasons import RefusalCode
from weightsync_engine.agent.core.events import (
    DesiredReceived,
    Event,
    ReleasedReceived,
    SessionClosed,
    SessionOpened,
)
from weightsync_engine.agent.trust import context_of, explain

log = logs.get(__name__)

DIAL_SECONDS: Final = 10.0
"""Longest wait for a connection, and again for the welcome."""
REDIAL_SECONDS: Final = (0.1, 5.0)
PROGRESS_SECONDS: Final = 1.0
"""Between two reports that differ only in bytes."""
TRANSFER_PING_SECONDS: Final = 1.0
TRANSFER_DEAD_SECONDS: Final = 3.0

_MOVING = (TransferState.RECEIVING, TransferState.SENDING)


@dataclass(frozen=True, slots=True)
class Operator:
    """Where the operator is and how to be believed by it."""

    url: str
    """``ws://host:port`` or ``wss://host:port``."""
    token_file: Path
    """Read at each dial: tokens are replaced in place."""
    ca_file: Path | None = None
    """Read at each dial, too; None for the system's authorities."""


class _ClosedError(Exception):
    """The session ended; ``refused`` when the operator said why."""

    def __init__(self, why: str, refused: Refused | None = None) -> None:
        super().__init__(why)
        self.refused = refused


class Session:
    """Keeps one session open. ``hello`` is asked at each dial, as the term in it grows."""

    def __init__(self, operator: Operator, hello: Callable[[], Hello], post: Callable[[Event], None]) -> None:
        self._operator = operator
        self._hello = hello
        self._post = post
        self._newest: Observed | None = None
        self._nack: Nack | None = None
        self._changed = asyncio.Event()
        self._moving_since: float | None = None

    def report(self, observed: Observed) -> None:
        """Send this, unless something newer comes first."""
        self._newest = observed
        moving = observed.transfer.state in _MOVING
        if moving != (self._moving_since is not None):
            self._moving_since = time.monotonic() if moving else None
        self._changed.set()

    def nack(self, nack: Nack) -> None:
        """Send this beside the newest report."""
        self._nack = nack
        self._changed.set()

    async def run(self) -> None:
        """Dial until cancelled."""
        failures, address = 0, ""
        async with aiohttp.ClientSession() as http:
            while True:
                opened, refused = False, None
                try:
                    async with asyncio.timeout(DIAL_SECONDS):
                        socket = await self._dial(http, address)
                    async with socket:
                        welcome = await self._introduce(socket)
                        opened, failures = True, 0
                        log.info("session opened", operator=address or self._operator.url)
                        self._post(SessionOpened())
                        await self._talk(socket, welcome)
                except (_ClosedError, aiohttp.ClientError, OSError, ValueError, TimeoutError) as error:
                    refused = error.refused if isinstance(error, _ClosedError) else None
                    why = explain(error, self._url(address), self._operator.ca_file) or _why(error)
                    log.warning("session closed" if opened else "no session", why=why)
                finally:
                    if opened:
                        self._post(SessionClosed())
                    # A report made after this belongs to the next session.
                    self._nack = None
                # Follow a leader's address once; when that fails, ask the Service again.
                leads = refused is not None and refused.code is RefusalCode.NOT_LEADER and not address
                address = refused.address if leads and refused else ""
                if address:
                    continue
                failures += 1
                await asyncio.sleep(_backoff(failures, refused))

    async def _dial(self, http: aiohttp.ClientSession, address: str) -> aiohttp.ClientWebSocketResponse:
        base, url = urlsplit(self._operator.url), self._url(address)
        token = await asyncio.to_thread(self._operator.token_file.read_text)
        secure = urlsplit(url).scheme == "wss"
        context = await asyncio.to_thread(context_of, self._operator.ca_file) if secure else None
        return await http.ws_connect(
            url.rstrip("/") + SESSION_PATH,
            headers={"Authorization": f"Bearer {token.strip()}"},
            max_msg_size=MAX_FRAME_BYTES,
            ssl=context if context else True,
            # A leader's own address is in no certificate: it answers by the Service's name.
            server_hostname=base.hostname if secure else None,
        )

    def _url(self, address: str) -> str:
        base = urlsplit(self._operator.url)
        return address if "://" in address else f"{base.scheme}://{address or base.netloc}"

    async def _introduce(self, socket: aiohttp.ClientWebSocketResponse) -> Welcome:
        await socket.send_str(encode(self._hello()))
        async with asyncio.timeout(DIAL_SECONDS):
            answer = await _receive(socket)
        if not isinstance(answer, Welcome):
            raise _ClosedError(f"expected a welcome, got {type(answer).__name__}")
        return answer

    async def _talk(self, socket: aiohttp.ClientWebSocketResponse, welcome: Welcome) -> None:
        ends = [
            asyncio.create_task(self._speak(socket, welcome)),
            asyncio.create_task(self._listen(socket, welcome)),
        ]
        try:
            done, _ = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            for end in done:
                end.result()
        finally:
            for end in ends:
                end.cancel()
            await asyncio.gather(*ends, return_exceptions=True)

    async def _listen(self, socket: aiohttp.ClientWebSocketResponse, welcome: Welcome) -> None:
        receiving: asyncio.Task[Desired | Released | Welcome] | None = None
        heard = time.monotonic()
        try:
            while True:
                receiving = receiving or asyncio.create_task(_receive(socket))
                # Woken each second, since a transfer that begins makes the patience shorter.
                await asyncio.wait([receiving], timeout=min(welcome.dead_seconds, 1.0))
                if receiving.done():
                    message, receiving = receiving.result(), None
                    heard = time.monotonic()
                    if isinstance(message, Desired):
                        self._post(DesiredReceived(message))
                    elif isinstance(message, Released):
                        self._post(ReleasedReceived(message))
                elif time.monotonic() >= self._patience(heard, welcome):
                    raise _ClosedError(
                        f"{RefusalCode.SILENT}: heard nothing for {time.monotonic() - heard:.1f} s"
                    )
        finally:
            if receiving:
                receiving.cancel()

    def _patience(self, heard: float, welcome: Welcome) -> float:
        if self._moving_since is None:
            return heard + welcome.dead_seconds
        return max(heard, self._moving_since) + min(TRANSFER_DEAD_SECONDS, welcome.dead_seconds)

    async def _speak(self, socket: aiohttp.ClientWebSocketResponse, welcome: Welcome) -> None:
        last: Observed | None = None
        at = 0.0
        while True:
            self._changed.clear()
            if self._nack:
                nack, self._nack = self._nack, None
                await socket.send_str(encode(nack))
            newest, now = self._newest, time.monotonic()
            due = at + self._silence(last, newest, welcome)
            if newest is not None and now >= due:
                await self._send(socket, newest)
                last, at = newest, now
                continue
            try:
                async with asyncio.timeout(None if newest is None else max(due - now, 0.001)):
                    await self._changed.wait()
            except TimeoutError:
                continue

    async def _send(self, socket: aiohttp.ClientWebSocketResponse, observed: Observed) -> None:
        try:
            await socket.send_str(encode(observed))
        except OversizedError as error:
            # The versions are the one part that grows; the newest are those that matter.
            source = observed.source
            if source is None or len(source.versions) <= 1:
                raise
            log.error("report cut", why=error)
            fewer = source.versions[len(source.versions) // 2 :]
            await self._send(socket, replace(observed, source=replace(source, versions=fewer)))

    def _silence(self, last: Observed | None, newest: Observed | None, welcome: Welcome) -> float:
        """Seconds after the last report until this one is due."""
        if last is None or newest is None:
            return 0.0
        if newest == last:
            return TRANSFER_PING_SECONDS if newest.transfer.state in _MOVING else welcome.ping_seconds
        return PROGRESS_SECONDS if _still(newest) == _still(last) else 0.0


async def _receive(socket: aiohttp.ClientWebSocketResponse) -> Desired | Released | Welcome:
    frame = await socket.receive()
    if frame.type is not aiohttp.WSMsgType.TEXT:
        raise _ClosedError(f"the operator closed it ({frame.type.name.lower()}, {frame.data}, {frame.extra})")
    try:
        message = decode_from_operator(frame.data)
    except MalformedError as error:
        raise _ClosedError(f"{RefusalCode.MALFORMED}: {error}") from error
    if isinstance(message, Refused):
        raise _ClosedError(f"{message.code}: {message.message}", message)
    return message


def _still(observed: Observed) -> Observed:
    return replace(observed, transfer=replace(observed.transfer, bytes=0))


def _backoff(failures: int, refused: Refused | None) -> float:
    shortest, longest = REDIAL_SECONDS
    if refused is None or refused.code in (RefusalCode.NOT_LEADER, RefusalCode.TOKEN_EXPIRED):
        longest = min(longest, shortest * 2.0**failures)
    return random.uniform(shortest, longest)


def _why(error: BaseException) -> str:
    return str(error) or type(error).__name__
