"""What fails ends within its deadline, without those who failed, and with a reason."""

from dataclasses import replace
from typing import Any

import pytest
from decided_fleet import V2, failed, hold, kill_child, transferring

from weightsync_contract.messages import Failure, Transfer, TransferState
from weightsync_contract.reasons import Condition, FailureCode, Outcome, Reason

# ---------------------------------------------------------------------------- joining


def test_a_silent_member_is_left_out_at_the_join_deadline(make: Any) -> None:
    fleet = make(members=4)
    fleet.members[2].stuck.add("join")
    fleet.publish(1)
    fleet.wait(59)
    assert fleet.serving() == [None] * 4
    fleet.wait(4)
    assert fleet.serving() == [1, 1, None, 1]
    assert "uid-m2" not in " ".join(fleet.status.group.members)
    assert fleet.status.rollout.outcome is Outcome.SUCCEEDED
    assert fleet.condition(Condition.MEMBERS_HEALTHY)[:2] == ("False", Reason.EXCLUDED)
    assert "m2: it did not join in time" in fleet.condition(Condition.MEMBERS_HEALTHY)[2]
    assert fleet.status.members.excluded == 1


def test_a_member_that_says_it_can_not_join_is_left_out_at_once(four: Any) -> None:
    four.members[1].restart_agent()
    four.members[1].fails["join"] = FailureCode.CHILD_FAILED
    four.publish(2)
    four.run()
    assert four.serving() == [2, None, 2, 2]
    four.wait(10)
    assert four.serving() == [2, 2, 2, 2]


def test_too_many_silent_members_fail_the_rollout_and_nobody_is_withheld(four: Any) -> None:
    for member in four.members[:2]:
        member.restart_agent()
        member.stuck.add("join")
    four.publish(2)
    four.wait(70)
    failed(four, Reason.JOIN_TIMEOUT)
    assert four.serving() == [1, 1, 1, 1]


def test_who_tells_of_a_join_timeout_is_not_blamed(four: Any) -> None:
    four.members[3].restart_agent()
    four.members[3].stuck.add("join")
    four.publish(2)
    four.until(four.step_is("Joining"))
    for _ in range(3):
        four.obey()
    epoch = four.status.group.epoch
    told = Failure(FailureCode.JOIN_TIMEOUT, "not all ranks joined in time", epoch)
    for member in four.members[:3]:
        member.transfer = Transfer(epoch=epoch, failure=told)
    four.wait(1)
    assert not four.memory.exclusions
    four.wait(3)
    assert [each.uid for each in four.memory.exclusions if each.active] == ["uid-m3"]
    assert four.serving() == [2, 2, 2, None]


def test_a_trainer_that_does_not_listen_is_tried_again_a_few_times(four: Any) -> None:
    four.trainer.restart_agent()
    four.trainer.stuck.add("join")
    four.publish(2)
    four.wait(400)
    failed(four, Reason.JOIN_TIMEOUT)
    assert "trainer" in four.condition(Condition.PROGRESSING)[2]
    assert not four.memory.exclusions


def test_a_trainer_that_listens_at_the_second_try_is_good_enough(four: Any) -> None:
    four.trainer.restart_agent()
    four.trainer.stuck.add("join")
    four.publish(2)
    four.wait(70)
    four.trainer.stuck.clear()
    four.wait(10)
    assert four.serving() == [2, 2, 2, 2]


# ---------------------------------------------------------------------------- checking


def test_a_refused_manifest_names_pod_and_tensor_and_moves_nothing(four: Any) -> None:
    message = "model.layers.7.weight: [8, 4], the engine has [8, 8]: publish the shape that it was built with"
    for member in four.members:
        member.fails["check"] = Failure(FailureCode.MANIFEST_REFUSED, message, 1, V2)
    seen = []
    four.hook = lambda world, plan: seen.append(four.memory.round and four.memory.round.step.value)
    four.publish(2, layout="L2")
    four.run()
    failed(four, Reason.MANIFEST_REFUSED)
    assert "model.layers.7.weight" in four.condition(Condition.PROGRESSING)[2]
    assert "m0" in four.condition(Condition.PROGRESSING)[2]
    assert "Transferring" not in seen
    assert four.serving() == [1, 1, 1, 1]


def test_one_that_refuses_is_not_asked_again_until_it_restarts_or_another_version_comes(four: Any) -> None:
    four.members[0].fails["check"] = FailureCode.MANIFEST_REFUSED
    four.publish(2, layout="L2")
    four.run()
    assert four.serving() == [None, 2, 2, 2]
    epoch = four.status.group.epoch
    four.wait(3600)
    assert four.status.group.epoch == epoch
    four.members[0].restart_engine("boot-2")
    four.run()
    assert four.serving() == [2, 2, 2, 2]


def test_one_that_refused_gets_the_next_version(four: Any) -> None:
    four.members[0].fails["check"] = FailureCode.MANIFEST_REFUSED
    four.publish(2, layout="L2")
    four.run()
    four.publish(3, layout="L1")
    four.run()
    assert four.serving() == [3, 3, 3, 3]


def test_an_engine_that_does_not_answer_the_check_is_left_out(four: Any) -> None:
    four.members[0].stuck.add("check")
    four.publish(2, layout="L2")
    four.wait(70)
    assert four.serving() == [None, 2, 2, 2]
    four.members[0].stuck.clear()
    four.wait(120)
    assert four.serving() == [2, 2, 2, 2]


# ---------------------------------------------------------------------------- transferring


def test_a_child_that_dies_means_a_new_epoch_without_it_and_then_a_catch_up(four: Any) -> None:
    transferring(four)
    epoch = four.status.group.epoch
    kill_child(four, four.members[2])
    four.run()
    assert four.serving() == [2, 2, None, 2]
    assert four.status.group.epoch == epoch + 1
    assert four.status.rollout.outcome is Outcome.SUCCEEDED
    assert len(four.events(Reason.EXCLUDED)) == 1
    four.wait(6)
    assert four.serving() == [2, 2, 2, 2]
    assert four.status.group.epoch == epoch + 2
    assert four.reason(Condition.MEMBERS_HEALTHY) is Reason.ALL_HEALTHY


def test_an_event_tells_of_the_epoch_that_begins_because_of_a_loss(four: Any) -> None:
    transferring(four)
    kill_child(four, four.members[2])
    four.run()
    assert len(four.events(Reason.GROUPING)) == 1


def test_a_new_epoch_after_a_loss_waits_for_nobody(four: Any) -> None:
    transferring(four)
    four.join("late", ranks=0)
    kill_child(four, four.members[2])
    now = four.now
    four.run()
    assert four.now == now
    assert four.serving()[:4] == [2, 2, None, 2]


def test_a_pod_killed_in_a_transfer_with_all_that_is_in_it(four: Any) -> None:
    transferring(four)
    gone = four.members[1]
    kill_child(four, gone)
    four.lose_session(gone)
    four.run()
    assert four.serving() == [2, 1, 2, 2]
    gone.restart_agent()
    gone.restart_engine("boot-2")
    four.resume_session(gone)
    four.run()
    assert four.serving() == [2, 2, 2, 2]


def cut_off_before_it_was_told(four: Any) -> Any:
    """A member in the group that never hears of the transfer that all others wait in."""
    hold(four, "transfer")
    four.publish(2)
    four.until(four.step_is("Transferring"))
    cut_off = four.members[3]
    assert cut_off.transfer.state is TransferState.JOINED
    four.lose_session(cut_off)
    return cut_off


def test_who_was_cut_off_before_it_was_told_to_receive_holds_up_nobody_for_long(four: Any) -> None:
    cut_off = cut_off_before_it_was_told(four)
    four.wait(4.9)
    assert not four.memory.exclusions
    hold(four, "transfer", held=False)
    four.members[0].stuck.add("transfer")
    four.wait(0.2)
    assert [each.uid for each in four.memory.exclusions if each.active] == ["uid-m3"]
    four.members[0].stuck.clear()
    four.run()
    assert four.serving() == [2, 2, 2, 1]
    four.resume_session(cut_off)
    four.wait(10)
    assert four.serving() == [2, 2, 2, 2]


def test_those_who_have_the_version_do_not_wait_for_one_that_the_trainer_can_not_reach(four: Any) -> None:
    cut_off = four.members[3]
    transferring(four)
    for each in four.members[:3]:
        each.transfer = replace(each.transfer, state=TransferState.STAGED, version=V2, digest="d-a-2")
    epoch = four.memory.epoch.number
    for each in (four.trainer, cut_off):
        # Each tells of the other, and neither finds the other again.
        lost = Failure(FailureCode.PEER_LOST, "lost a peer", epoch, V2)
        each.transfer = Transfer(epoch=epoch, failure=lost)
        each.stuck.add("join")
    four.wait(70)
    assert four.serving() == [2, 2, 2, None]
    assert four.status.rollout.outcome is Outcome.SUCCEEDED
    for each in (four.trainer, cut_off):
        each.stuck.clear()
    four.wait(70)
    assert four.serving() == [2, 2, 2, 2]


def test_who_is_back_in_time_is_told_then(four: Any) -> None:
    cut_off = cut_off_before_it_was_told(four)
    four.wait(4)
    four.resume_session(cut_off)
    hold(four, "transfer", held=False)
    four.wait(10)
    assert four.serving() == [2, 2, 2, 2]
    assert not four.memory.exclusions


def test_while_bytes_move_everybody_was_told(four: Any) -> None:
    cut_off_before_it_was_told(four)
    four.members[0].transfer = replace(four.members[0].transfer, bytes=100)
    four.wait(20)
    assert not four.memory.exclusions


def test_a_member_whose_session_and_child_are_gone_is_blamed_at_once(four: Any) -> None:
    transferring(four)
    silent = four.members[3]
    epoch = four.memory.epoch.number
    for agent in (four.trainer, *four.members[:3]):
        failure = Failure(FailureCode.PEER_LOST, "peer 4 is gone", epoch, V2)
        agent.transfer = Transfer(epoch=epoch, failure=failure)
    four.lose_session(silent)
    four.run()
    assert [each.uid for each in four.memory.exclusions if each.active] == ["uid-m3"]
    assert four.serving()[:3] == [2, 2, 2]


def test_a_frozen_member_is_blamed_once_the_others_tell_that_nothing_moves(four: Any) -> None:
    transferring(four)
    frozen, epoch = four.members[1], four.memory.epoch.number
    frozen.stuck.add("transfer")
    for agent in (four.trainer, four.members[0], four.members[2], four.members[3]):
        failure = Failure(FailureCode.NO_PROGRESS, "no byte moved for 10 s", epoch, V2)
        agent.transfer = Transfer(epoch=epoch, failure=failure)
    plan = four.decide()
    assert not four.memory.exclusions
    assert 0 < plan.requeue_after <= 2.1
    four.wait(3)
    assert [each.uid for each in four.memory.exclusions if each.active] == [frozen.uid]
    assert four.serving() == [2, 1, 2, 2] or four.serving() == [2, None, 2, 2]


def test_a_loss_that_nobody_is_to_blame_for_is_tried_again(four: Any) -> None:
    transferring(four)
    kill_child(four, None)
    four.wait(3)
    assert four.serving() == [2, 2, 2, 2]
    assert not four.memory.exclusions


def test_losses_that_nobody_is_to_blame_for_end_in_a_failure(four: Any) -> None:
    four.publish(2)
    four.members[0].stuck.add("transfer")
    for _ in range(3):
        four.until(lambda: all(m.transfer.state is TransferState.RECEIVING for m in four.members))
        kill_child(four, None)
        four.wait(3)
    four.run()
    failed(four, Reason.TRANSFER_FAILED)
    assert "3 epochs in a row" in four.condition(Condition.PROGRESSING)[2]


def test_the_trainers_child_dies_and_the_transfer_is_made_again(four: Any) -> None:
    transferring(four)
    kill_child(four, four.trainer)
    four.wait(3)
    assert four.serving() == [2, 2, 2, 2]
    assert not four.memory.exclusions


def test_an_agent_that_restarts_while_all_join_is_not_waited_for(four: Any) -> None:
    four.trainer.restart_agent()
    four.members[0].stuck.add("join")
    four.publish(2)
    four.until(four.step_is("Joining"))
    four.obey()
    assert four.members[2].transfer.state is TransferState.JOINING
    epoch = four.status.group.epoch
    four.members[2].restart_agent()
    four.members[0].stuck.clear()
    four.run()
    assert four.serving()[:2] == [2, 2]
    assert four.status.group.epoch > epoch, "another process is not the same rank"


def test_a_member_that_is_out_of_the_group_without_a_word_breaks_it_at_once(four: Any) -> None:
    transferring(four)
    four.members[2].stuck.add("transfer")
    four.members[2].transfer = Transfer(checked="L1")
    four.run()
    assert four.memory.exclusion("uid-m2").message == "m2: it is no longer in the group"
    assert four.serving() == [2, 2, None, 2]


def test_who_has_it_staged_is_done_with_the_epoch_whatever_happens_to_its_child(four: Any) -> None:
    transferring(four)
    epoch = four.memory.epoch.number
    failure = Failure(FailureCode.CHILD_FAILED, "killed", epoch, V2)
    four.members[2].transfer = Transfer(
        TransferState.STAGED, version=V2, digest="d-a-2", checked="L1", failure=failure
    )
    kill_child(four, four.trainer)
    four.run()
    assert four.serving() == [2, 2, 2, 2]
    assert not four.events(Reason.EXCLUDED)
    assert "uid-m2" not in " ".join(four.status.group.members)


def test_who_was_left_out_and_is_back_does_not_hold_up_those_who_have_it(four: Any) -> None:
    transferring(four)
    back = four.members[2]
    kill_child(four, back)
    others = [member for member in four.members if member is not back]
    while not all(member.transfer.state is TransferState.STAGED for member in others):
        four.decide()
        four.obey()
    back.restart_agent()
    four.decide()
    assert four.memory.round.step.value == "Committing"
    assert back.uid not in four.memory.round.committed
    four.run()
    assert four.serving() == [2, 2, 2, 2]


def test_a_transfer_that_takes_too_long_for_one(four: Any) -> None:
    four.members[3].stuck.add("transfer")
    four.publish(2)
    four.until(four.step_is("Transferring"))
    for _ in range(4):
        four.obey()
        four.decide()
    for member in four.members[:3]:
        member.transfer = replace(member.transfer, state=TransferState.STAGED, digest="d-a-2")
    four.wait(299)
    assert four.serving() == [1, 1, 1, 1]
    four.wait(4)
    assert four.serving()[:3] == [2, 2, 2]
    message = four.condition(Condition.MEMBERS_HEALTHY)[2]
    assert message.startswith("m3: it did not receive the version in time; tried again 5 s after that")


def test_a_transfer_that_takes_too_long_for_all(four: Any) -> None:
    four.members[3].stuck.add("transfer")
    four.publish(2)
    four.wait(310)
    failed(four, Reason.TRANSFER_TIMEOUT)
    assert four.serving() == [1, 1, 1, 1]


def test_all_that_tell_of_a_transfer_timeout_with_nobody_to_blame(four: Any) -> None:
    transferring(four)
    kill_child(four, None, FailureCode.TRANSFER_TIMEOUT)
    four.wait(3)
    failed(four, Reason.TRANSFER_TIMEOUT)


@pytest.mark.parametrize("told", [True, False])
def test_bytes_that_are_not_the_published_ones_are_never_committed(four: Any, told: bool) -> None:
    bad = four.members[1]
    if told:
        bad.fails["transfer"] = FailureCode.DIGEST_MISMATCH
    else:
        bad.corrupts = True
    committed = []
    four.hook = lambda world, plan: committed.append(plan.desired[bad.uid].commit)
    four.publish(2)
    four.run()
    assert four.serving() == [2, None, 2, 2]
    assert committed.count(V2) == 0
    assert four.memory.exclusion(bad.uid).reason is Reason.DIGEST_MISMATCH
    bad.corrupts = False
    four.wait(8)
    assert four.serving() == [2, 2, 2, 2]


def test_no_verification_commits_what_arrived(make: Any) -> None:
    fleet = make(spec={"verify": False})
    fleet.members[0].corrupts = True
    fleet.publish(1)
    fleet.run()
    assert fleet.serving() == [1, 1]
    assert fleet.members[0].told.verify is False


def test_digest_mismatch_everywhere_fails(four: Any) -> None:
    for member in four.members:
        member.fails["transfer"] = FailureCode.DIGEST_MISMATCH
    four.publish(2)
    four.run()
    failed(four, Reason.DIGEST_MISMATCH)
