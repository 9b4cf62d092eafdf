"""Rollouts in waves: only the step's members switch, and only time, a check or a promotion goes on."""

from dataclasses import replace
from typing import Any

import pytest
from decided_fleet import canary, hold

from weightsync_contract.messages import ServingState, TransferState, VersionId
from weightsync_contract.reasons import Condition, FailureCode, Outcome, Reason
from weightsync_operator.core.model import OnFailure, Pause, Status, Wave

V1, V2 = VersionId("a", 1), VersionId("a", 2)


def told(fleet: Any) -> list[str]:
    return sorted(m.name for m in fleet.members if m.told and m.told.commit == V2)


# ---------------------------------------------------------------------------- whom a wave is of


@pytest.mark.parametrize(
    ("members", "expected"),
    [("1", [2, 1, 1, 1]), ("50%", [2, 2, 1, 1]), ("60%", [2, 2, 2, 1]), ("9", [2] * 4)],
)
def test_only_the_members_of_the_step_switch_and_the_others_serve_on(
    make: Any, members: str, expected: list[int]
) -> None:
    fleet = canary(make, [Wave(members, Pause())])
    states = []
    fleet.hook = lambda *_: states.extend(member.serving.state for member in fleet.members)
    fleet.publish(2)
    fleet.wait(100_000)
    assert fleet.serving() == expected
    assert set(states) == {ServingState.SERVING}
    assert fleet.status.current.version == 1
    assert fleet.status.rollout.outcome is Outcome.IN_PROGRESS
    assert fleet.status.rollout.step_index == 0


def test_waves_without_pauses_follow_each_other_and_none_is_ever_larger_than_it_may_be(make: Any) -> None:
    fleet = canary(make, [Wave("1"), Wave("50%")])
    seen: list[tuple[int | None, int]] = []

    def look(world: Any, plan: Any) -> None:
        count = sum(each.commit == V2 or m.serving.version == V2 for m, each in rows(fleet, plan))
        seen.append((plan.status.rollout.step_index, count))

    fleet.hook = look
    fleet.publish(2)
    fleet.run()
    assert fleet.serving() == [2, 2, 2, 2]
    assert fleet.status.rollout.outcome is Outcome.SUCCEEDED
    assert fleet.status.current.version == 2
    assert {count for step, count in seen if step == 0} == {1}
    assert {count for step, count in seen if step == 1} == {2}
    assert max(count for step, count in seen if step == 2) == 4


def rows(fleet: Any, plan: Any) -> list[tuple[Any, Any]]:
    return [(m, plan.desired[m.uid]) for m in fleet.members if m.uid in plan.desired]


def test_all_bytes_come_once_and_the_others_keep_them_staged(make: Any) -> None:
    fleet = canary(make, [Wave("1", Pause())])
    fleet.publish(2)
    fleet.run()
    epoch = fleet.status.group.epoch
    assert [m.transfer.state for m in fleet.members[1:]] == [TransferState.STAGED] * 3
    fleet.action = "promote@a/2"
    fleet.run()
    assert fleet.serving() == [2, 2, 2, 2]
    assert fleet.status.group.epoch == epoch


def test_the_first_version_goes_to_all_at_once(make: Any) -> None:
    """There is nothing to compare a canary with, and the others would answer nothing."""
    fleet = make(members=4, spec={"waves": (Wave("1", Pause()),)})
    fleet.publish(1)
    fleet.run()
    assert fleet.serving() == [1, 1, 1, 1]


def test_the_percentage_is_of_those_who_are_there_at_the_step(make: Any) -> None:
    fleet = canary(make, [Wave("1", Pause()), Wave("50%", Pause())])
    fleet.publish(2)
    fleet.run()
    for number in range(4, 8):
        fleet.join(f"m{number}")
    fleet.run()
    assert fleet.serving() == [2, 1, 1, 1, 1, 1, 1, 1]
    fleet.action = "promote@a/2"
    fleet.run()
    assert fleet.serving().count(2) == 4


# ---------------------------------------------------------------------------- pauses


def test_a_pause_ends_with_its_time_and_says_when(make: Any) -> None:
    fleet = canary(make, [Wave("1", Pause(600.0))])
    fleet.publish(2)
    fleet.run()
    since = fleet.now
    status, reason, message = fleet.condition(Condition.PROGRESSING)
    assert (status, reason) == ("True", Reason.CANARY_PAUSED)
    assert "1 of 4 members, step 1 of 1" in message
    assert f"600 s have passed since 2026-11-24T09:00:00Z+{since}" in message
    assert fleet.status.rollout.pause_time.endswith(f"+{since}")
    fleet.wait(598)
    assert fleet.serving() == [2, 1, 1, 1]
    fleet.wait(3)
    assert fleet.serving() == [2, 2, 2, 2]
    assert fleet.status.rollout.pause_time == ""


def test_a_pause_without_a_time_ends_by_a_promotion_only_and_says_how(make: Any) -> None:
    fleet = canary(make, [Wave("1", Pause())])
    fleet.publish(2)
    fleet.wait(1_000_000)
    status, reason, message = fleet.condition(Condition.PROGRESSING)
    assert (status, reason) == ("False", Reason.CANARY_PAUSED)
    assert "weightsync.dev/action=promote@a/2" in message
    assert fleet.condition(Condition.READY)[:2] == ("True", Reason.ROLLING_OUT)
    assert len(fleet.events(Reason.CANARY_PAUSED)) == 1


def test_the_time_of_a_pause_is_none_of_the_time_to_make_progress(make: Any) -> None:
    fleet = canary(make, [Wave("1", Pause(5000.0))])
    fleet.publish(2)
    fleet.wait(5010)
    assert fleet.serving() == [2, 2, 2, 2]
    assert fleet.status.rollout.outcome is Outcome.SUCCEEDED


def test_spec_paused_holds_a_pause_that_is_over(make: Any) -> None:
    fleet = canary(make, [Wave("1", Pause(10.0))])
    fleet.publish(2)
    fleet.run()
    fleet.spec = replace(fleet.spec, paused=True)
    fleet.wait(10_000)
    assert fleet.serving() == [2, 1, 1, 1]
    assert fleet.reason(Condition.PROGRESSING) is Reason.PAUSED
    assert "spec.paused" in fleet.condition(Condition.PROGRESSING)[2]
    fleet.spec = replace(fleet.spec, paused=False)
    fleet.run()
    assert fleet.serving() == [2, 2, 2, 2]


def test_a_strategy_that_is_edited_counts_from_the_next_step_on(make: Any) -> None:
    fleet = canary(make, [Wave("1", Pause(600.0))])
    fleet.publish(2)
    fleet.run()
    fleet.spec = replace(fleet.spec, waves=(Wave("1"), Wave("3", Pause())))
    fleet.generation += 1
    fleet.wait(300)
    assert fleet.serving() == [2, 1, 1, 1]
    fleet.wait(400)
    assert fleet.serving() == [2, 2, 2, 1]


def test_next_version_during_a_pause_waits_for_its_end(make: Any) -> None:
    fleet = canary(make, [Wave("1", Pause())])
    fleet.publish(2)
    fleet.run()
    fleet.publish(3)
    fleet.wait(1000)
    assert fleet.serving() == [2, 1, 1, 1]
    assert "a/3 waits" in fleet.condition(Condition.PROGRESSING)[2]
    fleet.action = "promote@a/2"
    fleet.run()
    assert fleet.serving() == [3, 2, 2, 2]


def test_writes_of_a_rollout_in_waves_grow_with_its_steps_only(make: Any) -> None:
    for members in (4, 40):
        fleet = canary(make, [Wave("1", Pause(60.0)), Wave("50%", Pause(60.0))], members)
        fleet.writes.clear()
        fleet.publish(2)
        fleet.wait(1000)
        assert fleet.serving() == [2] * members
        assert len(fleet.writes) <= 8, [w.rollout for w in fleet.writes]


# ---------------------------------------------------------------------------- late joiners and losses


def test_late_joiners_during_a_canary_get_the_current_version_at_once(make: Any) -> None:
    fleet = canary(make, [Wave("1", Pause())])
    fleet.publish(2)
    fleet.run()
    late = fleet.join("m4")
    asked = []
    fleet.hook = lambda world, plan: asked.append(plan.desired[late.uid].commit)
    fleet.run()
    assert fleet.serving() == [2, 1, 1, 1, 1]
    assert V2 not in asked
    fleet.action = "promote@a/2"
    fleet.hook = None
    fleet.run()
    assert fleet.serving() == [2, 2, 2, 2, 2]


def test_an_engine_that_restarts_during_a_canary_gets_the_current_version(make: Any) -> None:
    fleet = canary(make, [Wave("1", Pause())])
    fleet.publish(2)
    fleet.run()
    fleet.members[2].restart_engine("boot-2")
    fleet.run()
    assert fleet.serving() == [2, 1, 1, 1]
    assert fleet.status.rollout.outcome is Outcome.IN_PROGRESS
    fleet.action = "promote@a/2"
    fleet.run()
    assert fleet.serving() == [2, 2, 2, 2]


def test_who_serves_nothing_gets_the_current_version_before_a_canary_begins(make: Any) -> None:
    fleet = canary(make, [Wave("1", Pause())])
    late = fleet.join("m4")
    fleet.publish(2)
    fleet.run()
    assert late.serving.version == V1
    assert fleet.serving() == [2, 1, 1, 1, 1]


def test_a_canary_whose_engine_dies_of_the_version_stops_it_before_it_takes_the_fleet(make: Any) -> None:
    fleet = canary(make, [Wave("1", Pause(60.0))])
    fleet.publish(2)
    fleet.run()
    fleet.members[0].restart_engine("boot-2")
    fleet.wait(10_000)
    assert fleet.serving() == [1, 1, 1, 1]
    assert fleet.status.rollout.outcome is Outcome.FAILED
    assert fleet.reason(Condition.PROGRESSING) is Reason.CANARY_LOST
    assert "m0" in fleet.condition(Condition.PROGRESSING)[2]


def test_one_of_several_canaries_that_restarts_is_told_of_and_may_be_spared(make: Any) -> None:
    fleet = canary(make, [Wave("50%", Pause(60.0))])
    fleet.publish(2)
    fleet.run()
    fleet.members[0].restart_engine("boot-2")
    fleet.wait(3)
    assert fleet.serving() == [1, 2, 1, 1]
    assert "m0 served it and restarted" in fleet.condition(Condition.PROGRESSING)[2]
    assert len(fleet.events(Reason.CANARY_LOST)) == 1
    fleet.wait(100)
    assert fleet.serving() == [2, 2, 2, 2]


@pytest.mark.parametrize("how", ["restarted", "not back yet"])
def test_nobody_takes_the_place_of_a_canary_that_was_lost(make: Any, how: str) -> None:
    """Else a version of which engines die would go from one member to the next, one promotion after the other."""
    fleet = canary(make, [Wave("2", Pause()), Wave("2", Pause())])
    fleet.publish(2)
    fleet.run()
    if how == "restarted":
        fleet.members[0].restart_engine("boot-2")
    else:
        serving = replace(fleet.members[0].serving, state=ServingState.UNREACHABLE)
        fleet.members[0].serving = serving
    asked = []
    fleet.hook = lambda world, plan: asked.extend(plan.desired[m.uid].commit for m in fleet.members[2:])
    fleet.action = "promote@a/2"
    fleet.wait(100)
    assert V2 not in asked


def test_too_many_lost_in_a_wave_fail_the_rollout_and_the_rest_is_never_touched(make: Any) -> None:
    fleet = canary(make, [Wave("3", Pause(60.0))], members=8)
    for member in fleet.members[:3]:
        member.fails["commit"] = FailureCode.APPLY_FAILED
    fleet.publish(2)
    fleet.wait(5000)
    assert fleet.status.rollout.outcome is Outcome.FAILED
    assert fleet.status.rollout.step_index == 0
    assert fleet.serving() == [1] * 8


def test_a_wave_of_which_nobody_switches_fails_though_it_could_be_spared(make: Any) -> None:
    fleet = canary(make, [Wave("1", Pause(60.0))], members=8)
    fleet.members[0].fails["commit"] = FailureCode.APPLY_FAILED
    fleet.publish(2)
    fleet.wait(5000)
    assert fleet.status.rollout.outcome is Outcome.FAILED
    assert fleet.serving() == [1] * 8


def test_a_later_wave_of_which_nobody_switches_fails_too_though_the_first_one_serves(make: Any) -> None:
    fleet = canary(make, [Wave("1"), Wave("2", Pause(60.0))], members=8)
    fleet.members[1].fails["commit"] = FailureCode.APPLY_FAILED
    fleet.publish(2)
    fleet.wait(5000)
    assert fleet.status.rollout.outcome is Outcome.FAILED
    assert fleet.serving() == [2, *[1] * 7]


def test_a_failed_canary_stays_as_it_is_unless_the_spec_says_rollback(make: Any) -> None:
    for on_failure, expected in ((OnFailure.HOLD, 2), (OnFailure.ROLLBACK, 1)):
        fleet = canary(make, [Wave("50%", Pause(60.0))], members=4, on_failure=on_failure)
        fleet.publish(2)
        fleet.run()
        for member in fleet.members[2:]:
            member.fails["commit"] = FailureCode.APPLY_FAILED
        fleet.wait(500)
        assert fleet.status.rollout.outcome is Outcome.FAILED
        assert fleet.serving() == [expected, expected, 1, 1]
        if on_failure is OnFailure.ROLLBACK:
            assert fleet.condition(Condition.READY)[:2] == ("True", Reason.SYNCED)
            assert fleet.memory.allowed == (V1,)


def test_all_members_of_a_paused_rollout_leave(make: Any) -> None:
    fleet = canary(make, [Wave("1", Pause())])
    fleet.publish(2)
    fleet.run()
    for member in fleet.members:
        fleet.leave(member)
    fleet.run()
    assert fleet.memory.parked is None
    assert fleet.status.rollout.outcome is Outcome.ABORTED


# ---------------------------------------------------------------------------- the operator is replaced


@pytest.mark.parametrize("promoted", [0, 1])
def test_a_restarted_operator_pauses_again_where_it_stood(make: Any, promoted: int) -> None:
    fleet = canary(make, [Wave("1", Pause()), Wave("2", Pause())])
    fleet.publish(2)
    fleet.run()
    if promoted:
        fleet.action = "promote@a/2"
        fleet.run()
    before = fleet.serving()
    assert before == ([2, 2, 1, 1] if promoted else [2, 1, 1, 1])
    fleet.restart_operator()
    fleet.wait(10_000)
    assert fleet.serving() == before
    assert fleet.status.rollout.step_index == promoted
    assert fleet.reason(Condition.PROGRESSING) is Reason.CANARY_PAUSED
    assert fleet.events(Reason.EXCLUDED) == []


def test_a_restarted_operator_begins_the_time_of_a_pause_anew(make: Any) -> None:
    fleet = canary(make, [Wave("1", Pause(100.0))])
    fleet.publish(2)
    fleet.run()
    fleet.wait(90)
    fleet.restart_operator()
    fleet.wait(90)
    assert fleet.serving() == [2, 1, 1, 1]
    fleet.wait(20)
    assert fleet.serving() == [2, 2, 2, 2]


def test_operator_dies_in_a_wave_and_the_next_one_ends_that_wave_only(make: Any) -> None:
    fleet = canary(make, [Wave("1", Pause()), Wave("3", Pause())])
    fleet.publish(2)
    fleet.run()
    fleet.members[2].stuck.add("commit")
    fleet.action = "promote@a/2"
    fleet.until(lambda: fleet.serving() == [2, 2, 1, 1])
    fleet.restart_operator()
    fleet.members[2].stuck.clear()
    fleet.wait(1000)
    assert fleet.serving() == [2, 2, 2, 1]
    assert fleet.status.rollout.step_index == 1


def test_a_promotion_that_was_answered_is_not_lost_with_its_operator(make: Any) -> None:
    """The others have lost what they had staged: the promotion is there long before anybody commits."""
    fleet = canary(make, [Wave("1", Pause()), Wave("2", Pause())])
    fleet.publish(2)
    fleet.run()
    for member in fleet.members[1:]:
        member.restart_agent()
    hold(fleet, "join")
    fleet.action = "promote@a/2"
    fleet.decide()
    assert fleet.condition(Condition.ACTION_TAKEN)[0] == "True"
    fleet.restart_operator()
    hold(fleet, "join", False)
    fleet.wait(100)
    assert fleet.serving() == [2, 2, 1, 1]


def test_operator_dies_while_the_first_wave_is_transferred(make: Any) -> None:
    fleet = canary(make, [Wave("1", Pause())])
    hold(fleet, "transfer")
    fleet.publish(2)
    fleet.until(fleet.step_is("Transferring"))
    fleet.restart_operator()
    hold(fleet, "transfer", False)
    fleet.wait(1000)
    assert fleet.serving() == [2, 1, 1, 1]


@pytest.mark.parametrize("canaries", [1, 2, 3])
def test_status_lost_in_a_canary_promotes_nobody_however_many_serve_it(make: Any, canaries: int) -> None:
    fleet = canary(make, [Wave(str(canaries), Pause())])
    fleet.publish(2)
    fleet.run()
    before = fleet.serving()
    fleet.status = Status()
    fleet.restart_operator()
    fleet.wait(100_000)
    assert fleet.serving() == before
    assert fleet.status.current.version == 1
    assert fleet.reason(Condition.PROGRESSING) is Reason.CANARY_PAUSED


def test_status_lost_in_a_timed_pause_begins_the_pause_anew(make: Any) -> None:
    fleet = canary(make, [Wave("1", Pause(100.0))])
    fleet.publish(2)
    fleet.run()
    fleet.wait(90)
    fleet.status = Status()
    fleet.restart_operator()
    fleet.wait(90)
    assert fleet.serving() == [2, 1, 1, 1]
    fleet.wait(30)
    assert fleet.serving() == [2, 2, 2, 2]


@pytest.mark.parametrize("paused", [True, False])
def test_status_wiped_by_hand_is_put_back_by_the_leader_that_knows_it(make: Any, paused: bool) -> None:
    fleet = canary(make, [Wave("1", Pause())] if paused else [])
    fleet.publish(2)
    fleet.run()
    before = fleet.status
    assert before.group is not None
    fleet.status = Status()
    fleet.run()
    assert fleet.status == before
    assert fleet.serving() == ([2, 1, 1, 1] if paused else [2, 2, 2, 2])


def test_a_new_leader_waits_for_the_canary_to_come_back_and_takes_nobody_in_its_place(make: Any) -> None:
    fleet = canary(make, [Wave("1", Pause()), Wave("2", Pause())])
    fleet.publish(2)
    fleet.run()
    fleet.members[2].stuck.add("commit")
    fleet.members[1].stuck.add("commit")
    fleet.action = "promote@a/2"
    fleet.until(fleet.step_is("Committing"))
    fleet.status = replace(fleet.status, group=None)
    fleet.restart_operator()
    for member in fleet.members:
        member.stuck.clear()
        member.told = None
    fleet.members[0].reported = False
    fleet.wait(30)
    assert fleet.serving() == [2, 1, 1, 1]
    fleet.members[0].reported = True
    fleet.wait(30)
    assert fleet.serving() == [2, 2, 1, 1]


def test_a_new_leader_needs_no_copy_to_stay_paused(make: Any) -> None:
    """The trainer is gone: the canary goes on serving, and nobody is left out for it."""
    fleet = canary(make, [Wave("1", Pause())])
    fleet.publish(2)
    fleet.run()
    fleet.leave(fleet.trainer)
    fleet.restart_operator()
    fleet.wait(1000)
    assert fleet.serving() == [2, 1, 1, 1]
    assert fleet.status.rollout.outcome is Outcome.IN_PROGRESS
    assert fleet.memory.exclusions == ()
