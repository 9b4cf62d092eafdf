"""What can happen to an agent. An event names what it is about, so that a late one is known for it."""

from dataclasses import dataclass

from weightsync_contract.messages import Capability, Desired, Released, Source
from weightsync_contract.reasons import FailureCode
from weightsync_engine.agent.core.journal import Entry
from weightsync_engine.permit import Permit

# ------------------------------------------------------------------------------------- the session


@dataclass(frozen=True, slots=True)
class SessionOpened:
    """The operator welcomed us."""


@dataclass(frozen=True, slots=True)
class SessionClosed:
    """The session is gone; nothing that was told before is taken back by that."""


@dataclass(frozen=True, slots=True)
class DesiredReceived:
    """The operator said everything that it wants."""

    desired: Desired


@dataclass(frozen=True, slots=True)
class ReleasedReceived:
    """The operator said that no WeightSync wants this pod."""

    released: Released


# -------------------------------------------------------------------------------------- the engine


@dataclass(frozen=True, slots=True)
class EngineSeen:
    """The engine answered a probe."""

    boot: str
    world_size: int
    capabilities: tuple[Capability, ...] = ()


@dataclass(frozen=True, slots=True)
class EngineGone:
    """The engine did not answer a probe. It may come back with the same boot or with another."""


@dataclass(frozen=True, slots=True)
class PreflightEnded:
    """The engine's answer to a manifest: ``code`` None when it can take it."""

    boot: str
    layout: str
    code: FailureCode | None = None
    message: str = ""


@dataclass(frozen=True, slots=True)
class ApplyDone:
    """All ranks confirmed that they hold the version; the engine is still paused."""

    boot: str
    slot: int


@dataclass(frozen=True, slots=True)
class ApplyFailed:
    """An apply failed. ``clean``: no rank applied anything, and the weights from before are whole."""

    boot: str
    slot: int
    clean: bool
    message: str


@dataclass(frozen=True, slots=True)
class ResumeEnded:
    """The engine goes on answering, or (``message`` not empty) could not be asked to."""

    boot: str
    message: str = ""


# ------------------------------------------------------------------------------- the staged memory


@dataclass(frozen=True, slots=True)
class StagingAllocated:
    """Memory is there to be written."""

    slot: int


@dataclass(frozen=True, slots=True)
class StagingSealed:
    """What was verified can't be changed any more, by anybody."""

    slot: int


@dataclass(frozen=True, slots=True)
class StagingFailed:
    """Memory could not be had or could not be sealed."""

    slot: int
    message: str


# --------------------------------------------------------------------------------------- the child


@dataclass(frozen=True, slots=True)
class ChildListening:
    """Rank 0 bound its store at ``endpoint`` (host:port) and waits for the others."""

    child: int
    endpoint: str


@dataclass(frozen=True, slots=True)
class ChildReady:
    """The child is a rank of the group."""

    child: int


@dataclass(frozen=True, slots=True)
class ManifestExchanged:
    """The manifest was sent (rank 0), or received and kept (the others)."""

    child: int
    layout: str


@dataclass(frozen=True, slots=True)
class ChildProgress:
    """So many bytes of the present version have gone through."""

    child: int
    bytes: int


@dataclass(frozen=True, slots=True)
class ChildReceived:
    """All bytes are in the staged memory, and this is their digest."""

    child: int
    digest: str


@dataclass(frozen=True, slots=True)
class ChildUnmapped:
    """The child can't write any more to the memory that it received into."""

    child: int


@dataclass(frozen=True, slots=True)
class ChildSent:
    """All bytes have left rank 0. This proves nothing about who has them."""

    child: int


@dataclass(frozen=True, slots=True)
class ChildFailed:
    """The child could not do what it was told; it ends."""

    child: int
    code: FailureCode
    message: str


@dataclass(frozen=True, slots=True)
class ChildExited:
    """The child's process is gone."""

    child: int
    message: str = ""


# ------------------------------------------------------------------------------------- the trainer


@dataclass(frozen=True, slots=True)
class SourceChanged:
    """The trainer published, came or went."""

    source: Source


# --------------------------------------------------------------------------------------- ourselves


@dataclass(frozen=True, slots=True)
class JournalWritten:
    """The entry is durable."""

    entry: Entry


@dataclass(frozen=True, slots=True)
class JournalFailed:
    """The entry may or may not be durable."""

    entry: Entry
    message: str


@dataclass(frozen=True, slots=True)
class PermitFailed:
    """The permit could not be written; what rested on it was not done."""

    permit: Permit | None
    message: str


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed; send one at ``wake_at`` at the latest."""


Event = (
    SessionOpened
    | SessionClosed
    | DesiredReceived
    | ReleasedReceived
    | EngineSeen
    | EngineGone
    | PreflightEnded
    | ApplyDone
    | ApplyFailed
    | ResumeEnded
    | StagingAllocated
    | StagingSealed
    | StagingFailed
    | ChildListening
    | ChildReady
    | ManifestExchanged
    | ChildProgress
    | ChildReceived
    | ChildUnmapped
    | ChildSent
    | ChildFailed
    | ChildExited
    | SourceChanged
    | JournalWritten
    | JournalFailed
    | PermitFailed
    | Tick
)
