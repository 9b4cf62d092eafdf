"""``weightsync.dev/action``: done once, answered in a condition, and refused with a reason when it is stale."""

from dataclasses import replace
from typing import Any

import pytest
from decided_fleet import V2, canary, hold

from weightsync_contract.messages import ServingState, VersionId
from weightsync_contract.reasons import Condition, FailureCode, Outcome, Reason
from weightsync_operator.core.actions import parse
from weightsync_operator.core.model import OnFailure, Pause, Pin, Status, Wave

V1 = VersionId("a", 1)


def say(fleet: Any, action: str) -> tuple[str, Reason, str]:
    """Annotate, and read the answer."""
    fleet.action = action
    fleet.run()
    answer: tuple[str, Reason, str] = fleet.condition(Condition.ACTION_TAKEN)
    assert answer[2].startswith(f"{action}: ")
    return answer


@pytest.fixture
def paused(make: Any) -> Any:
    """Version 2 is a canary on one of four members."""
    fleet = canary(make, [Wave("1", Pause()), Wave("2", Pause())])
    fleet.publish(2)
    fleet.run()
    assert fleet.serving() == [2, 1, 1, 1]
    return fleet


def rolled_to(make: Any, version: int, **spec: Any) -> Any:
    fleet = make(members=4, spec={"retained_versions": 5, **spec})
    for number in range(1, version + 1):
        fleet.publish(number)
        fleet.run()
    assert fleet.serving() == [version] * 4
    return fleet


# ---------------------------------------------------------------------------- form


@pytest.mark.parametrize(
    "text",
    ["promote", "promote@", "promote@a", "promote@a/x", "Promote@a/2", "pause@a/2", "abort@a b/2", "@a/2"],
)
def test_what_has_another_form_is_refused_with_the_form(paused: Any, text: str) -> None:
    before = paused.serving()
    status, reason, message = say(paused, text)
    assert (status, reason) == ("False", Reason.INVALID)
    assert "promote@run-1/42" in message
    assert paused.serving() == before


def test_the_form() -> None:
    parsed = parse("rollback@run.1-x/42#again")
    assert parsed is not None
    assert (parsed.verb, parsed.version) == ("rollback", VersionId("run.1-x", 42))


def test_a_long_annotation_is_cut_in_the_answer_and_answered_once(paused: Any) -> None:
    paused.action = "x: y" * 1000
    paused.run()
    paused.restart_operator()
    paused.run()
    assert len(paused.events(Reason.INVALID)) == 1
    assert len(paused.events(Reason.INVALID)[0]) < 400


# ---------------------------------------------------------------------------- once


def test_an_annotation_that_stays_is_done_once(paused: Any) -> None:
    assert say(paused, "promote@a/2")[:2] == ("True", Reason.ACCEPTED)
    paused.wait(10_000)
    assert paused.serving() == [2, 2, 1, 1]
    assert len(paused.events(Reason.ACCEPTED)) == 1


def test_an_annotation_that_stays_is_not_done_again_by_the_next_leader(paused: Any) -> None:
    say(paused, "promote@a/2")
    for _ in range(3):
        paused.restart_operator()
        paused.wait(1000)
    assert paused.serving() == [2, 2, 1, 1]
    assert len(paused.events(Reason.ACCEPTED)) == 1


@pytest.mark.parametrize("again", ["promote@a/2#2", "promote@a/2"])
def test_to_say_the_same_again_it_is_marked_or_removed_first(paused: Any, again: str) -> None:
    say(paused, "promote@a/2")
    if again == "promote@a/2":
        paused.action = ""
        paused.run()
        assert not any(row.type == Condition.ACTION_TAKEN for row in paused.status.conditions)
    say(paused, again)
    assert paused.serving() == [2, 2, 2, 2]


def test_two_words_that_are_refused_alike_are_both_answered_however_soon(make: Any) -> None:
    fleet = rolled_to(make, 2)
    for number in range(5):
        assert say(fleet, f"promote@a/2#{number}")[:2] == ("False", Reason.STALE)


def test_a_status_that_is_lost_does_nothing_again(make: Any) -> None:
    """An old annotation, and nobody knows any more that it was answered."""
    fleet = rolled_to(make, 2)
    say(fleet, "rollback@a/1")
    fleet.publish(3)
    fleet.run()
    assert fleet.serving() == [3] * 4
    fleet.status = Status()
    fleet.restart_operator()
    fleet.wait(100)
    assert fleet.serving() == [3] * 4
    assert fleet.condition(Condition.ACTION_TAKEN)[:2] == ("False", Reason.STALE)


def test_what_is_answered_is_written_with_what_it_changes(paused: Any) -> None:
    """Else a leader that dies in between promotes twice."""
    paused.action = "promote@a/2"
    seen = []
    paused.hook = lambda world, plan: seen.append(
        (
            plan.status.rollout.step_index,
            any(r.type == Condition.ACTION_TAKEN for r in plan.status.conditions),
        )
    )
    paused.run()
    assert set(seen) == {(1, True)}


def test_a_leader_that_has_just_begun_waits_for_the_agents_before_it_answers(paused: Any) -> None:
    paused.restart_operator()
    for member in paused.members:
        member.reported = False
    paused.status = replace(paused.status, group=None)
    paused.action = "abort@a/2"
    paused.run()
    assert not any(row.type == Condition.ACTION_TAKEN for row in paused.status.conditions)
    for member in paused.members:
        member.reported = True
    paused.run()
    assert paused.condition(Condition.ACTION_TAKEN)[:2] == ("True", Reason.ACCEPTED)
    assert paused.serving() == [1, 1, 1, 1]


# ---------------------------------------------------------------------------- promote


@pytest.mark.parametrize("version", ["a/1", "a/3", "b/2"])
def test_a_promotion_of_another_version_is_stale(paused: Any, version: str) -> None:
    status, reason, message = say(paused, f"promote@{version}")
    assert (status, reason) == ("False", Reason.STALE)
    assert "a/2 is being rolled out" in message
    assert paused.serving() == [2, 1, 1, 1]


def test_a_promotion_before_the_pause_is_refused(make: Any) -> None:
    fleet = canary(make, [Wave("1", Pause())])
    hold(fleet, "transfer")
    fleet.publish(2)
    fleet.until(fleet.step_is("Transferring"))
    fleet.action = "promote@a/2"
    fleet.decide()
    assert fleet.condition(Condition.ACTION_TAKEN)[:2] == ("False", Reason.NOT_PAUSED)
    hold(fleet, "transfer", False)
    fleet.wait(1000)
    assert fleet.serving() == [2, 1, 1, 1]


def test_a_promotion_with_no_rollout_is_stale(make: Any) -> None:
    fleet = rolled_to(make, 2)
    assert say(fleet, "promote@a/2")[1] is Reason.STALE


# ---------------------------------------------------------------------------- abort


def test_abort_takes_the_canary_back_and_the_version_is_not_brought_again(paused: Any) -> None:
    status, reason, message = say(paused, "abort@a/2")
    assert (status, reason) == ("True", Reason.ACCEPTED)
    assert "m0 go back to a/1" in message
    assert paused.serving() == [1, 1, 1, 1]
    assert paused.status.rollout.outcome is Outcome.ABORTED
    assert paused.status.current.version == 1
    assert paused.memory.allowed == (V1,)
    paused.restart_operator()
    paused.join("m4")
    paused.generation += 1
    paused.wait(10_000)
    assert paused.serving() == [1] * 5
    status, reason, message = paused.condition(Condition.PROGRESSING)
    assert (status, reason) == ("False", Reason.ABORTED)
    assert "retry@a/2" in message
    assert paused.condition(Condition.READY)[:2] == ("True", Reason.SYNCED)


def test_after_an_abort_the_next_version_is_brought(paused: Any) -> None:
    say(paused, "abort@a/2")
    paused.publish(3)
    paused.run()
    assert paused.serving() == [3, 1, 1, 1]


def test_abort_in_a_transfer_leaves_all_on_what_they_serve(make: Any) -> None:
    fleet = rolled_to(make, 1)
    hold(fleet, "transfer")
    fleet.publish(2)
    fleet.until(fleet.step_is("Transferring"))
    fleet.action = "abort@a/2"
    fleet.decide()
    hold(fleet, "transfer", False)
    fleet.wait(1000)
    assert fleet.serving() == [1] * 4
    assert fleet.status.rollout.outcome is Outcome.ABORTED
    assert fleet.memory.allowed == (V1,)


def test_abort_in_a_commit_takes_back_who_has_switched(make: Any) -> None:
    fleet = rolled_to(make, 1)
    for member in fleet.members[1:]:
        member.stuck.add("commit")
    fleet.publish(2)
    fleet.until(lambda: fleet.serving() == [2, 1, 1, 1])
    fleet.action = "abort@a/2"
    states = []
    fleet.hook = lambda *_: states.extend(member.serving.state for member in fleet.members)
    fleet.decide()
    hold(fleet, "", False)
    fleet.wait(1000)
    assert fleet.serving() == [1] * 4
    assert set(states) == {ServingState.SERVING}, "nobody is withheld on the way back"


def test_abort_of_the_first_version_of_all_says_that_nothing_is_served(make: Any) -> None:
    fleet = make(members=2)
    hold(fleet, "transfer")
    fleet.publish(1)
    fleet.until(fleet.step_is("Transferring"))
    fleet.action = "abort@a/1"
    fleet.wait(1000)
    assert fleet.serving() == [None, None]
    assert fleet.condition(Condition.READY)[:2] == ("False", Reason.WAITING_FOR_FIRST_VERSION)
    assert "a/1 was given up" in fleet.condition(Condition.READY)[2]
    status, reason, message = fleet.condition(Condition.PROGRESSING)
    assert (status, reason) == ("False", Reason.ABORTED)
    assert "no version is brought until" in message


def test_publishers_are_told_that_their_version_was_aborted(paused: Any) -> None:
    say(paused, "abort@a/2")
    assert paused.trainer.told.fleet.rollout.outcome is Outcome.ABORTED
    assert paused.trainer.told.fleet.rollout.version == V2


def test_who_was_cut_off_at_the_abort_is_withheld_and_taken_back_when_it_returns(paused: Any) -> None:
    paused.lose_session(paused.members[0])
    say(paused, "abort@a/2")
    paused.wait(30)
    paused.resume_session(paused.members[0])
    paused.wait(30)
    assert paused.serving() == [1, 1, 1, 1]


@pytest.mark.parametrize("version", ["a/1", "a/3"])
def test_an_abort_of_another_version_is_stale(paused: Any, version: str) -> None:
    assert say(paused, f"abort@{version}")[1] is Reason.STALE
    assert paused.serving() == [2, 1, 1, 1]


def test_an_abort_of_what_the_spec_names_is_refused(make: Any) -> None:
    fleet = canary(make, [Wave("1", Pause())])
    fleet.spec = replace(fleet.spec, pin=Pin(2))
    fleet.publish(2)
    fleet.run()
    assert say(fleet, "abort@a/2")[1] is Reason.PINNED
    assert fleet.serving() == [2, 1, 1, 1]


def test_an_aborted_canary_without_a_copy_of_the_current_version_serves_on_and_it_is_said(
    paused: Any,
) -> None:
    source = paused.trainer.source
    paused.trainer.source = replace(source, versions=source.versions[-1:])
    say(paused, "abort@a/2")
    paused.wait(100)
    assert paused.serving() == [2, 1, 1, 1]
    status, reason, message = paused.condition(Condition.SOURCE_AVAILABLE)
    assert (status, reason) == ("False", Reason.VERSION_NOT_RETAINED)
    assert "m0" in message


# ---------------------------------------------------------------------------- retry


def test_retry_of_a_failed_version_tries_it_again_at_once(make: Any) -> None:
    fleet = rolled_to(make, 1)
    for member in fleet.members:
        member.fails["check"] = FailureCode.MANIFEST_REFUSED
    fleet.publish(2, layout="L2")
    fleet.run()
    assert fleet.status.rollout.outcome is Outcome.FAILED
    assert say(fleet, "retry@a/2")[:2] == ("True", Reason.ACCEPTED)
    assert fleet.serving() == [2] * 4


def test_retry_of_an_aborted_version_begins_at_the_first_step(paused: Any) -> None:
    say(paused, "promote@a/2")
    say(paused, "abort@a/2")
    assert say(paused, "retry@a/2")[0] == "True"
    assert paused.serving() == [2, 1, 1, 1]
    assert paused.status.rollout.step_index == 0


@pytest.mark.parametrize(
    ("version", "reason"), [("a/2", Reason.STALE), ("a/1", Reason.STALE), ("a/7", Reason.STALE)]
)
def test_a_retry_of_what_did_not_fail_is_stale(make: Any, version: str, reason: Reason) -> None:
    fleet = rolled_to(make, 2)
    assert say(fleet, f"retry@{version}")[1] is reason
    assert fleet.serving() == [2] * 4


def test_a_retry_of_what_a_newer_version_has_replaced_is_stale(paused: Any) -> None:
    say(paused, "abort@a/2")
    paused.publish(3)
    paused.run()
    assert say(paused, "retry@a/2")[1] is Reason.STALE


# ---------------------------------------------------------------------------- rollback


def test_rollback_takes_all_back_to_a_kept_version_at_once_and_it_stays(make: Any) -> None:
    fleet = rolled_to(make, 3, waves=(Wave("1"),))
    states = []
    fleet.hook = lambda *_: states.extend(member.serving.state for member in fleet.members)
    status, reason, message = say(fleet, "rollback@a/1")
    assert (status, reason) == ("True", Reason.ACCEPTED)
    assert "from a/3 to a/1" in message
    assert fleet.serving() == [1] * 4
    assert set(states) == {ServingState.SERVING}
    assert fleet.status.current.version == 1
    assert fleet.status.previous.version == 3
    fleet.restart_operator()
    fleet.generation += 1
    fleet.join("m4")
    fleet.wait(10_000)
    assert fleet.serving() == [1] * 5
    status, reason, message = fleet.condition(Condition.PROGRESSING)
    assert (status, reason) == ("False", Reason.ROLLED_BACK)
    assert "a/3" in message
    assert "retry@a/3" in message


def test_after_a_rollback_the_next_version_is_brought_and_what_was_given_up_can_be_retried(make: Any) -> None:
    fleet = rolled_to(make, 3)
    say(fleet, "rollback@a/1")
    assert say(fleet, "retry@a/3")[0] == "True"
    assert fleet.serving() == [3] * 4
    say(fleet, "rollback@a/1#2")
    fleet.publish(4)
    fleet.run()
    assert fleet.serving() == [4] * 4
    assert fleet.status.rejected == ()


def test_rollback_to_what_is_not_kept_is_refused_and_says_what_is(make: Any) -> None:
    fleet = rolled_to(make, 3)
    fleet.trainer.source = replace(fleet.trainer.source, versions=fleet.trainer.source.versions[1:])
    status, reason, message = say(fleet, "rollback@a/1")
    assert (status, reason) == ("False", Reason.VERSION_NOT_RETAINED)
    assert "it keeps a/2, a/3" in message
    assert fleet.serving() == [3] * 4


def test_rollback_with_the_trainer_gone_is_refused(make: Any) -> None:
    fleet = rolled_to(make, 3)
    fleet.leave(fleet.trainer)
    assert say(fleet, "rollback@a/1")[1] is Reason.VERSION_NOT_RETAINED


@pytest.mark.parametrize("version", ["a/3", "a/9"])
def test_rollback_to_the_current_or_a_later_version_is_stale(make: Any, version: str) -> None:
    fleet = rolled_to(make, 3)
    assert say(fleet, f"rollback@{version}")[1] is Reason.STALE
    assert fleet.serving() == [3] * 4


def test_rollback_while_the_spec_names_a_version_is_refused(make: Any) -> None:
    fleet = rolled_to(make, 3)
    fleet.spec = replace(fleet.spec, pin=Pin(3))
    assert say(fleet, "rollback@a/1")[1] is Reason.PINNED


def test_rollback_in_a_canary_ends_it(paused: Any) -> None:
    assert say(paused, "rollback@a/1")[0] == "True"
    assert paused.serving() == [1, 1, 1, 1]
    paused.wait(10_000)
    assert paused.serving() == [1, 1, 1, 1]


def test_rollback_to_the_version_before_the_current_one_in_a_canary(make: Any) -> None:
    fleet = rolled_to(make, 2)
    fleet.spec = replace(fleet.spec, waves=(Wave("1", Pause()),))
    fleet.publish(3)
    fleet.run()
    assert fleet.serving() == [3, 2, 2, 2]
    say(fleet, "rollback@a/1")
    assert fleet.serving() == [1] * 4


def test_rollback_to_another_run(make: Any) -> None:
    fleet = rolled_to(make, 2)
    fleet.publish(1, run="b")
    fleet.run()
    assert fleet.status.current.run == "b"
    say(fleet, "rollback@a/2")
    fleet.wait(1000)
    assert [member.serving.version for member in fleet.members] == [V2] * 4


@pytest.mark.parametrize("run", ["a", "b"])
def test_operator_dies_in_a_rollback_and_the_next_one_ends_it(make: Any, run: str) -> None:
    fleet = rolled_to(make, 2)
    fleet.publish(1 if run == "b" else 3, run=run)
    fleet.run()
    hold(fleet, "join")
    fleet.action = "rollback@a/2"
    fleet.decide()
    fleet.restart_operator()
    hold(fleet, "join", False)
    fleet.wait(1000)
    assert [member.serving.version for member in fleet.members] == [V2] * 4


def test_a_new_version_in_a_rollback_waits_for_its_end(make: Any) -> None:
    fleet = rolled_to(make, 3)
    hold(fleet, "join")
    fleet.action = "rollback@a/1"
    fleet.decide()
    fleet.publish(4)
    hold(fleet, "join", False)
    seen = []
    fleet.hook = lambda *_: seen.append(fleet.serving()[0])
    fleet.wait(10)
    assert 1 in seen
    assert fleet.serving() == [4] * 4


def test_an_aborted_rollback_leaves_the_fleet_on_what_it_was_to_leave(make: Any) -> None:
    fleet = rolled_to(make, 3)
    for member in fleet.members[1:]:
        member.stuck.add("commit")
    fleet.action = "rollback@a/1"
    fleet.until(lambda: fleet.serving() == [1, 3, 3, 3])
    fleet.action = "abort@a/1"
    fleet.decide()
    hold(fleet, "", False)
    fleet.wait(1000)
    assert fleet.serving() == [3] * 4


def test_nobody_is_taken_back_without_a_word(make: Any) -> None:
    """Members that are ahead of the current version because a rollout failed half way."""
    fleet = rolled_to(make, 1)
    for member in fleet.members[:2]:
        member.stuck.add("commit")
    fleet.publish(2)
    fleet.wait(200)
    assert fleet.serving() == [1, 1, 2, 2]
    hold(fleet, "", False)
    fleet.restart_operator()
    fleet.wait(10_000)
    assert fleet.serving()[2:] == [2, 2]
    say(fleet, "rollback@a/1")
    assert fleet.serving() == [1] * 4


def test_a_rollout_that_failed_half_way_is_taken_back_if_the_spec_says_so(make: Any) -> None:
    fleet = rolled_to(make, 1, on_failure=OnFailure.ROLLBACK)
    for member in fleet.members[:2]:
        member.stuck.add("commit")
    fleet.publish(2)
    fleet.wait(200)
    assert fleet.status.rollout.outcome is Outcome.FAILED
    assert fleet.serving() == [1] * 4
