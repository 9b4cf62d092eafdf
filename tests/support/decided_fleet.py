"""What the tests of decide say of a fleet, and do to it."""

from dataclasses import replace
from typing import Any

from weightsync_contract.messages import Failure, Transfer, TransferState, VersionId
from weightsync_contract.reasons import Condition, FailureCode, Outcome, Reason
from weightsync_operator.core.model import Check, Wave

V2 = VersionId("a", 2)


def staged(fleet: Any) -> bool:
    return all(member.transfer.state is TransferState.STAGED for member in fleet.members)


def receiving(fleet: Any) -> bool:
    return all(member.transfer.state is TransferState.RECEIVING for member in fleet.members)


def hold(fleet: Any, step: str, held: bool = True) -> None:
    for member in fleet.members:
        member.stuck = {step} if held else set()


def transferring(fleet: Any) -> None:
    fleet.members[0].stuck.add("transfer")
    fleet.publish(2)
    fleet.until(lambda: all(m.transfer.state is TransferState.RECEIVING for m in fleet.members))
    fleet.members[0].stuck.clear()


def kill_child(fleet: Any, culprit: Any, others: FailureCode = FailureCode.PEER_LOST) -> None:
    """The culprit's child dies; everybody else in the epoch notices."""
    epoch = fleet.memory.epoch.number
    for agent in (fleet.trainer, *fleet.members):
        if agent.transfer.epoch != epoch or agent.transfer.state is TransferState.STAGED:
            continue
        code = FailureCode.CHILD_FAILED if agent is culprit else others
        agent.transfer = Transfer(epoch=epoch, failure=Failure(code, "went away", epoch, V2))


def failed(fleet: Any, reason: Reason) -> None:
    """The rollout of version 2 failed, and everybody who served version 1 still does."""
    assert fleet.status.rollout.outcome is Outcome.FAILED
    assert fleet.condition(Condition.PROGRESSING)[:2] == ("False", reason)
    assert fleet.condition(Condition.READY)[:2] == ("False", Reason.DEGRADED)
    assert fleet.status.current.version == 1
    assert None not in fleet.serving()
    assert len(fleet.events(reason)) == 1


def canary(make: Any, waves: list[Wave], members: int = 4, **spec: Any) -> Any:
    """A fleet that serves version 1, whose next version goes in these waves."""
    fleet = make(members=members, spec={"retained_versions": 5, **spec})
    fleet.publish(1)
    fleet.run()
    assert fleet.serving() == [1] * members
    fleet.spec = replace(fleet.spec, waves=tuple(waves))
    fleet.generation += 1
    fleet.notes.clear()
    return fleet


def wave(members: str, check: Check) -> Wave:
    return Wave(members, None, check)
