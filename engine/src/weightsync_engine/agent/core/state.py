"""Everything an agent knows, frozen. Times are monotonic seconds of this machine."""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from weightsync_contract.messages import (
    Capability,
    Desired,
    Failure,
    Fleet,
    Group,
    InFlight,
    Observed,
    ServingState,
    Source,
    TransferState,
    VersionId,
    Wanted,
)
from weightsync_contract.reasons import FailureCode, Role
from weightsync_engine.agent.core.journal import Journal, Record, Seen
from weightsync_engine.permit import Permit

ABORT_SECONDS: Final = 2.0
"""Longest wait for a killed child to be gone."""
SEAL_SECONDS: Final = 5.0
"""Longest that a child may take to give up what it received into, with a second on top for each UNMAP_RATE bytes."""
UNMAP_RATE: Final = 1e9
"""Bytes a second; it is some ten times as fast with pages of 4 KiB and a core of its own."""
STALL_SECONDS: Final = 10.0
"""A transfer in which no byte moves for so long, once some did, has failed."""
FENCE_WINDOW_SECONDS: Final = 600.0
FENCE_LIMIT: Final = 3
"""A member fenced so often within the window is not restarted any more."""
RETRY_SECONDS: Final = 1.0
"""Between two tries of something local that failed: a permit, a journal entry, a preflight, a resume."""
RESTART_SECONDS: Final = 20.0
"""Between two demands that a fenced engine ends."""
APPLY_MARGIN: Final = 0.9
"""Share of the commit deadline that the engine gets: a clean failure can then be told from a hang."""


@dataclass(frozen=True, slots=True)
class DesiredSide:
    """What the operator wants, as far as it was taken."""

    taken: Desired | None = None
    pending: Desired | None = None
    """Waits until the term and epoch it brings are durable."""
    released: bool = False
    session: bool = False


@dataclass(frozen=True, slots=True)
class EngineSide:
    """The engine as last probed."""

    reachable: bool = False
    boot: str = ""
    world_size: int = 0
    capabilities: tuple[Capability, ...] = ()


class Stage(StrEnum):
    """How far a commit is. Each stage rests on something durable or confirmed in the one before."""

    RECORD = "Record"
    """The journal is being told what is about to happen. The engine is untouched."""
    APPLY = "Apply"
    """Permit on Hold; the engine is paused and its weights change."""
    SETTLE = "Settle"
    """The engine's weights are whole again, and the journal is being told which."""
    RESUME = "Resume"
    """The permit is as it will be; the engine is being told to go on."""


@dataclass(frozen=True, slots=True)
class Commit:
    """A commit under way. ``version`` is None only when a restarted agent merely ends one of before."""

    stage: Stage
    before: ServingState
    """What the member was: Initial, Serving or Withheld."""
    after: ServingState
    """What it will be once resumed."""
    deadline: float
    version: VersionId | None = None
    digest: str = ""
    slot: int = 0
    in_flight: InFlight = InFlight.KEEP
    asked: bool = False
    """The engine was asked to do the present stage's work and has not answered yet."""
    retry_at: float = 0.0


@dataclass(frozen=True, slots=True)
class ServingSide:
    """What the engine of one boot holds and may do."""

    state: ServingState = ServingState.UNREACHABLE
    """Unreachable here means: no engine was seen since this agent started."""
    boot: str = ""
    version: VersionId | None = None
    digest: str = ""
    initial: bool = False
    """Initial, and allowed to answer with the weights it started with."""
    commit: Commit | None = None
    fences: tuple[float, ...] = ()
    restart_at: float | None = None
    """When a fenced engine is next told to end; None: never, it was fenced too often."""
    weightsync: str = ""
    """Uid of the WeightSync for which a commit was last begun: for it, a version is known to exist."""
    failure: Failure | None = None
    tried: tuple[str, VersionId] | None = None
    """A commit that failed cleanly, as (boot, version): not tried again until another is asked for."""


class StagingState(StrEnum):
    """Where the staged memory is."""

    NONE = "None"
    ALLOCATING = "Allocating"
    WRITABLE = "Writable"
    SEALING = "Sealing"
    """Complete and verified: told to the operator as staged, but not yet to be applied."""
    STAGED = "Staged"
    """Sealed."""


@dataclass(frozen=True, slots=True)
class StagingSide:
    """The one piece of memory that versions are received into. A slot number is never used twice."""

    state: StagingState = StagingState.NONE
    slot: int = 0
    nbytes: int = 0
    device: bool = False
    """It is the engine's own, and gone with its boot."""
    wanted: Wanted | None = None
    """What is in it: set once its receive began."""
    digest: str = ""
    child: int = 0
    """Who received it. It may have it mapped, until it says otherwise or is gone."""
    deadline: float = 0.0
    """Until when that child has to give it up; 0 unless it is waited for."""


@dataclass(frozen=True, slots=True)
class CheckSide:
    """Manifests that are known by layout id, and the engine's answer to the one that matters."""

    known: tuple[str, ...] = ()
    """Layouts whose manifests the edge keeps, oldest first."""
    boot: str = ""
    layout: str = ""
    code: FailureCode | None = None
    """None: the engine of ``boot`` can take ``layout``."""
    message: str = ""
    asking: tuple[str, str] | None = None
    """(boot, layout) of a preflight under way."""
    retry_at: float = 0.0


@dataclass(frozen=True, slots=True)
class TransferSide:
    """The agent's place in one group, and what the group does."""

    state: TransferState = TransferState.IDLE
    """Never Staged or Sent: these follow from the rest."""
    group: Group | None = None
    child: int = 0
    """The living child; 0 for none."""
    children: int = 0
    """Children ever opened: a number is never used twice."""
    endpoint: str = ""
    exchanged: tuple[str, ...] = ()
    """Layouts whose manifests went round in this group: each goes round once."""
    done: VersionId | None = None
    """Version that last went round in this group."""
    refused: VersionId | None = None
    """Version that this member can't take in this group, as ``failure`` says; not tried again in it."""
    wanted: Wanted | None = None
    """What is going round in the group at this moment: a manifest in Checking, else a version."""
    moving: bool = False
    """The child was told to receive; before that, memory is being had."""
    verify: bool = True
    """The digest of what is being received must be the one that was published."""
    bytes: int = 0
    moved_at: float = 0.0
    deadline: float = 0.0
    failure: Failure | None = None
    broken: tuple[int, str] | None = None
    """(epoch, nonce) of the group that was left or failed: it is never joined again."""


@dataclass(frozen=True, slots=True)
class PermitSide:
    """The permit as it lies on disk."""

    written: Permit | None = None
    unknown: bool = False
    """A write failed: it may be either."""
    retry_at: float = 0.0


@dataclass(frozen=True, slots=True)
class JournalSide:
    """The journal as far as it is durable, and the entry on its way."""

    durable: Journal = field(default_factory=Journal)
    writing: Record | None = None
    unsure: bool = False
    """A write failed: what is durable may be either, so it is written again."""
    retry_at: float = 0.0


@dataclass(frozen=True, slots=True)
class State:
    """An agent."""

    role: Role
    desired: DesiredSide = field(default_factory=DesiredSide)
    engine: EngineSide = field(default_factory=EngineSide)
    serving: ServingSide = field(default_factory=ServingSide)
    check: CheckSide = field(default_factory=CheckSide)
    staging: StagingSide = field(default_factory=StagingSide)
    slots: int = 0
    """Pieces of memory ever had."""
    transfer: TransferSide = field(default_factory=TransferSide)
    permit: PermitSide = field(default_factory=PermitSide)
    journal: JournalSide = field(default_factory=JournalSide)
    seen_before: tuple[Seen, ...] = ()
    """What the journal knew when this agent started: epochs up to these were another process's."""
    source: Source = field(default_factory=Source)
    retained: int = 0
    pinned: tuple[VersionId, ...] = ()
    fleet: Fleet | None = None
    """The Fleet last told to the trainer."""
    reported: Observed | None = None


def start(role: Role, journal: Journal, permit: Permit | None) -> State:
    """An agent that has just read its journal and the permit that lies there, and has seen nothing yet."""
    return State(
        role=role,
        permit=PermitSide(written=permit),
        journal=JournalSide(durable=journal),
        seen_before=journal.seen,
    )
