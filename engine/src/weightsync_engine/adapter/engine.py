"""What an agent needs of an engine."""

from dataclasses import dataclass
from typing import Protocol

from weightsync_contract.manifest import Manifest
from weightsync_contract.messages import Capability, InFlight, VersionId


class EngineUnreachableError(Exception):
    """The engine does not answer, or not as one engine: it starts, ends, hangs or is set up wrongly."""


class ManifestRefusedError(Exception):
    """The engine's model can't take the manifest; the message names tensors and what to do."""


class ArenaError(Exception):
    """The engine has no memory of its own for a version; the message says why and what to do."""


class ApplyError(Exception):
    """A version was not applied. ``clean``: no rank applied anything, and the old weights are whole."""

    def __init__(self, clean: bool, message: str) -> None:
        super().__init__(message)
        self.clean = clean


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What an engine is. ``boot`` is another one after each restart; ``world_size`` counts its workers."""

    boot: str
    world_size: int
    capabilities: tuple[Capability, ...]


@dataclass(frozen=True, slots=True)
class Staged:
    """A version in sealed memory or the engine's arena, verified: ``nbytes`` bytes in ``fd``, its owner's."""

    version: VersionId
    layout: str
    digest: str
    nbytes: int
    fd: int
    manifest: Manifest


class Engine(Protocol):
    """One inference engine: all the workers that serve as one."""

    async def probe(self) -> EngineInfo:
        """Who answers now. Raises EngineUnreachableError."""
        ...

    async def preflight(self, manifest: Manifest) -> None:
        """Check that the model can take the manifest; nothing that serves is touched.

        Raises ManifestRefusedError, EngineUnreachableError.
        """
        ...

    async def arena(self, nbytes: int) -> int:
        """A descriptor, the caller's, of where a version of ``nbytes`` can be received into the engine's memory.

        It is good for ``apply`` of this boot. Raises ArenaError, EngineUnreachableError.
        """
        ...

    async def apply(self, staged: Staged, in_flight: InFlight, seconds: float) -> None:
        """Pause and make all ranks serve the staged version; not resumed, in success or failure.

        Raises ApplyError within ``seconds`` and a few more for finding out how clean it is.
        """
        ...

    async def resume(self) -> None:
        """Go on with requests. Raises EngineUnreachableError."""
        ...

    async def restart(self, reason: str) -> None:
        """End every process of the engine, for whoever supervises it to start it again.

        Raises EngineUnreachableError when something of it may still run.
        """
        ...
