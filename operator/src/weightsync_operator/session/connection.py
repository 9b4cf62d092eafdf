"""One agent's open session: a one-slot outbox, keep-alive by state, an end with a reason."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from aiohttp import WSCloseCode, WSMsgType, web

from weightsync_contract.codec import MalformedError
from weightsync_contract.frames import FromAgent, FromOperator, OversizedError, decode_from_agent, encode
from weightsync_contract.messages import (
    Desired,
    Hello,
    Observed,
    Phase,
    Refused,
    Released,
    TransferState,
    Welcome,
)
from weightsync_contract.names import PROTOCOL_MAX
from weightsync_contract.reasons import RefusalCode


@dataclass(frozen=True, slots=True)
class KeepAlive:
    """Seconds. A side sends its state when it was silent for ``ping``, and gives up after ``dead``."""

    ping: float = 5.0
    dead: float = 15.0
    transfer_ping: float = 1.0
    transfer_dead: float = 3.0


_MOVING: Final = (TransferState.SENDING, TransferState.RECEIVING)
_CLOSE_SECONDS: Final = 2.0


class Session:
    """Belongs to one event loop. ``may_send`` is asked right before each frame: only a leader may speak."""

    def __init__(
        self,
        socket: web.WebSocketResponse,
        hello: Hello,
        keep_alive: KeepAlive,
        may_send: Callable[[], bool],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.hello = hello
        self._socket = socket
        self._keep_alive = keep_alive
        self._may_send = may_send
        self._clock = clock
        self._welcome = Welcome(
            protocol=min(hello.protocol_max, PROTOCOL_MAX),
            ping_seconds=keep_alive.ping,
            dead_seconds=keep_alive.dead,
        )
        self._state: FromOperator = self._welcome
        self._state_at = self._heard_at = self._sent_at = clock()
        self._pending = False
        self._refusal: Refused | None = None
        self._wake = asyncio.Event()
        self._moving = False

    @property
    def refusal(self) -> Refused | None:
        """Why the session was ended, if this side ended it."""
        return self._refusal

    def offer(self, message: Desired | Released) -> None:
        """Send ``message``, in place of any earlier one that is not sent yet."""
        self._state, self._state_at = message, self._clock()
        self._pending = True
        self._wake.set()

    def refuse(self, code: RefusalCode, message: str, address: str = "") -> None:
        """End the session, saying why. The first reason counts."""
        if self._refusal is None:
            self._refusal = Refused(code, message, address)
            self._wake.set()

    async def run(self, on_message: Callable[[FromAgent], None], seconds: float) -> None:
        """Speak until either side ends it, ``seconds`` at most; the socket is closed afterwards."""
        expiry = asyncio.get_running_loop().call_later(
            seconds,
            self.refuse,
            RefusalCode.TOKEN_EXPIRED,
            "the token has to be checked again: dial again with the present one",
        )
        reader = asyncio.create_task(self._read(on_message))
        writer = asyncio.create_task(self._write())
        try:
            await asyncio.wait([reader, writer], return_when=asyncio.FIRST_COMPLETED)
            if self._refusal is not None:
                await send_refusal(self._socket, self._refusal)
        finally:
            expiry.cancel()
            for task in (reader, writer):
                task.cancel()
            await asyncio.gather(reader, writer, return_exceptions=True)
            await self._socket.close()

    async def _read(self, on_message: Callable[[FromAgent], None]) -> None:
        while True:
            message = await self._socket.receive()
            if message.type is WSMsgType.TEXT:
                self._heard_at = self._clock()
                try:
                    decoded = decode_from_agent(message.data)
                except MalformedError as error:
                    self.refuse(refusal_of(error), str(error))
                    return
                self._note(decoded)
                on_message(decoded)
            elif message.type is WSMsgType.BINARY:
                self.refuse(RefusalCode.MALFORMED, "a frame must be JSON text, not binary")
                return
            else:
                return

    def _note(self, message: FromAgent) -> None:
        if isinstance(message, Observed):
            moving = message.transfer.state in _MOVING
            if moving != self._moving:
                self._moving = moving
                self._wake.set()

    async def _write(self) -> None:
        await self._send(self._welcome)
        while self._refusal is None:
            if self._pending or self._clock() >= self._sent_at + self._ping():
                self._pending = False
                await self._send(self._aged_state())
            silent_until = self._heard_at + self._dead()
            if self._clock() >= silent_until:
                self.refuse(RefusalCode.SILENT, f"nothing was heard for {self._dead():g} s: dial again")
                return
            self._wake.clear()
            seconds = min(self._sent_at + self._ping(), silent_until) - self._clock()
            try:
                async with asyncio.timeout(max(0.0, seconds)):
                    await self._wake.wait()
            except TimeoutError:
                continue

    async def _send(self, message: FromOperator) -> None:
        self._sent_at = self._clock()
        if not self._may_send():
            return
        try:
            async with asyncio.timeout(self._dead()):
                await self._socket.send_str(encode(message))
        except TimeoutError:
            self.refuse(RefusalCode.SILENT, f"the agent took nothing for {self._dead():g} s: dial again")
        except ConnectionError:
            self.refuse(RefusalCode.SILENT, "the connection broke: dial again")

    def _aged_state(self) -> FromOperator:
        state = self._state
        if isinstance(state, Desired) and state.remaining_ms:
            # A state is sent again and again, but its phase has only one deadline. 0 would mean that there
            # is none.
            aged = state.remaining_ms - round((self._clock() - self._state_at) * 1000)
            return replace(state, remaining_ms=max(1, aged))
        return state

    def _wants_transfer(self) -> bool:
        state = self._state
        return (
            isinstance(state, Desired) and state.wanted is not None and state.wanted.phase is Phase.TRANSFER
        )

    def _ping(self) -> float:
        fast = self._moving or self._wants_transfer()
        return self._keep_alive.transfer_ping if fast else self._keep_alive.ping

    def _dead(self) -> float:
        # By what the agent says of itself: it sends fast from then on, not from when it was asked to.
        return self._keep_alive.transfer_dead if self._moving else self._keep_alive.dead


def refusal_of(error: MalformedError) -> RefusalCode:
    """The code for a frame that could not be read."""
    return RefusalCode.OVERSIZED if isinstance(error, OversizedError) else RefusalCode.MALFORMED


async def send_refusal(socket: web.WebSocketResponse, refusal: Refused) -> None:
    """Say why, then close; a peer that does not listen is not waited for."""
    try:
        async with asyncio.timeout(_CLOSE_SECONDS):
            await socket.send_str(encode(refusal))
            await socket.close(code=WSCloseCode.POLICY_VIOLATION, message=refusal.code.value.encode())
    except (TimeoutError, ConnectionError, RuntimeError):
        return
