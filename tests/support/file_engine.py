"""A fake engine whose whole state is a file: it outlives the agent that drives it, as a real one would.

Run as a program it is an inference agent (the real one, with all its edges) that drives such an engine:
``python file_engine.py ENGINE_FILE AGENT_ARGUMENTS...``. A test holds it at a point by ``hold``.
"""

import asyncio
import fcntl
import json
import mmap
import os
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

from weightsync_contract.manifest import Manifest
from weightsync_contract.messages import Capability, InFlight
from weightsync_engine.adapter import (
    ApplyError,
    EngineInfo,
    EngineUnreachableError,
    ManifestRefusedError,
    Staged,
)


@dataclass
class EngineState:
    """What the file holds."""

    boot: int = 1
    alive: bool = True
    weights: str = "initial"
    """``run/version digest`` of the bytes that were applied last, or ``initial``, or ``mixed``."""
    paused: bool = False
    refuses: str = ""
    """Why the preflight says no."""
    hold: str = ""
    """The call that does not come back while this names it."""
    fails: str = ""
    """``clean`` or ``mixed``: how the next apply fails."""
    calls: list[str] = field(default_factory=list)


class FileEngine:
    """Implements the Engine protocol on a file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> EngineState:
        return EngineState(**json.loads(self._path.read_text()))

    def change(self, call: str = "", **changes: object) -> EngineState:
        """Write the file anew; the test and the agent take turns."""
        with self._path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            state = EngineState(**{**asdict(self.read()), **changes})  # type: ignore[arg-type]
            if call:
                state.calls.append(call)
            scratch = self._path.with_suffix(f".{os.getpid()}")
            scratch.write_text(json.dumps(asdict(state)))
            scratch.replace(self._path)
        return state

    def restart_now(self, call: str = "") -> None:
        """A new boot with the weights that it started with."""
        boot = self.read().boot + 1
        self.change(call, boot=boot, alive=True, weights="initial", paused=False)

    async def _call(self, name: str) -> EngineState:
        state = self.read()
        if not state.alive:
            raise EngineUnreachableError("the fake engine is down")
        state = self.change(name)
        while self.read().hold == name:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
        return state

    async def probe(self) -> EngineInfo:
        state = self.read()
        if not state.alive:
            raise EngineUnreachableError("the fake engine is down")
        return EngineInfo(f"boot-{state.boot}", 1, (Capability.STAGES, Capability.DIGESTS, Capability.GUARDS))

    async def preflight(self, manifest: Manifest) -> None:
        state = await self._call("preflight")
        if state.refuses:
            raise ManifestRefusedError(state.refuses)
        assert manifest.nbytes > 0

    async def apply(self, staged: Staged, in_flight: InFlight, seconds: float) -> None:
        boot = self.read().boot
        self.change(paused=True)
        state = await self._call("apply")
        if state.fails == "clean":
            self.change(fails="")
            raise ApplyError(True, "no rank has memory")
        self.change(weights="mixed")
        if self.read().fails == "mixed":
            self.change(fails="")
            raise ApplyError(False, "rank 1 died")
        with mmap.mmap(staged.fd, staged.nbytes, prot=mmap.PROT_READ) as image:
            from weightsync_engine.digest import digest_image

            digest = digest_image(staged.layout, image)
        if self.read().boot != boot:
            raise ApplyError(False, "the fake engine restarted")
        self.change(weights=f"{staged.version} {digest}")

    async def resume(self) -> None:
        await self._call("resume")
        self.change(paused=False)

    async def restart(self, reason: str) -> None:
        self.restart_now("restart")


def new_engine(path: Path) -> FileEngine:
    """A fake engine that has just started."""
    path.write_text(json.dumps(asdict(EngineState())))
    return FileEngine(path)


def main() -> None:
    import logging

    from weightsync_contract import logs
    from weightsync_engine.agent.__main__ import serve
    from weightsync_engine.agent.agent import Agent
    from weightsync_engine.agent.config import parse

    config = parse(sys.argv[2:])
    logs.configure("text", logging.DEBUG)
    asyncio.run(serve(Agent(config, FileEngine(Path(sys.argv[1])))))


if __name__ == "__main__":
    main()
