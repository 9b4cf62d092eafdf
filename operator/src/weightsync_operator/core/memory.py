"""What decide remembers from one pass to the next, beside the status. Losing it costs time, never safety."""

from dataclasses import dataclass, field
from enum import StrEnum

from weightsync_contract.messages import Failure, Timeouts, Transport, VersionId
from weightsync_contract.reasons import Reason
from weightsync_operator.core.model import Participant, Status, VersionTarget, Wave


class Step(StrEnum):
    """How far a round is."""

    GATHERING = "Gathering"
    """Nobody is told anything yet: who takes part is being settled."""
    LISTENING = "Listening"
    """Rank 0 is to listen."""
    JOINING = "Joining"
    CHECKING = "Checking"
    TRANSFERRING = "Transferring"
    COMMITTING = "Committing"


REASON_OF_STEP = {
    Step.GATHERING: Reason.GROUPING,
    Step.LISTENING: Reason.GROUPING,
    Step.JOINING: Reason.GROUPING,
    Step.CHECKING: Reason.CHECKING,
    Step.TRANSFERRING: Reason.TRANSFERRING,
    Step.COMMITTING: Reason.COMMITTING,
}


@dataclass(frozen=True, slots=True)
class Epoch:
    """A group that was handed out by this leader, or taken over from the last one. Its rank map never
    changes."""

    number: int
    nonce: str
    participants: tuple[Participant, ...]
    """Rank 0, the trainer, first; ranks are contiguous."""
    incarnations: tuple[str, ...]
    """Of each participant's agent when the epoch began: another one has lost its child."""
    transport: Transport
    timeouts: Timeouts
    generation: int
    """Of the spec that transport and timeouts are of: an edited spec counts from the next epoch on."""
    endpoint: str = ""
    moved: VersionId | None = None
    """Version that was last asked to go round in it: each goes round once."""

    @property
    def world_size(self) -> int:
        """Ranks of all participants together."""
        return sum(each.ranks for each in self.participants)


@dataclass(frozen=True, slots=True)
class Round:
    """One attempt to bring a version to some members.

    A rollout brings a new version to all who are there when it begins; a catch-up brings the current one to
    those without it.
    """

    target: VersionTarget
    scope: tuple[str, ...]
    """Uids of the members that it is for."""
    catch_up: bool
    began: float
    began_wall: str
    progress_deadline: float
    step: Step
    step_began: float
    deadline: float
    """When the present step is given up."""
    frozen: bool = False
    """Its transfer was asked for: a newer version waits."""
    committed: tuple[str, ...] = ()
    """Uids of those told to commit."""
    stale: tuple[tuple[str, Failure | None], ...] = ()
    """What each of those told of its last commit when it was told to: an old failure is none of this one."""
    loss: bool = False
    """An epoch of this round was lost; the next one is not delayed by anybody."""
    retries: int = 0
    """Epochs of this round that were lost with no member to blame."""
    told_at: float | None = None
    """When somebody first told that the present epoch is broken."""
    paused_at: float | None = None
    reason: Reason = Reason.TRANSFER_FAILED
    """Why somebody was last excluded or an epoch lost: what the round fails with, if it does."""
    message: str = ""
    back: bool = False
    """Spec or action asked for a version that is not later than the current one: members may be taken back."""
    waves: tuple[Wave, ...] = ()
    """The strategy that counts until the next wave begins; empty: all members at once."""
    wave: int = 0
    """The wave, from 0, that is under way; beyond ``waves``: the last one, of all the rest."""
    reached: tuple[str, ...] = ()
    """Uids of members that served the target at the end of a wave."""
    fallen: tuple[str, ...] = ()
    """Uids of those of them that lost it since, and of those that were fenced when they switched to it."""


@dataclass(frozen=True, slots=True)
class Parked:
    """A rollout between two waves: nothing is moved for it, and late members are caught up meanwhile."""

    round: Round
    since: float
    since_wall: str
    asked: int = 0
    """Checks that were asked and answered."""
    ask_at: float = 0.0
    """When the next one is due."""
    check_began: float | None = None
    passed: bool = False
    failed: bool = False
    """The check did not pass in time: only a promotion, a retry or an abort goes on from here."""
    verdict: str = ""
    """What the last check saw."""
    verdict_at: float = 0.0


@dataclass(frozen=True, slots=True)
class Exclusion:
    """A member that is not tried for now."""

    uid: str
    reason: Reason
    message: str
    version: VersionId
    boot: str
    incarnation: str
    until: float
    """When it is tried again though nothing changed; infinite when only another version or boot can help."""
    tries: int
    active: bool = True
    """False: it takes part again; only the number of tries is kept."""


@dataclass(frozen=True, slots=True)
class FailedRollout:
    """A version that is not tried again until the spec or the membership changes."""

    version: VersionId
    reason: Reason
    message: str
    generation: int
    members: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Memory:
    """Everything. ``Memory()``: this process has just become the leader."""

    term: int = 0
    """Ours, once it was written; 0 before."""
    adopted: bool = False
    """What the last leader left was taken over."""
    source: str = ""
    """Uid of the trainer's pod that the fleet follows."""
    epoch: Epoch | None = None
    """The group that is open now."""
    highest_epoch: int = 0
    round: Round | None = None
    parked: Parked | None = None
    """A rollout in waves that is paused; a catch-up may be under way beside it."""
    allowed: tuple[VersionId, ...] = ()
    """Versions that members may serve."""
    exclusions: tuple[Exclusion, ...] = ()
    failed: FailedRollout | None = None
    waiting_since: float | None = None
    """Since when somebody without the current version waits for others to join with."""
    noted: frozenset[tuple[str, ...]] = field(default_factory=frozenset)
    """What was told by an Event and still holds."""
    shown: tuple[str, ...] = ()
    """What of the present round the status shows."""
    shown_at: float = 0.0
    """When the status was last written."""
    kept: Status | None = None
    """The status as last decided: what to put back if it is wiped from outside."""
    action: str = ""
    """The last action that was answered."""

    def exclusion(self, uid: str) -> Exclusion | None:
        """The member's, active or not."""
        return next((each for each in self.exclusions if each.uid == uid), None)

    def excluded(self, uid: str) -> bool:
        """Whether the member is left out at the moment."""
        found = self.exclusion(uid)
        return found is not None and found.active
