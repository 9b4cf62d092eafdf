"""What decide sees (World) and answers (Plan). All frozen; times are monotonic seconds."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from weightsync_contract.fleetview import FleetView
from weightsync_contract.messages import (
    Desired,
    Hello,
    InFlight,
    ObjectRef,
    Observed,
    Released,
    Timeouts,
    Transport,
    VersionId,
)
from weightsync_contract.reasons import Outcome

# ---------------------------------------------------------------------------- the spec


class InitialWeights(StrEnum):
    """May an engine answer with the weights it started with, while no version exists?"""

    WITHHOLD = "Withhold"
    SERVE = "Serve"


@dataclass(frozen=True, slots=True)
class Requirement:
    """One row of a selector's matchExpressions."""

    key: str
    operator: str
    values: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Selector:
    """A Kubernetes label selector. Never empty: the CRD refuses one."""

    labels: tuple[tuple[str, str], ...] = ()
    requirements: tuple[Requirement, ...] = ()


class OnFailure(StrEnum):
    """What becomes of members that have a version whose rollout failed."""

    HOLD = "Hold"
    ROLLBACK = "Rollback"


@dataclass(frozen=True, slots=True)
class Pause:
    """After a wave; ``seconds`` None: until somebody promotes."""

    seconds: float | None = None


@dataclass(frozen=True, slots=True)
class HttpCheck:
    """A GET that must answer with a status and, if ``path`` is given, with a value in its JSON."""

    url: str
    status: int = 200
    path: str = ""
    """Keys and list indexes joined by dots."""
    equals: str = ""


@dataclass(frozen=True, slots=True)
class PrometheusCheck:
    """An instant query, each of whose samples must be within the bounds; no sample is no pass."""

    address: str
    query: str
    minimum: float | None = None
    maximum: float | None = None


@dataclass(frozen=True, slots=True)
class Check:
    """What must hold before the next wave; exactly one of ``http`` and ``prometheus``. Seconds."""

    http: HttpCheck | None = None
    prometheus: PrometheusCheck | None = None
    interval: float = 10.0
    deadline: float = 300.0


@dataclass(frozen=True, slots=True)
class Wave:
    """One step of the strategy: how many members serve the version at its end, and what holds the next one."""

    members: str
    """A count or a percentage of the members, as given."""
    pause: Pause | None = None
    check: Check | None = None


@dataclass(frozen=True, slots=True)
class Pin:
    """The version that the spec names; without a run, the one of the fleet's present run."""

    version: int
    run: str = ""


@dataclass(frozen=True, slots=True)
class Spec:
    """A WeightSync's spec, with units resolved. ``unsupported``: fields that a later release will have."""

    trainer: Selector
    inference: Selector
    retained_versions: int = 2
    initial_weights: InitialWeights = InitialWeights.WITHHOLD
    in_flight: InFlight = InFlight.KEEP
    transport: Transport = field(default_factory=Transport)
    verify: bool = True
    max_unavailable: str = "25%"
    """A count or a percentage of the members, as given."""
    timeouts: Timeouts = field(default_factory=Timeouts)
    progress_seconds: float = 900.0
    paused: bool = False
    waves: tuple[Wave, ...] = ()
    on_failure: OnFailure = OnFailure.HOLD
    pin: Pin | None = None
    unsupported: tuple[str, ...] = ()


# ---------------------------------------------------------------------------- the status


@dataclass(frozen=True, slots=True)
class CurrentVersion:
    """A version the fleet was brought to. ``time`` is RFC 3339."""

    run: str
    version: int
    digest: str = ""
    time: str = ""


@dataclass(frozen=True, slots=True)
class SourceStatus:
    """The trainer that the fleet follows."""

    run: str = ""
    pod: str = ""


@dataclass(frozen=True, slots=True)
class GroupStatus:
    """The newest epoch ever handed out. ``members``: ``<first rank>:<ranks>:<pod name>:<pod uid>``."""

    epoch: int
    world_size: int = 0
    endpoint: str = ""
    members: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class RolloutStatus:
    """The rollout under way or last ended."""

    run: str
    version: int
    outcome: Outcome
    start_time: str = ""
    step_index: int | None = None
    """In waves: the step, from 0, that is under way or that it is paused after."""
    pause_time: str = ""
    """Since when it is paused after that step."""


@dataclass(frozen=True, slots=True)
class RejectedStatus:
    """Versions of this run up to this one are not brought by themselves: somebody rolled back from them."""

    run: str
    version: int


@dataclass(frozen=True, slots=True)
class MemberCounts:
    """How many members there are, and how they are."""

    total: int = 0
    synced: int = 0
    fenced: int = 0
    excluded: int = 0


@dataclass(frozen=True, slots=True)
class ConditionStatus:
    """A row of ``status.conditions``."""

    type: str
    status: str
    reason: str
    message: str
    last_transition_time: str = ""
    observed_generation: int = 0


@dataclass(frozen=True, slots=True)
class Status:
    """A WeightSync's status: what must survive the operator, and what people read."""

    observed_generation: int = 0
    term: int = 0
    source: SourceStatus | None = None
    current: CurrentVersion | None = None
    previous: CurrentVersion | None = None
    rollout: RolloutStatus | None = None
    rejected: tuple[RejectedStatus, ...] = ()
    group: GroupStatus | None = None
    synced: str = ""
    members: MemberCounts = field(default_factory=MemberCounts)
    conditions: tuple[ConditionStatus, ...] = ()


# ---------------------------------------------------------------------------- the world


@dataclass(frozen=True, slots=True)
class Probe:
    """A check that is to be asked once; the same key is the same question."""

    key: str
    check: Check


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came of a probe. ``message`` says what was seen, also when it passed."""

    key: str
    passed: bool
    message: str


@dataclass(frozen=True, slots=True)
class PodView:
    """A pod that a selector chose, as the API server has it."""

    uid: str
    namespace: str
    name: str
    labels: tuple[tuple[str, str], ...] = ()
    ip: str = ""
    terminating: bool = False
    finished: bool = False
    """Its phase is Succeeded or Failed."""
    succeeded: bool = False


@dataclass(frozen=True, slots=True)
class AgentView:
    """An agent as its session last told. Kept after a disconnect until its pod is gone."""

    hello: Hello
    observed: Observed | None
    connected: bool
    changed_at: float
    """When it last connected or disconnected."""
    nacked_term: int = 0
    """Highest term it named in a NACK: it obeyed somebody else under that, who spoke later than we did."""


@dataclass(frozen=True, slots=True)
class World:
    """Everything that a decision may rest on, at one moment."""

    ref: ObjectRef
    generation: int
    spec: Spec
    status: Status
    trainers: tuple[PodView, ...]
    members: tuple[PodView, ...]
    agents: Mapping[str, AgentView]
    """By pod uid."""
    claims: Mapping[str, ObjectRef]
    """Pods (by uid) that this spec selects but an older WeightSync owns."""
    leading_since: float
    """When this process became the leader and had an authoritative LIST."""
    now: float
    wall: str
    """The wall clock as RFC 3339, only ever written into the status for people to read."""
    nonce: str
    """Fresh randomness for an epoch, should one begin now."""
    action: str = ""
    """The annotation weightsync.dev/action."""
    verdict: Verdict | None = None
    """Of the last probe that was answered."""


@dataclass(frozen=True, slots=True)
class Note:
    """One Kubernetes Event."""

    reason: str
    message: str
    warning: bool = False


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do now.

    The order is fixed and part of the safety: the status is written first (if it differs), with the
    resourceVersion that the World was built from; only when that succeeded are ``desired`` and ``released``
    sent and the events recorded, and only then does the returned Memory replace the old one.
    """

    status: Status
    desired: Mapping[str, Desired] = field(default_factory=dict)
    """By pod uid; ``seq`` is 0 and set by the sender."""
    released: Mapping[str, Released] = field(default_factory=dict)
    notes: tuple[Note, ...] = ()
    requeue_after: float | None = None
    """Seconds until decide must run again even if nothing is observed to change."""
    probe: Probe | None = None
    """To be asked, unless it is being asked or was answered."""
    stand_down: bool = False
    """Another leader holds a higher term: send nothing and exit."""
    view: FleetView | None = None


@dataclass(frozen=True, slots=True)
class Participant:
    """A pod's place in an epoch."""

    uid: str
    name: str
    rank: int
    ranks: int


@dataclass(frozen=True, slots=True)
class VersionTarget:
    """A version with what is needed to bring and to check it."""

    version: VersionId
    layout: str
    digest: str
    total_bytes: int
