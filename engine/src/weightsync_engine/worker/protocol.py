"""Questions and answers: one JSON object a line each way over a Unix stream socket, one question at a time.

A question is ``{"op": ..., ...}``; the answer ``{"ok": true, ...}`` or ``{"ok": false, "error": ...}``.
``attach`` carries the file descriptor of the staged memory (SCM_RIGHTS) with its first byte, and the answer to
``arena`` one that tells where the engine's own is.

| op       | with                       | answer                                                      |
|----------|----------------------------|-------------------------------------------------------------|
| hello    |                            | Hello                                                       |
| manifest | layout, data (JSON text)   | kept until another one comes; what preflight and apply use  |
| arena    | nbytes                     | a descriptor of this rank's arena, which nothing lies in    |
| attach   | Image, nbytes, descriptor  | mapped; refused unless sealed and of the manifest's size    |
| status   |                            | WorkerStatus                                                |
| drop     |                            | what is attached is let go, unless it is being applied      |
| exit     |                            | every process of the engine ends                            |
"""

import fcntl
from dataclasses import dataclass
from typing import Final

from weightsync_contract.messages import VersionId

MAX_LINE: Final = 64 << 20
"""Bytes of one question or answer; a manifest of half a million tensors fits."""

SOCKETS: Final = "workers"
"""The directory of the sockets, in the one that agent and engine share."""

SEALS: Final = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
"""What staged memory must be sealed against: whoever still holds it can't change the verified bytes."""


@dataclass(frozen=True, slots=True)
class Hello:
    """Who answers here. ``rank`` is -1 for a process that serves the API and holds no weights."""

    boot: str
    rank: int
    world_size: int
    engine: str
    """The engine's name and version, for people."""
    pid: int


@dataclass(frozen=True, slots=True)
class Image:
    """Verified bytes of a version, laid out as its manifest says."""

    version: VersionId
    layout: str
    digest: str

    def __str__(self) -> str:
        return f"{self.version} ({self.digest})"


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a manifest can't be taken: which tensor, what is wrong with it, and what to do."""

    tensor: str
    what: str
    todo: str

    def __str__(self) -> str:
        return f"{self.tensor}: {self.what}; {self.todo}"


@dataclass(frozen=True, slots=True)
class Preflight:
    """What checking a manifest against the model found; no problems: it can be applied."""

    layout: str
    problems: tuple[Problem, ...] = ()


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """Where a rank is."""

    hello: Hello
    manifest: str = ""
    """Layout id of the manifest that is kept."""
    preflight: Preflight | None = None
    attached: Image | None = None
    applied: Image | None = None
    """What the weights are: None for those that the engine was started with, and once they may be mixed."""
    error: str = ""
    """Why the last update was refused or failed."""
    clean: bool = True
    """False from the first parameter touched until all are those of one version again."""
