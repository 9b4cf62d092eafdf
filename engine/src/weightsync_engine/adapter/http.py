"""Drives vLLM, and whatever speaks its routes: HTTP to start things, sockets to know how they went."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from weightsync_contract import logs
from weightsync_contract.manifest import Manifest
from weightsync_contract.messages import Capability, InFlight
from weightsync_engine.adapter.engine import (
    ApplyError,
    ArenaError,
    EngineInfo,
    EngineUnreachableError,
    ManifestRefusedError,
    Staged,
)
from weightsync_engine.adapter.routes import RouteError, Routes, SilentError
from weightsync_engine.adapter.workers import RankRefusedError, Workers
from weightsync_engine.worker.protocol import Image, Problem, WorkerStatus

log = logs.get(__name__)

PROBE_SECONDS: Final = 3.0
PREFLIGHT_SECONDS: Final = 60.0
RESTART_SECONDS: Final = 10.0
_SHOWN: Final = 8
"""Problems of a manifest that are spelled out."""

_GUARD_STATUS: Final = "/weightsync/v1/status"
_GUARD_RESTART: Final = "/weightsync/v1/restart"
_MODES: Final = {InFlight.KEEP: "keep", InFlight.WAIT: "wait", InFlight.ABORT: "abort"}


class HttpEngine:
    """An engine at ``url`` that shares ``directory`` with the agent. Implements Engine; used as a context."""

    def __init__(self, url: str, directory: Path) -> None:
        self._routes = Routes(url, directory)
        self._workers = Workers(directory)
        self._stack = AsyncExitStack()
        self._boot_with_workers = ""
        """The boot whose workers have answered once: one that then does not is no engine without workers."""

    async def __aenter__(self) -> Self:
        await self._stack.enter_async_context(self._routes)
        self._stack.callback(self._workers.close)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    # --------------------------------------------------------------------------------- who is there

    async def probe(self) -> EngineInfo:
        """See Engine. Without our guard or our backend in it, the capabilities say so."""
        async with _deadline(PROBE_SECONDS):
            guarded = await self._guarded_boot()
            world_size = await self._world_size()
            await self._routes.get("/health", PROBE_SECONDS)
            boots = await self._worker_boots(world_size, guarded)
        if len(boots | ({guarded} if guarded else set())) > 1:
            raise EngineUnreachableError(
                f"processes of several boots answer ({', '.join(sorted(boots))}): it restarts"
            )
        boot = guarded or next(iter(boots), "")
        if not boot:
            raise EngineUnreachableError(
                "this engine has neither weightsync's middleware nor its backend: start it with --middleware"
                ' weightsync_engine.guard.Guard --weight-transfer-config \'{"backend":"weightsync"}\''
            )
        can: list[Capability] = []
        if boots:
            can += [Capability.STAGES, Capability.ABORTS, Capability.DIGESTS]
            self._boot_with_workers = boot
        if guarded:
            can.append(Capability.GUARDS)
        return EngineInfo(boot, world_size, tuple(can))

    async def _guarded_boot(self) -> str:
        try:
            status = await self._routes.get(_GUARD_STATUS, PROBE_SECONDS)
        except RouteError as error:
            if error.status == 404:
                return ""
            raise
        if status.get("trouble"):
            raise EngineUnreachableError(str(status["trouble"]))
        return str(status.get("boot", ""))

    async def _world_size(self) -> int:
        try:
            size = (await self._routes.get("/get_world_size", PROBE_SECONDS)).get("world_size")
        except RouteError as error:
            if error.status == 404:
                hint = "the engine has no control routes: start vLLM with VLLM_SERVER_DEV_MODE=1"
                raise EngineUnreachableError(hint) from error
            raise
        if type(size) is not int or size < 1:
            raise EngineUnreachableError(f"/get_world_size answered {size!r}")
        return size

    async def _worker_boots(self, world_size: int, guarded: str) -> set[str]:
        try:
            hellos = await self._workers.ranks(lambda worker: worker.hello(), world_size, PROBE_SECONDS)
        except EngineUnreachableError:
            if guarded and guarded == self._boot_with_workers:
                raise
            return set()
        for rank, hello in enumerate(hellos):
            if (hello.rank, hello.world_size) != (rank, world_size):
                raise EngineUnreachableError(
                    f"the socket of rank {rank} of {world_size} is that of {hello.rank} of {hello.world_size}"
                )
        return {hello.boot for hello in hellos}

    # ------------------------------------------------------------------------------------ preflight

    async def preflight(self, manifest: Manifest) -> None:
        """See Engine. The model's own loaders are asked, on memory that is none."""
        world_size = await self._world_size()
        try:
            await self._workers.ranks(lambda worker: worker.manifest(manifest), world_size, PREFLIGHT_SECONDS)
        except RankRefusedError as error:
            raise ManifestRefusedError(str(error)) from error
        body = {"init_info": {"layout": manifest.layout}}
        await self._routes.post("/init_weight_transfer_engine", PREFLIGHT_SECONDS, body)
        found: dict[Problem, list[int]] = {}
        for status in await self._workers.ranks(lambda worker: worker.status(), world_size):
            if status.preflight is None or status.preflight.layout != manifest.layout:
                raise EngineUnreachableError(f"rank {status.hello.rank} has not checked {manifest.layout}")
            for problem in status.preflight.problems:
                found.setdefault(problem, []).append(status.hello.rank)
        if found:
            raise ManifestRefusedError(_refusal(found))

    async def arena(self, nbytes: int) -> int:
        """See Engine. Of one rank only: a rank's memory holds the whole image."""
        world_size = await self._world_size()
        if world_size != 1:
            raise ArenaError(
                f"the engine has {world_size} ranks, and dataPlane.staging Device takes one: set staging to Host"
            )
        try:
            return (await self._workers.ranks(lambda worker: worker.arena(nbytes), world_size))[0]
        except RankRefusedError as error:
            raise ArenaError(str(error)) from error

    # ---------------------------------------------------------------------------------------- apply

    async def apply(self, staged: Staged, in_flight: InFlight, seconds: float) -> None:
        """See Engine. What counts at the end is what every rank says of itself, not what HTTP answered."""
        until = time.monotonic() + seconds
        image = Image(staged.version, staged.layout, staged.digest)
        try:
            world_size = await self._world_size()
            await self._attach(staged, image, world_size, until)
        except EngineUnreachableError as error:
            # What some ranks hold by now is memory and no more: nobody tells them to apply it.
            raise ApplyError(True, f"nothing was applied: {error}") from error
        trouble = await self._update(image, in_flight, until)
        statuses = await self._statuses(world_size, trouble)
        if all(status.applied == image for status in statuses):
            await self._label(image)
            return
        await self._undo(statuses, world_size, trouble)

    async def _attach(self, staged: Staged, image: Image, world_size: int, until: float) -> None:
        try:
            await self._workers.ranks(
                lambda worker: worker.attach(image, staged.nbytes, staged.fd),
                world_size,
                until - time.monotonic(),
            )
        except RankRefusedError as error:
            await self._drop(world_size)
            raise ApplyError(True, f"the staged memory was refused: {error}") from error

    async def _update(self, image: Image, in_flight: InFlight, until: float) -> str:
        """Pause, start, update, finish; says what went wrong. Whether that did harm is another question."""
        info: dict[str, Any] = {
            "run": image.version.run,
            "version": image.version.version,
            "layout": image.layout,
            "digest": image.digest,
        }
        try:
            await self._pause(in_flight, until)
            await self._start(until)
            await self._routes.post("/update_weights", until - time.monotonic(), {"update_info": info})
            await self._routes.post("/finish_weight_update", until - time.monotonic())
        except EngineUnreachableError as error:
            return str(error)
        return ""

    async def _pause(self, in_flight: InFlight, until: float) -> None:
        try:
            route = f"/pause?mode={_MODES[in_flight]}&clear_cache=true"
            await self._routes.post(route, until - time.monotonic())
        except RouteError as error:
            # It may be paused all the same, and an update of an engine that is not kills it.
            paused = await self._routes.get("/is_paused", until - time.monotonic())
            if paused.get("is_paused") is not True:
                raise
            log.warning("paused in spite of an error", why=error)

    async def _start(self, until: float) -> None:
        try:
            await self._routes.post("/start_weight_update", until - time.monotonic())
        except RouteError as error:
            # A session that somebody left open. Ended with nothing attached to it, it changes nothing.
            log.warning("an update was under way already", why=error)
            await self._routes.post("/finish_weight_update", until - time.monotonic())
            await self._routes.post("/start_weight_update", until - time.monotonic())

    async def _statuses(self, world_size: int, trouble: str) -> list[WorkerStatus]:
        try:
            return await self._workers.ranks(lambda worker: worker.status(), world_size)
        except EngineUnreachableError as error:
            raise ApplyError(False, f"{trouble or 'the update was sent'}, then: {error}") from error

    async def _undo(self, statuses: list[WorkerStatus], world_size: int, trouble: str) -> None:
        """Make sure that what has not happened will not happen later. Always raises ApplyError."""
        words = [trouble, *(f"rank {s.hello.rank}: {s.error}" for s in statuses if s.error)]
        message = "; ".join(filter(None, words)) or "no rank applied the version, and none says why"
        # A call that got no answer may still be waiting in the engine: without an image it comes to nothing.
        dropped = await self._drop(world_size)
        if not dropped:
            raise ApplyError(False, message)
        before = {s.hello.rank: s.applied for s in statuses}
        after = await self._statuses(world_size, message)
        if any(s.applied != before[s.hello.rank] or not s.clean for s in after):
            raise ApplyError(False, f"{message}; some ranks have changed")
        if len({s.applied for s in after}) > 1:
            raise ApplyError(False, f"{message}; the ranks do not agree on what they serve")
        if trouble:
            try:
                await self._routes.post("/finish_weight_update", PROBE_SECONDS)
            except EngineUnreachableError as error:
                log.info("no update session was left open", why=error)
        raise ApplyError(True, message)

    async def _drop(self, world_size: int) -> bool:
        try:
            await self._workers.ranks(lambda worker: worker.drop(), world_size)
        except (EngineUnreachableError, RankRefusedError) as error:
            log.warning("staged memory not dropped", why=error)
            return False
        return True

    async def _label(self, image: Image) -> None:
        """Tell vLLM what to answer at /weight_info; versions before 0.27.1 have no such label."""
        try:
            body = {"new_version": str(image.version)}
            await self._routes.post("/update_weight_version", PROBE_SECONDS, body)
        except EngineUnreachableError as error:
            log.debug("no label", why=error)

    # ------------------------------------------------------------------------------- resume, restart

    async def resume(self) -> None:
        """See Engine."""
        try:
            await self._routes.post("/resume", PROBE_SECONDS)
        except RouteError:
            paused = await self._routes.get("/is_paused", PROBE_SECONDS)
            if paused.get("is_paused") is not False:
                raise

    async def restart(self, reason: str) -> None:
        """See Engine. Over HTTP, then over every socket, until nobody of that boot answers anywhere."""
        until = time.monotonic() + RESTART_SECONDS
        ending = await self._answering()
        log.warning("ending the engine", why=reason, boots=sorted(ending))
        try:
            await self._routes.post(_GUARD_RESTART, 1.0)
        except EngineUnreachableError as error:
            log.info("not ended over HTTP", why=error)
        while (left := ending & await self._answering()) or await self._silent():
            if time.monotonic() > until:
                said = f"boot {', '.join(left)} still answers" if left else "it listens and does not answer"
                raise EngineUnreachableError(
                    f"the engine can't be ended from here, {said}: restart the container"
                )
            await self._workers.everybody(lambda worker: worker.exit(reason), 1.0)
            await asyncio.sleep(0.05)

    async def _silent(self) -> bool:
        """Does anybody hold the port who does not answer? A process that was stopped looks like that."""
        try:
            await self._routes.get(_GUARD_STATUS, 1.0)
        except SilentError:
            return True
        except EngineUnreachableError:
            return False
        return False

    async def _answering(self) -> set[str]:
        """Boots of which any process answers."""
        found = {hello.boot for hello in await self._workers.everybody(lambda worker: worker.hello(), 1.0)}
        with suppress(EngineUnreachableError):
            found.add(str((await self._routes.get(_GUARD_STATUS, 1.0)).get("boot", "")))
        return found - {""}


@asynccontextmanager
async def _deadline(seconds: float) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError as error:
        raise EngineUnreachableError(f"the engine did not answer within {seconds:.0f} s") from error


def _refusal(found: dict[Problem, list[int]]) -> str:
    shown = [
        f"{problem} (rank {min(ranks)})" if len(ranks) == 1 and ranks != [0] else str(problem)
        for problem, ranks in found.items()
    ]
    more = f"; and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else ""
    count = "1 tensor" if len(shown) == 1 else f"{len(shown)} tensors"
    return f"the engine's model can't take {count}: {'; '.join(shown[:_SHOWN])}{more}"
