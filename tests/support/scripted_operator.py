"""A fake operator: it speaks the real session with real agents, and wants what the test says.

It decides nothing and forgets nothing: the newest report of each pod, and every report in order.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

from aiohttp import WSMsgType, web

from weightsync_contract.frames import decode_from_agent, encode
from weightsync_contract.messages import Desired, Hello, Nack, ObjectRef, Observed, Released, Welcome
from weightsync_contract.names import MAX_FRAME_BYTES, SESSION_PATH

REF = ObjectRef("default", "demo", "cr-1")


@dataclass
class Pod:
    """What one pod's agent has told, over all its sessions and processes."""

    hellos: list[Hello] = field(default_factory=list)
    reports: list[Observed] = field(default_factory=list)
    nacks: list[Nack] = field(default_factory=list)
    socket: web.WebSocketResponse | None = None
    desired: Desired | None = None

    @property
    def told(self) -> Observed | None:
        return self.reports[-1] if self.reports else None


class ScriptedOperator:
    """Welcome everybody; send what ``want`` was told, at once and after each reconnect."""

    def __init__(self) -> None:
        self.pods: dict[str, Pod] = {}
        self.term, self.seq = 1, 0
        self.url = ""
        self._runner: web.AppRunner | None = None
        self._port = 0
        self._changed = asyncio.Event()

    def pod(self, name: str) -> Pod:
        return self.pods.setdefault(name, Pod())

    async def want(self, name: str, **wants: object) -> None:
        """The operator's next word to a pod; what is not given is as it was."""
        self.seq += 1
        pod = self.pod(name)
        before = pod.desired or Desired(REF, self.term, self.seq)
        pod.desired = replace(before, term=self.term, seq=self.seq, **wants)  # type: ignore[arg-type]
        if pod.socket and not pod.socket.closed:
            await pod.socket.send_str(encode(pod.desired))

    async def release(self, name: str) -> None:
        pod = self.pod(name)
        pod.desired = None
        if pod.socket:
            await pod.socket.send_str(encode(Released(self.term)))

    async def until(
        self, name: str, condition: Callable[[Observed], object], what: str, seconds: float = 30.0
    ) -> Observed:
        """Wait until a pod's newest report is so. Raises AssertionError, with the report, when it is not."""
        pod = self.pod(name)
        try:
            async with asyncio.timeout(seconds):
                while pod.told is None or not condition(pod.told):
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            raise AssertionError(f"{name}: not {what} within {seconds:g} s: {pod.told}") from None
        return pod.told

    async def start(self) -> None:
        """Listen, on the same port as before."""
        app = web.Application()
        app.router.add_get(SESSION_PATH, self._session)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self._port).start()
        self._port = self._runner.addresses[0][1]
        self.url = f"ws://127.0.0.1:{self._port}"

    async def stop(self) -> None:
        """Be gone, as a killed operator is."""
        if self._runner:
            await self._runner.cleanup()
            self._runner = None

    async def _session(self, request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse(max_msg_size=MAX_FRAME_BYTES)
        await socket.prepare(request)
        await socket.send_str(encode(Welcome(1, 1.0, 5.0)))
        pod: Pod | None = None
        pings: asyncio.Task[None] | None = None
        try:
            async for frame in socket:
                if frame.type is not WSMsgType.TEXT:
                    break
                message = decode_from_agent(frame.data)
                if isinstance(message, Hello):
                    pod = self.pod(message.pod.name)
                    pod.hellos.append(message)
                    pod.socket = socket
                    pings = asyncio.create_task(self._keep_alive(pod, socket))
                elif pod and isinstance(message, Observed):
                    pod.reports.append(message)
                elif pod and isinstance(message, Nack):
                    pod.nacks.append(message)
                self._changed.set()
        finally:
            if pings:
                pings.cancel()
            await socket.close()
        return socket

    async def _keep_alive(self, pod: Pod, socket: web.WebSocketResponse) -> None:
        while not socket.closed:
            await socket.send_str(encode(pod.desired or Welcome(1, 1.0, 5.0)))
            await asyncio.sleep(0.5)


@asynccontextmanager
async def scripted_operator() -> AsyncIterator[ScriptedOperator]:
    """One that listens on a free port of loopback."""
    operator = ScriptedOperator()
    await operator.start()
    try:
        yield operator
    finally:
        await operator.stop()
