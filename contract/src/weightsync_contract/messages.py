"""The session's messages: whole states both ways, never steps.

The operator sends each agent everything it wants of it (Desired); the agent sends everything it is (Observed)
and names the last Desired that it took. Losing, doubling or delaying a message changes nothing: the next one
carries it all. Sizes are bytes, times are seconds unless the name says otherwise; no wall clock crosses.
"""

from dataclasses import dataclass, field
from enum import StrEnum

from weightsync_contract.reasons import FailureCode, Outcome, Reason, RefusalCode, Role


@dataclass(frozen=True, slots=True)
class VersionId:
    """What names a state of the weights: the trainer process's lineage and a number that grows within it."""

    run: str
    version: int

    def __str__(self) -> str:
        return f"{self.run}/{self.version}"


@dataclass(frozen=True, slots=True)
class PodRef:
    """A pod, by the only thing that never comes back (its uid) and by what people call it."""

    namespace: str
    name: str
    uid: str


@dataclass(frozen=True, slots=True)
class ObjectRef:
    """A WeightSync."""

    namespace: str
    name: str
    uid: str


class Capability(StrEnum):
    """What an agent together with its engine can do."""

    STAGES = "stages"
    ABORTS = "aborts"
    DIGESTS = "digests"
    GUARDS = "guards"


class Phase(StrEnum):
    """How far the group may go with the wanted version."""

    CHECK = "Check"
    TRANSFER = "Transfer"


class TransferState(StrEnum):
    """Where an agent's transfer side is."""

    IDLE = "Idle"
    JOINING = "Joining"
    JOINED = "Joined"
    CHECKING = "Checking"
    RECEIVING = "Receiving"
    STAGED = "Staged"
    SENDING = "Sending"
    SENT = "Sent"
    ABORTING = "Aborting"


class ServingState(StrEnum):
    """Where a member's engine is. Only Serving (and Initial, when the spec says so) answers requests."""

    UNREACHABLE = "Unreachable"
    INITIAL = "Initial"
    APPLYING = "Applying"
    SERVING = "Serving"
    WITHHELD = "Withheld"
    FENCED = "Fenced"


class InFlight(StrEnum):
    """What happens to running requests at a commit (vLLM's pause modes)."""

    KEEP = "Keep"
    WAIT = "Wait"
    ABORT = "Abort"


class Mode(StrEnum):
    """How tensors are put on the wire."""

    PACKED = "Packed"
    PER_TENSOR = "PerTensor"


class Staging(StrEnum):
    """Where a received version waits for its use."""

    HOST = "Host"
    """Memory of the agent's pod."""
    DEVICE = "Device"
    """Memory of the engine's own, on its GPU."""


# ------------------------------------------------------------------------------------- agent to operator


@dataclass(frozen=True, slots=True)
class Hello:
    """First frame of an agent. ``incarnation`` is new for each agent process."""

    protocol_min: int
    protocol_max: int
    pod: PodRef
    role: Role
    incarnation: str
    term: int
    """Highest term the agent has ever obeyed for any WeightSync; 0 for none."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Why the last thing asked for did not happen. It stays until the next thing is tried."""

    code: FailureCode
    message: str
    epoch: int = 0
    version: VersionId | None = None


@dataclass(frozen=True, slots=True)
class Transfer:
    """The transfer side of an agent."""

    state: TransferState = TransferState.IDLE
    epoch: int = 0
    nonce: str = ""
    endpoint: str = ""
    """Where rank 0 listens, ``host:port``; only the trainer's agent sets it."""
    checked: str = ""
    """Layout id of the last manifest that the engine said it can take (trainer: that it sent)."""
    version: VersionId | None = None
    bytes: int = 0
    total_bytes: int = 0
    digest: str = ""
    failure: Failure | None = None


@dataclass(frozen=True, slots=True)
class Serving:
    """The serving side of an inference agent."""

    state: ServingState = ServingState.UNREACHABLE
    boot: str = ""
    version: VersionId | None = None
    digest: str = ""
    fences: int = 0
    failure: Failure | None = None


@dataclass(frozen=True, slots=True)
class Published:
    """A version that the trainer's agent holds a copy of."""

    version: VersionId
    layout: str
    digest: str
    total_bytes: int
    tensors: int = 0


@dataclass(frozen=True, slots=True)
class Source:
    """The publishing side of a trainer's agent. ``versions`` are in the order of publishing."""

    run: str = ""
    connected: bool = False
    versions: tuple[Published, ...] = ()
    completed: bool = False


@dataclass(frozen=True, slots=True)
class Observed:
    """Everything an agent is. ``term`` and ``seq`` are those of the last Desired it took."""

    term: int
    seq: int
    highest_term: int
    ranks: int
    """Ranks this agent takes in a group; 0 while the engine has not said its world size."""
    transfer: Transfer = field(default_factory=Transfer)
    serving: Serving | None = None
    source: Source | None = None
    capabilities: tuple[Capability, ...] = ()


@dataclass(frozen=True, slots=True)
class Nack:
    """The agent did not take a Desired; its Observed still says what it is."""

    term: int
    seq: int
    code: RefusalCode
    message: str


# ------------------------------------------------------------------------------------- operator to agent


@dataclass(frozen=True, slots=True)
class Welcome:
    """The session is open."""

    protocol: int
    ping_seconds: float
    dead_seconds: float


@dataclass(frozen=True, slots=True)
class Refused:
    """The session is closed, and why. ``address`` is where the leader listens, when that is the reason."""

    code: RefusalCode
    message: str
    address: str = ""


@dataclass(frozen=True, slots=True)
class Group:
    """A place in an epoch. ``endpoint`` is empty for rank 0 until it has told where it listens."""

    epoch: int
    nonce: str
    rank: int
    ranks: int
    world_size: int
    endpoint: str = ""


@dataclass(frozen=True, slots=True)
class Wanted:
    """The version to bring over the group."""

    version: VersionId
    layout: str
    digest: str
    total_bytes: int
    phase: Phase


@dataclass(frozen=True, slots=True)
class Transport:
    """How bytes are put on the wire."""

    backend: str = "Gloo"
    mode: Mode = Mode.PACKED
    buffer_bytes: int = 256 << 20
    num_buffers: int = 3
    port: int = 0
    staging: Staging = Staging.HOST


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Each phase's deadline in seconds; the agent keeps them on its own monotonic clock."""

    join: float = 60.0
    transfer: float = 300.0
    commit: float = 60.0


@dataclass(frozen=True, slots=True)
class Rollout:
    """The rollout under way or last ended, for those who wait in publish()."""

    version: VersionId
    outcome: Outcome
    reason: Reason
    message: str = ""


@dataclass(frozen=True, slots=True)
class Fleet:
    """How the fleet stands, for the trainer."""

    current: VersionId | None = None
    rollout: Rollout | None = None
    members: int = 0
    synced: int = 0


@dataclass(frozen=True, slots=True)
class Desired:
    """Everything the operator wants of one agent."""

    weightsync: ObjectRef
    term: int
    seq: int
    group: Group | None = None
    wanted: Wanted | None = None
    commit: VersionId | None = None
    commit_digest: str = ""
    allowed: tuple[VersionId, ...] = ()
    """Versions that the member may go on serving."""
    serve_initial: bool = False
    """The engine may answer with its first weights: no version exists yet and the spec wants it so."""
    in_flight: InFlight = InFlight.KEEP
    verify: bool = True
    transport: Transport = field(default_factory=Transport)
    timeouts: Timeouts = field(default_factory=Timeouts)
    remaining_ms: int = 0
    """What is left of the present phase; 0 for no phase."""
    retained_versions: int = 2
    keep: tuple[VersionId, ...] = ()
    """Versions whose copies the trainer's agent keeps besides the newest: somebody is still to get them."""
    fleet: Fleet = field(default_factory=Fleet)


@dataclass(frozen=True, slots=True)
class Released:
    """No WeightSync wants this pod: leave the group, drop what is staged, keep the permit and serve on."""

    term: int
    message: str = ""
