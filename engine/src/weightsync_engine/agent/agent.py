"""An agent, put together: the core in the middle, and an edge for each thing that it deals with."""

import asyncio
import contextlib
import os
import secrets
import uuid
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Final

from aiohttp import web

from weightsync_contract import logs
from weightsync_contract.messages import Hello, Observed, Transfer, VersionId
from weightsync_contract.names import PROTOCOL_MAX, PROTOCOL_MIN
from weightsync_contract.reasons import Role
from weightsync_engine.adapter import Engine
from weightsync_engine.agent.children import Children
from weightsync_engine.agent.config import Config
from weightsync_engine.agent.core import effects as do
from weightsync_engine.agent.core import start
from weightsync_engine.agent.core.events import SourceChanged
from weightsync_engine.agent.engines import Engines
from weightsync_engine.agent.health import application
from weightsync_engine.agent.journal import JournalFile
from weightsync_engine.agent.manifests import Manifests
from weightsync_engine.agent.runner import Runner
from weightsync_engine.agent.session import Operator, Session
from weightsync_engine.agent.staging import StagingArea
from weightsync_engine.permit import Permit, read_permit, write_permit
from weightsync_engine.publish.protocol import SOCKET_NAME
from weightsync_engine.publish.server import PublishServer
from weightsync_engine.publish.store import VersionStore
from weightsync_engine.transfer.process import ChildPool

log = logs.get(__name__)

COMMIT_GRACE_SECONDS: Final = 5.0
FIRST_LOOK_SECONDS: Final = 2.0
"""So long an agent that is to end waits for a commit under way: else the engine would be fenced."""


class Agent:
    """One agent process. ``engine`` is what an inference agent drives; a trainer's agent has none."""

    def __init__(self, config: Config, engine: Engine | None) -> None:
        self._config = config
        self._engine = engine
        self._permit = config.directory / "permit"
        self._incarnation = uuid.uuid4().hex
        self._stopping = asyncio.Event()
        self._pinned: tuple[VersionId, ...] = ()
        self._told: Observed | None = None

    def stop(self) -> None:
        """End soon: after the commit under way, if there is one."""
        self._stopping.set()

    async def run(self) -> None:
        """Go on until ``stop``. Raises OSError when a directory or a port can't be used."""
        config = self._config
        trainer = config.role is Role.TRAINER
        prepare(config.directory, config.state_directory)
        async with AsyncExitStack() as stack:
            self._journal = JournalFile(config.state_directory / "journal")
            stack.callback(self._journal.close)
            journal = self._journal.journal
            if journal.corrupt:
                log.error("journal corrupt: what the engine holds is unknown", path=config.state_directory)
            state = start(config.role, journal, None if trainer else read_permit(self._permit))
            self._runner = runner = Runner(state, self._perform)
            self._staging = StagingArea()
            stack.callback(self._staging.close)
            manifests = Manifests()
            self._store = VersionStore(config.state_directory / "versions") if trainer else None
            pool = ChildPool()
            stack.push_async_callback(pool.close)
            self._children = Children(
                config.role,
                config.pod_ip,
                pool,
                manifests,
                self._staging,
                self._store,
                self._engine,
                config.limit_rate,
                runner.post,
            )
            stack.push_async_callback(self._children.close)
            operator = Operator(config.operator, config.token_file, config.operator_ca)
            self._session = Session(operator, self._hello, runner.post)
            loops = [runner.run(), self._dial()]
            if self._store is not None:
                self._publish = PublishServer(config.directory / SOCKET_NAME, self._store)
                self._publish.on_change = lambda: runner.post(SourceChanged(self._publish.source()))
                await self._publish.start()
                stack.push_async_callback(self._publish.close)
                runner.post(SourceChanged(self._publish.source()))
            elif self._engine is not None:
                self._engines = Engines(self._engine, manifests, self._staging, runner.post)
                stack.push_async_callback(self._engines.close)
                loops.append(self._engines.watch())
            await self._health(stack)
            log.info("agent started", role=config.role, pod=config.pod.name, incarnation=self._incarnation)
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(loop) for loop in loops]
                await self._stopping.wait()
                log.info("agent ends")
                await runner.until(lambda state: state.serving.commit is None, COMMIT_GRACE_SECONDS)
                for task in tasks:
                    task.cancel()

    async def _dial(self) -> None:
        """Not before the engine was looked for: an agent that restarts would say that it does not answer."""
        if self._engine is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(FIRST_LOOK_SECONDS):
                    await self._engines.looked.wait()
        await self._session.run()

    async def _health(self, stack: AsyncExitStack) -> None:
        if self._config.health_port is None:
            return
        server = web.AppRunner(application(lambda: self._runner.state), access_log=None)
        await server.setup()
        stack.push_async_callback(server.cleanup)
        # A kubelet asks the pod's address, not loopback.
        await web.TCPSite(server, self._config.pod_ip, self._config.health_port).start()
        log.info("health served", addresses=server.addresses)

    def _hello(self) -> Hello:
        term = self._runner.state.journal.durable.highest_term
        return Hello(PROTOCOL_MIN, PROTOCOL_MAX, self._config.pod, self._config.role, self._incarnation, term)

    async def _perform(self, effect: do.Effect) -> None:  # noqa: PLR0912
        match effect:
            case do.WriteJournal():
                await asyncio.to_thread(self._journal.write, effect.entry)
            case do.WritePermit():
                write_permit(self._permit, effect.permit)
                _log_permit(effect.permit)
            case do.Report():
                self._session.report(effect.observed)
                self._log_change(effect.observed)
            case do.SendNack():
                log.warning("refused what the operator wants", why=effect.nack.message, code=effect.nack.code)
                self._session.nack(effect.nack)
            case do.Preflight():
                self._engines.preflight(effect)
            case do.Apply():
                self._engines.apply(effect)
            case do.Resume():
                self._engines.resume(effect)
            case do.RestartEngine():
                self._engines.restart(effect)
            case do.AllocateStaging():
                self._children.allocate(effect)
            case do.SealStaging():
                self._children.seal(effect)
            case do.DropStaging():
                self._staging.drop(effect.slot)
            case do.OpenChild():
                self._children.open(effect)
            case do.ExchangeManifest():
                self._children.exchange(effect)
            case do.SendVersion():
                self._children.send(effect)
            case do.ReceiveVersion():
                self._children.receive(effect)
            case do.KillChild():
                self._children.kill(effect)
            case do.Retain() if self._store:
                self._store.set_retained(effect.versions)
            case do.Pin() if self._store:
                self._pin(effect)
            case do.TellFleet():
                self._publish.tell(effect.fleet)

    def _log_change(self, observed: Observed) -> None:
        """A line whenever a side's state or its failure is another one."""
        before, self._told = self._told, observed
        transfer, serving = observed.transfer, observed.serving
        was = before.transfer if before else Transfer()
        if (transfer.state, transfer.failure) != (was.state, was.failure):
            given = _given(epoch=transfer.epoch, version=transfer.version, failure=transfer.failure)
            log.info("transfer", state=transfer.state, **given)
        old = before.serving if before else None
        if serving and (old is None or (serving.state, serving.failure) != (old.state, old.failure)):
            given = _given(boot=serving.boot, version=serving.version, failure=serving.failure)
            log.info("serving", state=serving.state, **given)

    def _pin(self, effect: do.Pin) -> None:
        assert self._store is not None
        # The new ones first: between the two, nothing that is needed is without a pin.
        for version in effect.versions:
            self._store.pin(version)
        for version in self._pinned:
            self._store.unpin(version)
        self._pinned = effect.versions


def _log_permit(permit: Permit | None) -> None:
    if permit is None:
        log.info("permit removed")
    else:
        log.info("permit", mode=permit.mode, boot=permit.boot, version=permit.version or "initial weights")


def _given(**fields: object) -> dict[str, object]:
    return {name: value for name, value in fields.items() if value}


def prepare(directory: Path, state_directory: Path) -> None:
    """Make the directories, and the token that opens the engine's control routes. Raises OSError."""
    (directory / "workers").mkdir(parents=True, exist_ok=True)
    state_directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    token = directory / "control-token"
    if token.exists():
        # The engine may have read it: it stays what it was.
        return
    scratch = directory / f".control-token-{os.getpid()}"
    scratch.touch(mode=0o600)
    scratch.write_text(secrets.token_urlsafe(32))
    scratch.replace(token)
