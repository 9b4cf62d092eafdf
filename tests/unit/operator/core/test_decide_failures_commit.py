"""What goes wrong in a commit, and when somebody who failed is tried again."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from decided_fleet import V2, failed, transferring

from weightsync_contract.messages import Failure, Serving, ServingState, TransferState
from weightsync_contract.reasons import Condition, FailureCode, Outcome, Reason

# ---------------------------------------------------------------------------- committing


def committing(fleet: Any, *stuck: int) -> None:
    for number in stuck:
        fleet.members[number].stuck.add("commit")
    fleet.publish(2)
    fleet.until(fleet.step_is("Committing"))
    fleet.obey()


def test_a_member_that_does_not_switch_is_left_out_at_the_commit_deadline(four: Any) -> None:
    committing(four, 1)
    four.wait(59)
    assert four.status.current.version == 1
    four.wait(4)
    assert four.status.current.version == 2
    assert four.serving() == [2, None, 2, 2]
    assert four.reason(Condition.MEMBERS_HEALTHY) is Reason.EXCLUDED


def test_too_many_that_do_not_switch_fail_the_rollout_and_nobody_is_withheld(four: Any) -> None:
    committing(four, 1, 2)
    four.wait(70)
    failed(four, Reason.COMMIT_TIMEOUT)
    assert four.serving() == [2, 1, 1, 2]


def test_a_fenced_member_is_left_out_at_once_and_caught_up_with_its_new_boot(four: Any) -> None:
    committing(four, 2)
    fenced = four.members[2]
    failure = Failure(FailureCode.COMMIT_TIMEOUT, "rank 1 did not confirm", version=V2)
    fenced.serving = Serving(ServingState.FENCED, "boot-1", fences=1, failure=failure)
    fenced.stuck.clear()
    four.run()
    assert four.status.current.version == 2
    assert four.serving() == [2, 2, None, 2]
    assert four.condition(Condition.MEMBERS_HEALTHY)[:2] == ("False", Reason.FENCED)
    assert len(four.events(Reason.FENCED)) == 1
    fenced.restart_engine("boot-2")
    four.run()
    assert four.serving() == [2, 2, 2, 2]


def test_a_second_engine_that_crashes_on_a_version_rejects_it(make: Any) -> None:
    fleet = make(members=4, spec={"max_unavailable": "100%"})
    fleet.publish(1)
    fleet.run()
    committing(fleet, 0, 1)
    failure = Failure(FailureCode.ENGINE_RESTARTED, "the engine restarted while it applied a/2", version=V2)
    for member in fleet.members[:2]:
        member.serving = Serving(ServingState.INITIAL, "boot-2", failure=failure)
    fleet.run()
    assert fleet.status.rollout.outcome is Outcome.FAILED
    assert fleet.reason(Condition.PROGRESSING) is Reason.ENGINE_REJECTED


def test_a_clean_refusal_of_the_engine_leaves_the_old_version_until_the_rollout_ends(
    four: Any,
) -> None:
    four.members[0].fails["commit"] = FailureCode.APPLY_FAILED
    four.publish(2)
    four.run()
    assert four.serving() == [None, 2, 2, 2]
    assert four.members[0].serving.state is ServingState.WITHHELD
    epoch = four.status.group.epoch
    four.wait(3600)
    assert four.status.group.epoch == epoch


def test_a_failure_of_an_earlier_commit_is_none_of_this_one(four: Any) -> None:
    """An agent tells its last failure until the next thing is tried, which a new boot does not."""
    member = four.members[1]
    failure = Failure(FailureCode.ENGINE_RESTARTED, "the engine restarted while it applied a/2", version=V2)
    committing(four, 1)
    member.serving = Serving(ServingState.INITIAL, "boot-2", failure=failure)
    member.boot = "boot-2"
    four.run()
    assert four.status.current.version == 2
    assert four.memory.excluded(member.uid)
    member.stuck.clear()
    four.wait(8)
    assert four.serving() == [2, 2, 2, 2]


def test_an_engine_that_dies_in_a_transfer_disturbs_nobody_and_switches_when_it_is_back(four: Any) -> None:
    transferring(four)
    member, epoch = four.members[1], four.status.group.epoch
    member.serving = replace(member.serving, state=ServingState.UNREACHABLE)
    member.stuck.add("commit")
    four.run()
    assert four.status.group.epoch == epoch
    assert four.status.current.version == 1
    four.wait(6)
    assert four.status.current.version == 2
    assert four.serving() == [2, None, 2, 2]
    assert member.transfer.state is TransferState.STAGED
    assert member.told.wanted.version == V2
    member.restart_engine("boot-2")
    member.stuck.clear()
    four.run()
    assert four.serving() == [2, 2, 2, 2]
    assert four.status.group.epoch == epoch


def test_what_was_staged_is_lost_with_the_agent(four: Any) -> None:
    committing(four, 3)
    four.members[3].restart_agent()
    four.members[3].stuck.clear()
    four.run()
    assert four.status.current.version == 2
    four.wait(6)
    assert four.serving() == [2, 2, 2, 2]


def test_a_session_lost_in_a_commit_is_waited_for_until_the_deadline(four: Any) -> None:
    four.publish(2)
    for member in four.members:
        member.stuck.add("commit")
    four.until(four.step_is("Committing"))
    away = four.members[1]
    four.lose_session(away)
    for member in four.members:
        member.stuck.clear()
    four.wait(30)
    assert four.status.current.version == 1
    four.resume_session(away)
    four.run()
    assert four.serving() == [2, 2, 2, 2]
    assert not four.events(Reason.EXCLUDED)


# ---------------------------------------------------------------------------- again


def test_a_failed_version_is_not_tried_again(four: Any) -> None:
    for member in four.members:
        member.fails["transfer"] = FailureCode.DIGEST_MISMATCH
    four.publish(2)
    four.run()
    epoch = four.status.group.epoch
    four.wait(7200)
    assert four.status.group.epoch == epoch
    assert four.serving() == [1, 1, 1, 1]


def test_who_was_left_out_of_a_failed_version_counts_anew_for_the_next_one(make: Any) -> None:
    fleet = make(members=4, spec={"max_unavailable": "0"})
    fleet.members[2].fails["transfer"] = FailureCode.CHILD_FAILED
    fleet.publish(1)
    fleet.run()
    assert fleet.status.rollout.outcome is Outcome.FAILED
    fleet.wait(10)
    fleet.publish(2)
    fleet.run()
    assert fleet.serving() == [2, 2, 2, 2]


@pytest.mark.parametrize("change", ["version", "spec", "member comes", "member leaves"])
def test_what_makes_a_failed_version_worth_another_try(four: Any, change: str) -> None:
    for member in four.members:
        member.fails["transfer"] = FailureCode.DIGEST_MISMATCH
    four.publish(2)
    four.run()
    expected = 2
    match change:
        case "version":
            four.publish(3)
            expected = 3
        case "spec":
            four.generation += 1
        case "member comes":
            four.join("m9")
        case "member leaves":
            four.leave(four.members[0])
    four.wait(70)
    assert set(four.serving()) == {expected}


def test_backoff_grows_and_is_bounded(four: Any) -> None:
    bad = four.members[0]
    four.publish(2)
    bad.corrupts = True
    four.run()
    tries = {}
    four.hook = lambda world, plan: tries.setdefault(four.memory.exclusion(bad.uid).tries, four.now)
    four.wait(400)
    gaps = [round(later - earlier) for earlier, later in pairwise(tries.values())]
    assert gaps[:4] == sorted(gaps[:4])
    assert gaps[0] in (5, 6)
    assert max(gaps) in (60, 61)
    assert len(set(gaps[-2:])) == 1


def test_a_restarted_member_is_tried_at_once_but_not_for_ever(four: Any) -> None:
    bad = four.members[0]
    bad.corrupts = True
    four.publish(2)
    four.run()
    for number in range(6):
        bad.restart_engine(f"boot-{number + 2}")
        four.run()
    assert four.memory.exclusion(bad.uid).tries == 3


def test_the_only_member_is_tried_again_until_the_time_of_the_rollout_is_over(make: Any) -> None:
    fleet = make(members=1)
    fleet.publish(1)
    fleet.run()
    fleet.members[0].corrupts = True
    fleet.publish(2)
    fleet.wait(300)
    assert fleet.memory.round is not None
    assert fleet.memory.exclusion("uid-m0").tries > 3
    assert fleet.serving() == [1]
    fleet.wait(700)
    failed(fleet, Reason.DIGEST_MISMATCH)
    assert "progressSeconds" in fleet.condition(Condition.PROGRESSING)[2]


def test_the_only_member_recovers_within_the_rollout(make: Any) -> None:
    fleet = make(members=1)
    fleet.publish(1)
    fleet.run()
    fleet.members[0].fails["transfer"] = FailureCode.CHILD_FAILED
    fleet.publish(2)
    fleet.wait(8)
    assert fleet.serving() == [2]


@pytest.mark.parametrize(
    ("allowed", "lost", "ok"), [("0", 1, False), ("1", 1, True), ("1", 2, False), ("50%", 2, True)]
)
def test_max_unavailable(make: Any, allowed: str, lost: int, ok: bool) -> None:
    fleet = make(members=4, spec={"max_unavailable": allowed})
    fleet.publish(1)
    fleet.run()
    for member in fleet.members[:lost]:
        member.corrupts = True
    fleet.publish(2)
    fleet.run()
    outcome = fleet.status.rollout.outcome
    assert outcome is (Outcome.SUCCEEDED if ok else Outcome.FAILED)
    assert fleet.serving() == ([None] * lost + [2] * (4 - lost) if ok else [1] * 4)
