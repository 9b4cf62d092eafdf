"""Fake agents: they speak the real session and obey what they are asked, but transfer and serve nothing.

What they share (`FakeNetwork`) stands for the group: it joins when all its ranks are there. A `Stop` holds an
agent at a point of a rollout, so that a test can look, break something and let it go on.
"""

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from enum import Enum, auto

from aiohttp import ClientError, ClientSession, ClientWebSocketResponse, WSMsgType

from weightsync_contract.codec import from_document
from weightsync_contract.frames import FromOperator, encode
from weightsync_contract.messages import (
    Capability,
    Desired,
    Group,
    Hello,
    Nack,
    Observed,
    Phase,
    PodRef,
    Published,
    Refused,
    Released,
    Serving,
    ServingState,
    Source,
    Transfer,
    TransferState,
    VersionId,
    Welcome,
)
from weightsync_contract.names import PROTOCOL_MAX, PROTOCOL_MIN, SESSION_PATH
from weightsync_contract.reasons import RefusalCode, Role

LAYOUT = "sha256:fake"
KINDS = {"welcome": Welcome, "refused": Refused, "desired": Desired, "released": Released}


class Stop(Enum):
    """Where an agent can be held."""

    JOIN = auto()
    CHECK = auto()
    TRANSFER = auto()
    COMMIT = auto()


class FakeNetwork:
    """Who is in which group, across all agents of a test."""

    def __init__(self) -> None:
        self._joined: dict[str, set[int]] = {}
        self._changed: dict[str, asyncio.Event] = {}
        self.rank_maps: dict[int, dict[int, str]] = {}
        """Every rank that any agent ever took, by epoch; it must stay a function."""

    async def join(self, group: Group, name: str) -> None:
        """Return when every rank of the group is there."""
        ranks = self.rank_maps.setdefault(group.epoch, {})
        holder = ranks.setdefault(group.rank, name)
        assert holder == name, f"epoch {group.epoch} gave rank {group.rank} to {holder} and {name}"
        joined = self._joined.setdefault(group.nonce, set())
        joined.update(range(group.rank, group.rank + group.ranks))
        changed = self._changed.setdefault(group.nonce, asyncio.Event())
        changed.set()
        while len(joined) < group.world_size:
            changed.clear()
            await changed.wait()


@dataclass
class Counters:
    """What an agent got, for tests about how much is sent."""

    desired: int = 0
    welcomes: int = 0
    refusals: list[Refused] = field(default_factory=list)
    released: int = 0


class FakeAgent:
    """One pod's agent. ``token`` is called for each dial; ``urls`` are tried in turn, the leader's first."""

    def __init__(
        self,
        network: FakeNetwork,
        urls: Callable[[], list[str]],
        pod: PodRef,
        role: Role,
        token: Callable[[], str],
        redial_seconds: float = 0.05,
        ranks: int = 1,
    ) -> None:
        self.network, self.pod, self.role = network, pod, role
        self.counters = Counters()
        self.incarnation = secrets.token_hex(4)
        self.desired: Desired | None = None
        self.transfer = Transfer()
        self.serving = (
            Serving(ServingState.INITIAL, boot=secrets.token_hex(4)) if role is Role.INFERENCE else None
        )
        self.source = Source(run="run-1", connected=True) if role is Role.TRAINER else None
        self.highest_term = 0
        self.held: set[Stop] = set()
        self.served: list[VersionId] = []
        self.terms: list[int] = []
        self.ranks = ranks
        self._urls, self._token, self._redial_seconds = urls, token, redial_seconds
        self._changed = asyncio.Event()
        self._wake = asyncio.Event()
        self._socket: ClientWebSocketResponse | None = None
        self._joining: asyncio.Task[None] | None = None
        self._joined: str = ""

    # ---------------------------------------- what a test does to it

    @asynccontextmanager
    async def running(self) -> AsyncIterator["FakeAgent"]:
        tasks = [asyncio.create_task(self._dial_for_ever()), asyncio.create_task(self._act_for_ever())]
        try:
            yield self
        finally:
            for task in tasks:
                task.cancel()
            if self._joining is not None:
                self._joining.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def hold(self, *stops: Stop) -> None:
        self.held |= set(stops)

    def let_go(self) -> None:
        self.held.clear()
        self._wake.set()

    def publish(self, version: int, run: str = "run-1") -> VersionId:
        """Have a new version, as the trainer's agent has after publish()."""
        assert self.source is not None
        identity = VersionId(run, version)
        new = Published(identity, LAYOUT, f"xxh3-128:{run}-{version}", total_bytes=1 << 20, tensors=3)
        kept = self.source.versions[-1:] if self.source.run == run else ()
        self.source = replace(self.source, run=run, versions=(*kept, new))
        self._wake.set()
        return identity

    def restart_engine(self) -> None:
        """The engine is another process now, with the weights that it started with."""
        self.serving = Serving(ServingState.INITIAL, boot=secrets.token_hex(4))
        self._wake.set()

    async def hang_up(self) -> None:
        if self._socket is not None:
            await self._socket.close()

    async def until(self, condition: Callable[["FakeAgent"], bool], seconds: float = 20) -> None:
        """Wait for something to become true of this agent."""
        try:
            async with asyncio.timeout(seconds):
                while not condition(self):
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            raise AssertionError(f"never became true of {self!r}") from None

    async def until_serving(self, version: VersionId, seconds: float = 20) -> None:
        await self.until(lambda a: a.serving is not None and a.serving.version == version, seconds)

    def __repr__(self) -> str:
        return (
            f"<{self.pod.name} {self.transfer} {self.serving} desired={self.desired} "
            f"refusals={self.counters.refusals}>"
        )

    # ---------------------------------------- session

    async def _dial_for_ever(self) -> None:
        attempt = 0
        leader = ""
        async with ClientSession() as http:
            while True:
                urls = self._urls()
                url = leader or (urls[attempt % len(urls)] if urls else "http://127.0.0.1:1")
                attempt += 1
                leader = ""
                try:
                    headers = {"Authorization": f"Bearer {self._token()}"}
                    async with http.ws_connect(url + SESSION_PATH, headers=headers) as socket:
                        leader = await self._speak(socket)
                except (ClientError, OSError, TimeoutError):
                    pass
                self._socket = None
                self._changed.set()
                await asyncio.sleep(self._redial_seconds)

    async def _speak(self, socket: ClientWebSocketResponse) -> str:
        hello = Hello(
            PROTOCOL_MIN, PROTOCOL_MAX, self.pod, self.role, self.incarnation, term=self.highest_term
        )
        await socket.send_str(encode(hello))
        ping: asyncio.Task[None] | None = None
        try:
            async for frame in socket:
                if frame.type is not WSMsgType.TEXT:
                    break
                document = frame.json()
                message: FromOperator = from_document(KINDS[document["type"]], document)
                match message:
                    case Welcome():
                        self.counters.welcomes += 1
                        self._socket = socket
                        if ping is None:
                            ping = asyncio.create_task(self._keep_alive(socket))
                        await self._tell()
                    case Refused():
                        self.counters.refusals.append(message)
                        return f"http://{message.address}" if message.address else ""
                    case Desired():
                        self.counters.desired += 1
                        await self._take(message)
                    case Released():
                        self.counters.released += 1
                        self.desired, self.transfer, self._joined = None, Transfer(), ""
                        await self._tell()
                self._changed.set()
        finally:
            if ping is not None:
                ping.cancel()
        return ""

    async def _keep_alive(self, socket: ClientWebSocketResponse) -> None:
        while True:
            await asyncio.sleep(0.5)
            with contextlib.suppress(ConnectionError):
                await socket.send_str(encode(self.observed()))

    async def _take(self, desired: Desired) -> None:
        known = self.desired
        same = known is not None and known.weightsync.uid == desired.weightsync.uid
        if desired.term < self.highest_term:
            nack = Nack(self.highest_term, desired.seq, RefusalCode.STALE_TERM, "a higher term was obeyed")
            assert self._socket is not None
            await self._socket.send_str(encode(nack))
            return
        if same and known is not None and (desired.term, desired.seq) == (known.term, known.seq):
            return
        self.highest_term = desired.term
        if not self.terms or self.terms[-1] != desired.term:
            self.terms.append(desired.term)
        self.desired = desired
        self._wake.set()
        await self._tell()

    def observed(self) -> Observed:
        desired = self.desired
        return Observed(
            term=desired.term if desired else 0,
            seq=desired.seq if desired else 0,
            highest_term=self.highest_term,
            ranks=self.ranks,
            transfer=self.transfer,
            serving=self.serving,
            source=self.source,
            capabilities=tuple(Capability),
        )

    async def _tell(self) -> None:
        self._changed.set()
        if self._socket is not None:
            with contextlib.suppress(ConnectionError):
                await self._socket.send_str(encode(self.observed()))

    # ---------------------------------------- obedience

    async def _act_for_ever(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            before = None
            while before != (self.transfer, self.serving):
                before = (self.transfer, self.serving)
                self._act()
            await self._tell()

    def _act(self) -> None:
        desired = self.desired
        if desired is None:
            return
        if desired.group is None:
            self.transfer, self._joined = Transfer(checked=self.transfer.checked), ""
        else:
            self._act_in_group(desired, desired.group)
        if desired.commit is not None and self.serving is not None:
            self._commit(desired, desired.commit)

    def _act_in_group(self, desired: Desired, group: Group) -> None:
        if self.transfer.nonce != group.nonce:
            self.transfer = Transfer(
                TransferState.JOINING, group.epoch, group.nonce, checked=self.transfer.checked
            )
            self._joined = ""
            if self._joining is not None:
                self._joining.cancel()
                self._joining = None
        if self.role is Role.TRAINER and not self.transfer.endpoint:
            self.transfer = replace(self.transfer, endpoint=f"10.0.0.1:{20000 + group.epoch}")
        ready = group.endpoint or self.role is Role.TRAINER
        if self._joining is None and ready and Stop.JOIN not in self.held:
            self._joining = asyncio.create_task(self._join(group))
        if self._joined != group.nonce:
            return
        if self.transfer.state is TransferState.JOINING:
            self.transfer = replace(self.transfer, state=TransferState.JOINED)
        self._act_on_version(desired)

    async def _join(self, group: Group) -> None:
        await self.network.join(group, self.pod.name)
        self._joined = group.nonce
        self._wake.set()

    def _act_on_version(self, desired: Desired) -> None:
        wanted = desired.wanted
        if wanted is None:
            self.transfer = replace(
                self.transfer, state=TransferState.JOINED, version=None, bytes=0, total_bytes=0, digest=""
            )
            return
        if self.transfer.checked != wanted.layout and Stop.CHECK not in self.held:
            self.transfer = replace(self.transfer, checked=wanted.layout)
        sends = self.role is Role.TRAINER
        if wanted.phase is not Phase.TRANSFER or self.transfer.version == wanted.version:
            if Stop.TRANSFER in self.held or self.transfer.state not in (
                TransferState.RECEIVING,
                TransferState.SENDING,
            ):
                return
            done = TransferState.SENT if sends else TransferState.STAGED
            digest = "" if sends else wanted.digest
            self.transfer = replace(self.transfer, state=done, bytes=wanted.total_bytes, digest=digest)
            return
        moving = TransferState.SENDING if sends else TransferState.RECEIVING
        self.transfer = replace(
            self.transfer, state=moving, version=wanted.version, bytes=0, total_bytes=wanted.total_bytes
        )

    def _commit(self, desired: Desired, commit: VersionId) -> None:
        assert self.serving is not None
        if self.serving.state is ServingState.SERVING and self.serving.version == commit:
            return
        staged = self.transfer.state is TransferState.STAGED and self.transfer.version == commit
        if not staged:
            return
        if Stop.COMMIT in self.held:
            self.serving = replace(self.serving, state=ServingState.APPLYING)
            return
        assert self.transfer.digest == desired.commit_digest, "committed what was not verified"
        self.serving = replace(
            self.serving, state=ServingState.SERVING, version=commit, digest=self.transfer.digest
        )
        self.served.append(commit)
        self.transfer = replace(
            self.transfer, state=TransferState.JOINED, version=None, bytes=0, total_bytes=0, digest=""
        )
