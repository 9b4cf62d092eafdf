"""The agent's children: each is a rank of one group while the group lives; it is killed, never reused."""

import asyncio
import contextlib
import os
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any, Final

from weightsync_contract import logs
from weightsync_contract.manifest import Manifest, ManifestError
from weightsync_contract.messages import Mode, Staging, Wanted
from weightsync_contract.reasons import FailureCode, Role
from weightsync_engine.adapter import ArenaError, Engine, EngineUnreachableError
from weightsync_engine.agent.core import events as core
from weightsync_engine.agent.core.effects import (
    AllocateStaging,
    ExchangeManifest,
    KillChild,
    OpenChild,
    ReceiveVersion,
    SealStaging,
    SendVersion,
)
from weightsync_engine.agent.manifests import Manifests
from weightsync_engine.agent.staging import StagingArea, StagingError
from weightsync_engine.publish.store import StoredVersion, VersionNotRetainedError, VersionStore
from weightsync_engine.transfer.process import ChildPool, ChildProcess
from weightsync_engine.transfer.protocol import (
    Command,
    Event,
    Failed,
    Join,
    Listen,
    Listening,
    ManifestReceived,
    ManifestSent,
    Prepare,
    Prepared,
    Progress,
    Ready,
    Receive,
    Received,
    ReceiveManifest,
    Send,
    SendManifest,
    Sent,
    Unmapped,
)

log = logs.get(__name__)

PREPARE_SECONDS: Final = 600.0
"""The child's own limit for having memory; the phase's deadline is the one that counts."""
END_SECONDS: Final = 1.0


class Children:
    """Turns orders into a child's commands and its words into events, each with the child's number."""

    def __init__(
        self,
        role: Role,
        host: str,
        pool: ChildPool,
        manifests: Manifests,
        staging: StagingArea,
        store: VersionStore | None,
        engine: Engine | None,
        limit_rate: int,
        post: Callable[[core.Event], None],
    ) -> None:
        self._role, self._host, self._limit_rate = role, host, limit_rate
        self._pool, self._manifests, self._staging, self._store = pool, manifests, staging, store
        self._engine, self._post = engine, post
        self._living: dict[int, _Child] = {}
        self._opening: set[asyncio.Task[None]] = set()

    def open(self, order: OpenChild) -> None:
        """Start one; it listens as rank 0, else joins."""
        group = order.group
        command: Command
        if group.rank == 0:
            command = Listen(
                self._host,
                order.transport.port,
                group.world_size,
                group.nonce,
                order.seconds,
                order.transport.backend,
            )
        else:
            command = Join(
                group.endpoint,
                group.nonce,
                group.rank,
                group.world_size,
                order.seconds,
                order.transport.backend,
            )
        child = _Child(order.child, self._pool, self._hear, self._gone)
        self._living[order.child] = child
        child.tell(command)

    def exchange(self, order: ExchangeManifest) -> None:
        """Send the manifest, or receive it."""
        child = self._living.get(order.child)
        if child is None:
            return
        child.wanted = order.wanted
        if self._role is Role.TRAINER:
            self._with_stored(child, order.wanted, lambda stored: self._send_manifest(child, stored, order))
        else:
            child.tell(ReceiveManifest(order.seconds))

    def allocate(self, order: AllocateStaging) -> None:
        """Have memory, and have the child map it before it is needed."""
        child = self._living.get(order.child)
        if order.device:
            self._start(self._adopt(order))
            return
        try:
            fd = self._staging.create(order.slot, order.nbytes)
        except StagingError as error:
            log.error("no memory for staging", why=error)
            self._post(core.StagingFailed(order.slot, str(error)))
            return
        if child:
            child.slots.append(order.slot)
            child.tell(Prepare(order.nbytes, PREPARE_SECONDS), fd)

    async def _adopt(self, order: AllocateStaging) -> None:
        """Have memory of the engine's own."""
        assert self._engine is not None, "only an engine's agent receives"
        try:
            fd = await self._engine.arena(order.nbytes)
        except (ArenaError, EngineUnreachableError) as error:
            log.error("no memory of the engine for staging", why=error)
            self._post(core.StagingFailed(order.slot, str(error)))
            return
        child = self._living.get(order.child)
        if self._staging.adopt(order.slot, fd) and child:
            child.slots.append(order.slot)
            child.tell(Prepare(order.nbytes, PREPARE_SECONDS, device=True), fd)

    def send(self, order: SendVersion) -> None:
        """Broadcast a stored version."""
        child = self._living.get(order.child)
        if child:
            self._with_stored(child, order.wanted, lambda stored: self._send_version(child, stored, order))

    def receive(self, order: ReceiveVersion) -> None:
        """Receive into staged memory."""
        child, wanted, transport = self._living.get(order.child), order.wanted, order.transport
        if child is None:
            return
        listing = ""
        if transport.mode is Mode.PER_TENSOR:
            listing = self._manifests.get(wanted.layout).encode().decode()
        command = Receive(
            wanted.total_bytes,
            wanted.layout,
            transport.buffer_bytes,
            transport.num_buffers,
            order.seconds,
            transport.mode,
            listing,
            order.verify,
            str(wanted.version),
            transport.staging is Staging.DEVICE,
        )
        child.tell(command, self._staging.fd(order.slot))

    def seal(self, order: SealStaging) -> None:
        """Make it unchangeable. Refused, and said so, while anybody has it mapped for writing."""
        try:
            self._staging.seal(order.slot)
        except StagingError as error:
            log.error("staging not sealed", why=error)
            self._post(core.StagingFailed(order.slot, str(error)))
        else:
            self._post(core.StagingSealed(order.slot))

    def kill(self, order: KillChild) -> None:
        """Kill it now."""
        child = self._living.get(order.child)
        if child:
            child.kill()

    async def close(self) -> None:
        """Kill all, and wait until they are gone."""
        children = tuple(self._living.values())
        for child in children:
            child.kill()
        await asyncio.gather(*(child.task for child in children), *self._opening, return_exceptions=True)

    def _with_stored(self, child: "_Child", wanted: Wanted, use: Callable[[StoredVersion], None]) -> None:
        self._start(self._open(child, wanted, use))

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._opening.add(task)
        task.add_done_callback(self._opening.discard)

    async def _open(self, child: "_Child", wanted: Wanted, use: Callable[[StoredVersion], None]) -> None:
        """On a thread: a copy that an agent before this one wrote is read as a whole first."""
        assert self._store is not None, "only a trainer's agent sends"
        opened = self._store.open(wanted.version)
        try:
            stored = await asyncio.to_thread(opened.__enter__)
        except (VersionNotRetainedError, OSError) as error:
            self._failed(child.number, FailureCode.VERSION_NOT_RETAINED, str(error))
            return
        try:
            use(stored)
        finally:
            opened.__exit__(None, None, None)

    def _send_manifest(self, child: "_Child", stored: StoredVersion, order: ExchangeManifest) -> None:
        listing = stored.manifest.encode().decode()
        child.tell(SendManifest(stored.manifest.layout, listing, order.seconds))

    def _send_version(self, child: "_Child", stored: StoredVersion, order: SendVersion) -> None:
        wanted, transport = order.wanted, order.transport
        listing = stored.manifest.encode().decode() if transport.mode is Mode.PER_TENSOR else ""
        command = Send(
            wanted.total_bytes,
            wanted.layout,
            transport.buffer_bytes,
            transport.num_buffers,
            order.seconds,
            self._limit_rate,
            transport.mode,
            listing,
            str(wanted.version),
        )
        child.tell(command, stored.fd)

    def _gone(self, number: int, message: str) -> None:
        del self._living[number]
        self._post(core.ChildExited(number, message))

    def _failed(self, number: int, code: FailureCode, message: str) -> None:
        log.error("transfer failed", child=number, code=code, why=message)
        self._post(core.ChildFailed(number, code, message))

    def _hear(self, child: "_Child", event: Event) -> None:
        number = child.number
        match event:
            case Listening(endpoint):
                self._post(core.ChildListening(number, endpoint))
            case Ready():
                self._post(core.ChildReady(number))
            case ManifestSent() if child.wanted:
                self._post(core.ManifestExchanged(number, child.wanted.layout))
            case ManifestReceived():
                self._keep(child, event)
            case Prepared():
                self._post(core.StagingAllocated(child.slots.popleft()))
            case Progress(count):
                self._post(core.ChildProgress(number, count))
            case Sent():
                self._post(core.ChildSent(number))
            case Received(digest):
                self._post(core.ChildReceived(number, digest))
            case Unmapped():
                self._post(core.ChildUnmapped(number))
            case Failed(code, message):
                self._failed(number, code, message)

    def _keep(self, child: "_Child", event: ManifestReceived) -> None:
        """Only what was announced is kept: what is checked must be what is received and applied."""
        wanted = child.wanted
        try:
            manifest = Manifest.decode(event.data)
        except ManifestError as error:
            self._failed(child.number, FailureCode.MANIFEST_REFUSED, str(error))
            return
        found = (manifest.layout, manifest.nbytes)
        if wanted is None or found != (wanted.layout, wanted.total_bytes):
            message = f"the manifest is {found}, but {wanted} was announced"
            self._failed(child.number, FailureCode.MANIFEST_REFUSED, message)
            return
        self._manifests.keep(manifest)
        self._post(core.ManifestExchanged(child.number, manifest.layout))


class _Child:
    """One child, from the wish for it to its end."""

    def __init__(
        self,
        number: int,
        pool: ChildPool,
        hear: Callable[["_Child", Event], None],
        gone: Callable[[int, str], None],
    ) -> None:
        self.number = number
        self.wanted: Wanted | None = None
        self.slots: deque[int] = deque()
        """Those it has not answered about; a child does one thing after the other."""
        self._pool, self._hear, self._gone = pool, hear, gone
        self._process: ChildProcess | None = None
        self._commands: asyncio.Queue[tuple[Command, int | None]] = asyncio.Queue()
        self.task = asyncio.create_task(self._live())

    def tell(self, command: Command, fd: int | None = None) -> None:
        """Say it after everything said before. The descriptor is duplicated at once."""
        if not self.task.done():
            self._commands.put_nowait((command, None if fd is None else os.dup(fd)))

    def kill(self) -> None:
        """Kill the process, or give up starting it."""
        if self._process:
            self._process.kill()
        else:
            self.task.cancel()

    async def _live(self) -> None:
        message = ""
        try:
            self._process = await self._pool.take()
            speaking = asyncio.create_task(self._speak(self._process))
            try:
                async for event in self._process.events():
                    self._hear(self, event)
            finally:
                speaking.cancel()
                await asyncio.gather(speaking, return_exceptions=True)
            message = f"the transfer child ended with status {await _ended(self._process)}"
        except OSError as error:
            message = f"no transfer child: {error}"
        finally:
            while not self._commands.empty():
                _, fd = self._commands.get_nowait()
                _close(fd)
            self._gone(self.number, message)

    async def _speak(self, process: ChildProcess) -> None:
        while True:
            command, fd = await self._commands.get()
            try:
                # A child that is gone says so itself, by the end of its events.
                with contextlib.suppress(OSError):
                    await process.send(command, fd)
            finally:
                _close(fd)


async def _ended(process: ChildProcess) -> int:
    """Its status. One that said its last word ends by itself; one that does not is made to."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(END_SECONDS):
            return await process.wait()
    process.kill()
    return await process.wait()


def _close(fd: int | None) -> None:
    if fd is not None:
        os.close(fd)
