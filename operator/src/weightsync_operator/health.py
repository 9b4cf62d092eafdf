"""``/healthz`` and ``/readyz``: not whether a port is open but whether work is done.

Liveness is the queue's last tick, and the last thing heard from the API server by a LIST or a watch. The
server runs on the loop that does the work: if that stands still, nobody answers. Followers are Ready too,
else an upgrade that waits for all replicas would wait for ever.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from aiohttp import web

MAX_TICK_SECONDS: Final = 60.0
"""A pass ends within 30 s and an idle queue ticks each second."""
MAX_SILENCE_SECONDS: Final = 300.0
"""The API server is listed each minute; a shorter outage is no reason to restart."""


@dataclass(slots=True)
class Health:
    """What the parts of the operator tell of themselves; monotonic seconds."""

    ticked_at: Callable[[], float]
    leads: Callable[[], bool]
    """A follower's queue stands still, as it should."""
    clock: Callable[[], float] = time.monotonic
    heard_at: float = 0.0
    listed: bool = False
    certificate: Callable[[], str] = lambda: ""
    """Why no agent could check who answers it; empty if all can."""

    def heard(self) -> None:
        """The API server has just told something."""
        self.heard_at = self.clock()

    def problems(self) -> list[str]:
        """Why this process should be restarted; empty if it should not."""
        now, found = self.clock(), []
        if self.leads() and now - self.ticked_at() > MAX_TICK_SECONDS:
            found.append(f"the queue stands still for {now - self.ticked_at():.0f} s")
        if now - self.heard_at > MAX_SILENCE_SECONDS:
            found.append(f"nothing heard from the API server for {now - self.heard_at:.0f} s")
        return found

    def add_routes(self, app: web.Application) -> None:
        app.router.add_get("/healthz", self._healthz)
        app.router.add_get("/readyz", self._readyz)

    async def _healthz(self, _: web.Request) -> web.Response:
        problems = self.problems()
        return web.Response(status=503 if problems else 200, text="\n".join(problems or ["ok"]) + "\n")

    async def _readyz(self, _: web.Request) -> web.Response:
        if not self.listed:
            return web.Response(status=503, text="WeightSyncs and pods were not listed yet\n")
        if trouble := self.certificate():
            return web.Response(status=503, text=f"{trouble}\n")
        return web.Response(text="ok\n")
