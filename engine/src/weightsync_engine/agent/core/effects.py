"""What an agent does. Effects of one step are run in order.

``WriteJournal`` is answered by JournalWritten or JournalFailed; what rests on an entry is only asked for once
it is durable. A failed ``WritePermit`` is answered by PermitFailed, and what follows it in its step and is in
``REST_ON_PERMIT`` is left out. All that takes time is answered by its own event, named beside it.
"""

from dataclasses import dataclass
from typing import Final

from weightsync_contract.messages import Fleet, Group, InFlight, Nack, Observed, Transport, VersionId, Wanted
from weightsync_engine.agent.core.journal import Entry
from weightsync_engine.permit import Permit


@dataclass(frozen=True, slots=True)
class WriteJournal:
    """Make an entry durable. Answer: JournalWritten, JournalFailed."""

    entry: Entry


@dataclass(frozen=True, slots=True)
class WritePermit:
    """Replace the permit; None removes it. Answer: PermitFailed, or nothing."""

    permit: Permit | None


@dataclass(frozen=True, slots=True)
class Report:
    """Tell the operator; only the newest counts."""

    observed: Observed


@dataclass(frozen=True, slots=True)
class SendNack:
    """Tell the operator that a Desired was not taken."""

    nack: Nack


# -------------------------------------------------------------------------------------- the engine


@dataclass(frozen=True, slots=True)
class Preflight:
    """Ask the engine whether it can take the kept manifest of this layout. Answer: PreflightEnded."""

    boot: str
    layout: str


@dataclass(frozen=True, slots=True)
class Apply:
    """Pause the engine and put what is staged into it, on all ranks. Answer: ApplyDone, ApplyFailed."""

    boot: str
    slot: int
    version: VersionId
    layout: str
    digest: str
    nbytes: int
    in_flight: InFlight
    seconds: float


@dataclass(frozen=True, slots=True)
class Resume:
    """Let the engine go on. Answer: ResumeEnded."""

    boot: str


@dataclass(frozen=True, slots=True)
class RestartEngine:
    """End the engine's processes for certain. Answer: EngineSeen with another boot, some time.

    Asked again till then. An Apply or Resume under way is given up.
    """

    boot: str
    reason: str


# ------------------------------------------------------------------------------- the staged memory


@dataclass(frozen=True, slots=True)
class AllocateStaging:
    """Have ``nbytes`` bytes of memory, mapped by the child already; ``device``: in the engine's arena.

    Answer: StagingAllocated, StagingFailed, ChildFailed.
    """

    slot: int
    child: int
    nbytes: int
    device: bool = False


@dataclass(frozen=True, slots=True)
class SealStaging:
    """Make it unchangeable, now that nobody has it mapped. Answer, at once: StagingSealed, StagingFailed."""

    slot: int


@dataclass(frozen=True, slots=True)
class DropStaging:
    """Give the memory back. An allocation under way ends without an answer."""

    slot: int


# --------------------------------------------------------------------------------------- the child


@dataclass(frozen=True, slots=True)
class OpenChild:
    """Start a child that joins the group; rank 0 listens.

    Answer: ChildListening (rank 0 only), then ChildReady or ChildFailed.
    """

    child: int
    group: Group
    transport: Transport
    seconds: float


@dataclass(frozen=True, slots=True)
class ExchangeManifest:
    """Broadcast the manifest of the version (rank 0), or receive and keep it.

    Answer: ManifestExchanged, ChildFailed.
    """

    child: int
    wanted: Wanted
    seconds: float


@dataclass(frozen=True, slots=True)
class SendVersion:
    """Broadcast a stored version. Answer: ChildProgress, then ChildSent or ChildFailed."""

    child: int
    wanted: Wanted
    transport: Transport
    seconds: float


@dataclass(frozen=True, slots=True)
class ReceiveVersion:
    """Receive a version into staged memory.

    Answer: ChildProgress, then ChildReceived and ChildUnmapped, or ChildFailed.
    """

    child: int
    slot: int
    wanted: Wanted
    transport: Transport
    seconds: float
    verify: bool = True


@dataclass(frozen=True, slots=True)
class KillChild:
    """Kill the child now, whatever it does. Answer: ChildExited."""

    child: int


# ------------------------------------------------------------------------------------- the trainer


@dataclass(frozen=True, slots=True)
class Retain:
    """Keep copies of this many versions."""

    versions: int


@dataclass(frozen=True, slots=True)
class Pin:
    """Drop no copy of these versions, until another Pin."""

    versions: tuple[VersionId, ...]


@dataclass(frozen=True, slots=True)
class TellFleet:
    """Answer those who wait in publish()."""

    fleet: Fleet


Effect = (
    WriteJournal
    | WritePermit
    | Report
    | SendNack
    | Preflight
    | Apply
    | Resume
    | RestartEngine
    | AllocateStaging
    | SealStaging
    | DropStaging
    | OpenChild
    | ExchangeManifest
    | SendVersion
    | ReceiveVersion
    | KillChild
    | Retain
    | Pin
    | TellFleet
)
Effects = tuple[Effect, ...]

REST_ON_PERMIT: Final = (Apply, Resume)
