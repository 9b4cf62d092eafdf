"""The engine beside the agent: watched all the time, told one thing after the other, each with its answer."""

import asyncio
import contextlib
import os
from collections.abc import Callable, Coroutine
from typing import Any, Final

from weightsync_contract import logs
from weightsync_contract.reasons import FailureCode
from weightsync_engine.adapter import (
    ApplyError,
    Engine,
    EngineInfo,
    EngineUnreachableError,
    ManifestRefusedError,
    Staged,
)
from weightsync_engine.agent.core.effects import Apply, Preflight, RestartEngine, Resume
from weightsync_engine.agent.core.events import (
    ApplyDone,
    ApplyFailed,
    EngineGone,
    EngineSeen,
    Event,
    PreflightEnded,
    ResumeEnded,
)
from weightsync_engine.agent.manifests import Manifests
from weightsync_engine.agent.staging import StagingArea

log = logs.get(__name__)

PROBE_SECONDS: Final = 1.0
PROBE_SOON_SECONDS: Final = 0.2
"""Between two probes while the engine is away or has just changed."""
PATIENCE_PROBES: Final = 2
"""An engine that missed so many probes is gone: one alone may be a busy moment."""
PREFLIGHT_SECONDS: Final = 130.0
RESUME_SECONDS: Final = 10.0
RESTART_SECONDS: Final = 15.0


class Engines:
    """Drives one engine. Each order is answered by one event, except a restart and what it cuts off."""

    def __init__(
        self, engine: Engine, manifests: Manifests, staging: StagingArea, post: Callable[[Event], None]
    ) -> None:
        self._engine = engine
        self._manifests = manifests
        self._staging = staging
        self._post = post
        self._tasks: set[asyncio.Task[None]] = set()
        self._driving: asyncio.Task[None] | None = None
        self._look = asyncio.Event()
        self.looked = asyncio.Event()
        """It was looked for once: seen, or not."""

    async def watch(self) -> None:
        """Probe until cancelled."""
        last: EngineInfo | None = None
        missed = 0
        while True:
            self._look.clear()
            try:
                info = await self._engine.probe()
            except EngineUnreachableError as error:
                missed += 1
                if missed == PATIENCE_PROBES:
                    log.warning("engine gone", why=error)
                    last = None
                    self._post(EngineGone())
                pause = PROBE_SOON_SECONDS
            else:
                pause = PROBE_SECONDS if info == last and not missed else PROBE_SOON_SECONDS
                if info != last:
                    log.info("engine seen", boot=info.boot, world_size=info.world_size)
                    self._post(EngineSeen(info.boot, info.world_size, tuple(info.capabilities)))
                last, missed = info, 0
            self.looked.set()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._look.wait()

    def preflight(self, order: Preflight) -> None:
        """Ask; goes on beside everything else."""
        self._start(self._preflight(order))

    def apply(self, order: Apply) -> None:
        """Pause and apply."""
        self._driving = self._start(self._apply(order))

    def resume(self, order: Resume) -> None:
        """Go on."""
        self._driving = self._start(self._resume(order))

    def restart(self, order: RestartEngine) -> None:
        """End it, in the middle of whatever it was told."""
        if self._driving:
            self._driving.cancel()
        self._driving = self._start(self._restart(order))

    async def close(self) -> None:
        """Give up everything under way."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _preflight(self, order: Preflight) -> None:
        code: FailureCode | None = None
        message = ""
        try:
            async with asyncio.timeout(PREFLIGHT_SECONDS):
                await self._engine.preflight(self._manifests.get(order.layout))
        except ManifestRefusedError as error:
            code, message = FailureCode.MANIFEST_REFUSED, str(error)
        except EngineUnreachableError as error:
            code, message = FailureCode.ENGINE_UNREACHABLE, str(error)
        except TimeoutError:
            code = FailureCode.ENGINE_UNREACHABLE
            message = f"the engine did not check the manifest within {PREFLIGHT_SECONDS:.0f} s"
        except Exception as error:
            # A defect in the adapter is an answer as well: nothing has been touched yet.
            log.exception("preflight failed", layout=order.layout)
            code, message = FailureCode.ENGINE_UNREACHABLE, f"the preflight failed: {error!r}"
        self._post(PreflightEnded(order.boot, order.layout, code, message))

    async def _apply(self, order: Apply) -> None:
        # A descriptor of its own: the slot may be given back while a fenced engine still reads it.
        fd = os.dup(self._staging.fd(order.slot))
        try:
            manifest = self._manifests.get(order.layout)
            staged = Staged(order.version, order.layout, order.digest, order.nbytes, fd, manifest)
            await self._still(order.boot, order.seconds / 4)
            await self._engine.apply(staged, order.in_flight, order.seconds)
        except EngineUnreachableError as error:
            self._post(ApplyFailed(order.boot, order.slot, True, f"nothing was applied: {error}"))
        except ApplyError as error:
            log.error("apply failed", version=order.version, clean=error.clean, why=error)
            self._post(ApplyFailed(order.boot, order.slot, error.clean, str(error)))
        except Exception as error:
            # Nobody knows how far it came.
            log.exception("apply failed", version=order.version)
            self._post(ApplyFailed(order.boot, order.slot, False, f"{error!r}"))
        else:
            self._post(ApplyDone(order.boot, order.slot))
        finally:
            os.close(fd)

    async def _still(self, boot: str, seconds: float) -> None:
        """The last probe may be a second old, and another boot was not asked for this."""
        until = asyncio.get_running_loop().time() + seconds
        while True:
            try:
                info = await self._engine.probe()
            except EngineUnreachableError:
                # One that is busy is not gone.
                if asyncio.get_running_loop().time() >= until:
                    raise
                await asyncio.sleep(PROBE_SOON_SECONDS)
                continue
            if info.boot != boot:
                raise ApplyError(True, f"nothing was applied: the engine is boot {info.boot} now, not {boot}")
            return

    async def _resume(self, order: Resume) -> None:
        message = ""
        try:
            async with asyncio.timeout(RESUME_SECONDS):
                await self._engine.resume()
        except TimeoutError:
            message = f"the engine did not resume within {RESUME_SECONDS:.0f} s"
        except Exception as error:
            log.warning("resume failed", why=error)
            message = str(error) or repr(error)
        self._post(ResumeEnded(order.boot, message))

    async def _restart(self, order: RestartEngine) -> None:
        log.error("engine fenced", boot=order.boot, why=order.reason)
        try:
            async with asyncio.timeout(RESTART_SECONDS):
                await self._engine.restart(order.reason)
        except Exception as error:
            log.error("engine not restarted, will be told again", boot=order.boot, why=repr(error))
        self._look.set()
