"""What went wrong in an epoch, and whose fault it is."""

from dataclasses import dataclass

from weightsync_contract.messages import Failure, TransferState
from weightsync_contract.reasons import FailureCode, Reason
from weightsync_operator.core import group
from weightsync_operator.core.facts import Facts
from weightsync_operator.core.memory import Epoch, Round, Step
from weightsync_operator.core.model import Participant

REASON_OF_CODE = {
    FailureCode.JOIN_TIMEOUT: Reason.JOIN_TIMEOUT,
    FailureCode.TRANSFER_TIMEOUT: Reason.TRANSFER_TIMEOUT,
    FailureCode.NO_PROGRESS: Reason.TRANSFER_TIMEOUT,
    FailureCode.PEER_LOST: Reason.TRANSFER_FAILED,
    FailureCode.CHILD_FAILED: Reason.TRANSFER_FAILED,
    FailureCode.DIGEST_MISMATCH: Reason.DIGEST_MISMATCH,
    FailureCode.MANIFEST_REFUSED: Reason.MANIFEST_REFUSED,
    FailureCode.STAGING_FAILED: Reason.TRANSFER_FAILED,
    FailureCode.ENGINE_UNREACHABLE: Reason.TRANSFER_FAILED,
    FailureCode.ENGINE_RESTARTED: Reason.ENGINE_REJECTED,
    FailureCode.COMMIT_TIMEOUT: Reason.COMMIT_TIMEOUT,
    FailureCode.APPLY_FAILED: Reason.ENGINE_REJECTED,
    FailureCode.VERSION_NOT_RETAINED: Reason.VERSION_NOT_RETAINED,
    FailureCode.UNSUPPORTED: Reason.ENGINE_REJECTED,
}

TELLERS = (
    FailureCode.JOIN_TIMEOUT,
    FailureCode.TRANSFER_TIMEOUT,
    FailureCode.NO_PROGRESS,
    FailureCode.PEER_LOST,
)
"""Who reports one of these tells about somebody else, and is not at fault for it."""

LASTING = (FailureCode.MANIFEST_REFUSED, FailureCode.UNSUPPORTED, FailureCode.APPLY_FAILED)
"""Trying the same version with the same engine again ends the same way."""


@dataclass(frozen=True, slots=True)
class Trouble:
    """One participant can't go on, or tells that another can't."""

    participant: Participant
    reason: Reason
    message: str
    code: FailureCode | None = None
    told: bool = False
    """It tells about somebody else."""
    lasting: bool = False
    gone: bool = False
    """Its pod has left the fleet: nobody is excluded."""


def failure_in(failure: Failure | None, epoch: Epoch, round_: Round) -> Failure | None:
    """The failure, if it is about this epoch and this version."""
    if failure is None or failure.epoch != epoch.number:
        return None
    return failure if failure.version in (None, round_.target.version) else None


def troubles(facts: Facts, epoch: Epoch, round_: Round) -> list[Trouble]:
    """All that is wrong with the epoch. Who has staged the version is done with it, whatever else happens."""
    found = []
    for each, incarnation in zip(epoch.participants, epoch.incarnations, strict=True):
        member = facts.members.get(each.uid)
        if member is not None and member.holds(round_.target, facts.verify):
            continue
        trouble = _trouble(facts, epoch, round_, each, incarnation)
        if trouble is not None:
            found.append(trouble)
    return found


def _trouble(
    facts: Facts, epoch: Epoch, round_: Round, each: Participant, incarnation: str
) -> Trouble | None:
    transfer = group.transfer_of(facts, each.uid)
    if transfer is None:
        return Trouble(each, Reason.TRANSFER_FAILED, f"pod {each.name} has left", gone=True)
    failure = failure_in(transfer.failure, epoch, round_)
    if failure is not None:
        told, lasting = failure.code in TELLERS, failure.code in LASTING
        return Trouble(
            each, REASON_OF_CODE[failure.code], f"{each.name}: {failure.message}", failure.code, told, lasting
        )
    if group.incarnation_of(facts, each.uid) != incarnation:
        return Trouble(each, Reason.TRANSFER_FAILED, f"{each.name}: its agent restarted")
    joined_once = round_.step in (Step.CHECKING, Step.TRANSFERRING)
    if joined_once and not group.joined(transfer, epoch):
        return Trouble(each, Reason.TRANSFER_FAILED, f"{each.name}: it is no longer in the group")
    target = round_.target
    wrong = transfer.state is TransferState.STAGED and transfer.version == target.version
    if each.rank != 0 and wrong and facts.verify and transfer.digest != target.digest:
        message = f"{each.name}: it received {transfer.digest}, but {target.digest} was published"
        return Trouble(each, Reason.DIGEST_MISMATCH, message)
    return None


def suspects(facts: Facts, epoch: Epoch, round_: Round, told: set[str]) -> list[Participant]:
    """Members that neither tell of a loss nor have what the others wait for: theirs is the blame, when
    the others tell of one."""
    found = []
    for each in epoch.participants[1:]:
        member = facts.members.get(each.uid)
        if member is None or each.uid in told or member.holds(round_.target, facts.verify):
            continue
        found.append(each)
    return found


def silent(facts: Facts, epoch: Epoch) -> list[Participant]:
    """Participants that have not even begun to join."""
    found = []
    for each in epoch.participants:
        transfer = group.transfer_of(facts, each.uid)
        begun = transfer is not None and group.in_epoch(transfer, epoch)
        if not begun or transfer is None or transfer.state is TransferState.ABORTING:
            found.append(each)
    return found
