"""A leader begins: its term is written first, the last one's agents are waited for, and its work goes on."""

from dataclasses import replace
from typing import Any

import pytest

from weightsync_contract.messages import ServingState, Transfer, TransferState, VersionId
from weightsync_contract.reasons import Condition, FailureCode, Outcome, Reason
from weightsync_operator.core.memory import Memory
from weightsync_operator.core.model import GroupStatus, Status

V1, V2 = VersionId("a", 1), VersionId("a", 2)


# ---------------------------------------------------------------------------- the term


@pytest.mark.parametrize(
    ("status", "agents", "expected"), [(0, 0, 1), (4, 0, 5), (4, 2, 5), (2, 9, 10), (0, 3, 4)]
)
def test_the_term_is_higher_than_any_that_was_heard_of(
    make: Any, status: int, agents: int, expected: int
) -> None:
    fleet = make()
    fleet.status = Status(term=status)
    fleet.members[1].highest_term = agents
    plan = fleet.decide()
    assert plan.status.term == expected
    assert plan.desired == {}
    assert plan.requeue_after == 0.0


def test_nothing_is_sent_before_the_term_is_written(make: Any) -> None:
    fleet = make()
    fleet.publish(1)

    def check(world: Any, plan: Any) -> None:
        for told in plan.desired.values():
            assert told.term == world.status.term == plan.status.term > 0

    fleet.hook = check
    fleet.run()
    assert fleet.serving() == [1, 1]


def test_a_lost_write_of_the_term_is_tried_again(make: Any) -> None:
    fleet = make()
    first = fleet.decide()
    fleet.status, fleet.memory = Status(term=first.status.term + 6), Memory()
    assert fleet.decide().status.term == first.status.term + 7


def test_a_higher_term_in_the_status_ends_this_leader(synced: Any) -> None:
    synced.status = replace(synced.status, term=synced.status.term + 1)
    before = synced.memory
    plan = synced.decide()
    assert plan.stand_down
    assert plan.desired == {}
    assert plan.notes == ()
    assert synced.memory == before


def test_an_agent_that_obeyed_a_higher_term_raises_ours(synced: Any) -> None:
    synced.members[0].nacked_term = 41
    plan = synced.decide()
    assert plan.status.term == 42
    assert plan.desired == {}
    plan = synced.decide()
    assert {told.term for told in plan.desired.values()} == {42}
    assert synced.run().status.term == 42


def test_a_term_that_somebody_else_has_spoken_under_is_raised(synced: Any) -> None:
    """The status was lost, and the new leader began before any agent had told it the term."""
    synced.members[0].nacked_term = synced.memory.term
    term = synced.memory.term
    plan = synced.decide()
    assert plan.status.term == term + 1
    assert plan.desired == {}
    assert synced.run().status.term == term + 1


def test_a_higher_term_of_another_weightsync_is_no_reason_to_raise_ours(synced: Any) -> None:
    synced.members[0].highest_term = 41
    assert synced.run().status.term == 1


def test_a_status_that_was_wiped_gets_our_term_back_before_anything_is_sent(synced: Any) -> None:
    term = synced.memory.term
    synced.status = Status()
    plan = synced.decide()
    assert plan.status.term == term
    assert plan.desired == {}
    synced.run()
    assert synced.status.current.version == 1


# ---------------------------------------------------------------------------- the roster


def test_waiting_for_the_roster_says_nothing_to_anybody(synced: Any) -> None:
    synced.restart_operator()
    synced.members[1].reported = False
    synced.publish(2)
    synced.decide()
    for _ in range(5):
        plan = synced.decide()
        assert plan.desired == {}
        assert plan.status.group.epoch == 1
    assert 0 < plan.requeue_after <= 60
    assert plan.view.phase == Reason.WAITING_FOR_ROSTER
    assert "m1" in plan.view.message


def test_the_roster_is_waited_for_only_for_the_time_to_join(synced: Any) -> None:
    synced.restart_operator()
    synced.lose_session(synced.members[1])
    synced.members[1].reported = False
    synced.publish(2)
    synced.wait(30)
    assert synced.reason(Condition.PROGRESSING) is Reason.WAITING_FOR_ROSTER
    assert synced.serving() == [1, 1]
    synced.wait(40)
    assert synced.serving()[0] == 2


@pytest.mark.parametrize("gone", ["left", "finished"])
def test_a_roster_member_whose_pod_is_gone_is_not_waited_for(synced: Any, gone: str) -> None:
    synced.restart_operator()
    member = synced.members[1]
    member.reported = member.connected = False
    if gone == "left":
        synced.leave(member)
    else:
        member.finished = True
    synced.publish(2)
    synced.run()
    assert synced.members[0].serving.version == V2


def test_who_is_not_in_the_roster_gets_some_seconds_to_come_back(synced: Any) -> None:
    """The last epoch was a catch-up of one: the roster says little about the fleet."""
    late = synced.join("m2")
    synced.run()
    assert synced.status.group.members[1:] == ("1:1:m2:uid-m2",)
    synced.publish(2)
    synced.restart_operator()
    for member in synced.members[:2]:
        member.has_agent = False
    synced.wait(3)
    assert late.serving.version == VersionId("a", 1)
    for member in synced.members[:2]:
        member.has_agent = True
    synced.run()
    assert synced.serving() == [2, 2, 2]
    assert len(synced.events(Reason.EXCLUDED)) == 0


def test_a_pod_that_never_had_an_agent_holds_a_new_leader_up_for_some_seconds_only(synced: Any) -> None:
    synced.join("bare", has_agent=False)
    synced.run()
    synced.restart_operator()
    synced.publish(2)
    plan = synced.run()
    assert synced.memory.round is None
    end = synced.now + 5.1
    while plan.requeue_after is not None and synced.now + plan.requeue_after <= end:
        synced.now += plan.requeue_after
        plan = synced.run()
    assert synced.serving() == [2, 2, None]


def test_a_written_row_that_nobody_of_ours_wrote_is_no_roster(make: Any) -> None:
    fleet = make()
    fleet.status = Status(group=GroupStatus(7, 3, "h:1", ("", "x", "0:1:t", "a:b:c:d")))
    fleet.publish(1)
    fleet.run()
    assert fleet.serving() == [1, 1]
    assert fleet.status.group.epoch == 8


# ---------------------------------------------------------------------------- going on


def test_an_idle_fleet_notices_nothing(synced: Any) -> None:
    group, told = synced.status.group, [member.told for member in synced.members]
    synced.restart_operator()
    synced.run()
    assert synced.status.group == group
    for before, member in zip(told, synced.members, strict=True):
        assert replace(member.told, term=before.term) == before
    synced.publish(2)
    synced.run()
    assert synced.status.group == group
    assert synced.serving() == [2, 2]


def test_operator_dies_while_members_join(make: Any) -> None:
    fleet = make()
    fleet.publish(1)
    fleet.until(fleet.step_is("Joining"))
    fleet.obey()
    fleet.restart_operator()
    fleet.run()
    assert fleet.serving() == [1, 1]


def test_operator_dies_before_the_epoch_is_written(make: Any) -> None:
    fleet = make()
    fleet.publish(1)
    fleet.until(fleet.step_is("Listening"))
    fleet.obey()
    assert fleet.trainer.transfer.epoch == 1
    assert fleet.status.group is None
    fleet.restart_operator()
    fleet.run()
    assert fleet.serving() == [1, 1]
    assert fleet.status.group.epoch == 2


def test_operator_dies_in_a_transfer_and_the_next_one_lets_it_end(synced: Any) -> None:
    synced.publish(2)
    synced.members[1].stuck.add("transfer")
    synced.until(lambda: synced.members[1].transfer.state is TransferState.RECEIVING)
    group = synced.status.group
    synced.publish(3)
    synced.restart_operator()
    for _ in range(6):
        synced.decide()
        synced.obey()
    assert synced.members[0].transfer.state is TransferState.RECEIVING
    assert synced.members[0].transfer.version == V2
    synced.members[1].stuck.clear()
    served = []
    synced.hook = lambda *_: served.append(synced.serving()[0])
    synced.run()
    assert 2 in served
    assert synced.serving() == [3, 3]
    assert synced.status.group == group


def test_operator_dies_when_all_are_staged(synced: Any) -> None:
    synced.publish(2)
    synced.until(lambda: all(m.transfer.state is TransferState.STAGED for m in synced.members))
    synced.restart_operator()
    synced.run()
    assert synced.serving() == [2, 2]
    assert synced.status.current.version == 2


def test_operator_dies_in_a_commit_and_the_next_one_goes_forward(synced: Any) -> None:
    synced.publish(2)
    synced.members[1].stuck.add("commit")
    synced.until(lambda: synced.serving() == [2, 1])
    synced.restart_operator()
    synced.members[1].stuck.clear()
    allowed = []
    synced.hook = lambda world, plan: allowed.extend(told.allowed for told in plan.desired.values())
    synced.run()
    assert synced.serving() == [2, 2]
    assert synced.status.current.version == 2
    assert synced.status.previous.version == 1
    assert all(V2 in each for each in allowed if each)


def test_the_last_leaders_commit_that_is_heard_late_is_gone_forward_with(synced: Any) -> None:
    """What was verified and is served is the fleet's version, though nobody else can have it any more."""
    early, late = synced.members
    versions = synced.trainer.source.versions
    synced.publish(2)
    late.stuck.add("transfer")
    synced.until(lambda: early.transfer.state is TransferState.RECEIVING)
    synced.restart_operator()
    synced.trainer.restart_agent()
    synced.trainer.source = replace(synced.trainer.source, versions=versions)
    for member in synced.members:
        member.transfer = Transfer(checked="L1")
        member.told = None
    synced.run()
    assert synced.serving() == [1, 1]
    assert synced.memory.allowed == (V1,)
    early.serving = replace(early.serving, version=V2, digest="d-a-2")
    synced.run()
    assert synced.status.current.version == 2
    assert early.serving.state is ServingState.SERVING


def test_operator_and_trainer_die_in_a_commit(synced: Any) -> None:
    """The bytes are known by what members agree on."""
    synced.publish(2)
    synced.members[1].stuck.add("commit")
    synced.until(lambda: synced.serving() == [2, 1])
    synced.restart_operator()
    synced.members[1].stuck.clear()
    synced.leave(synced.trainer)
    synced.run()
    assert synced.serving() == [2, 2]
    assert synced.status.current.digest == "d-a-2"


def test_members_that_do_not_agree_on_the_bytes_are_not_gone_forward_with(synced: Any) -> None:
    synced.publish(2)
    for member in synced.members:
        member.stuck.add("commit")
    synced.until(lambda: all(m.transfer.state is TransferState.STAGED for m in synced.members))
    for member in synced.members:
        member.stuck.clear()
        member.told = None
    synced.members[1].transfer = replace(synced.members[1].transfer, digest="other")
    synced.restart_operator()
    synced.leave(synced.trainer)
    synced.run()
    assert synced.serving() == [1, 1]


def test_a_failed_rollout_is_not_tried_again_by_the_next_leader(synced: Any) -> None:
    synced.publish(2, layout="L2")
    for member in synced.members:
        member.fails["check"] = FailureCode.MANIFEST_REFUSED
    synced.run()
    assert synced.status.rollout.outcome is Outcome.FAILED
    synced.restart_operator()
    epoch = synced.status.group.epoch
    synced.wait(600)
    assert synced.status.group.epoch == epoch
    assert synced.serving() == [1, 1]
    assert synced.reason(Condition.PROGRESSING) is Reason.MANIFEST_REFUSED


def test_status_lost_terms_and_epochs_go_on_from_what_agents_say(synced: Any) -> None:
    synced.publish(2)
    synced.run()
    epoch, term = synced.status.group.epoch, synced.status.term
    synced.status = Status()
    synced.restart_operator()
    synced.run()
    assert synced.status.term == term + 1
    assert synced.status.current.version == 2
    assert synced.serving() == [2, 2]
    synced.join("m2")
    synced.run()
    assert synced.status.group.epoch > epoch
    assert synced.serving() == [2, 2, 2]


def test_status_lost_in_a_rollout_the_version_of_most_is_current_and_nobody_is_withheld(make: Any) -> None:
    fleet = make(members=3)
    fleet.publish(1)
    fleet.run()
    fleet.publish(2)
    fleet.members[2].stuck.add("transfer")
    fleet.until(fleet.step_is("Transferring"))
    fleet.status = Status()
    fleet.restart_operator()
    fleet.members[2].stuck.clear()
    served = []
    fleet.hook = lambda *_: served.extend(member.serving.state for member in fleet.members)
    fleet.run()
    assert set(served) == {ServingState.SERVING}
    assert fleet.serving() == [2, 2, 2]
    assert fleet.status.previous.version == 1
