"""What a step waits for is asked, its answer taken once, and its end is a reason."""

from dataclasses import replace
from typing import Any

from decided_fleet import canary, wave

from weightsync_contract.reasons import Condition, Outcome, Reason
from weightsync_operator.core.model import Check, HttpCheck, OnFailure, Pause, Verdict, Wave

CHECK = Check(http=HttpCheck("http://eval/ok"), interval=10.0, deadline=100.0)


def answer(fleet: Any, passed: bool, message: str = "HTTP 200") -> None:
    """Whatever is asked now is answered so."""
    probe = fleet.decide().probe
    assert probe is not None
    fleet.verdict = Verdict(probe.key, passed, message)
    fleet.run()


def test_a_check_that_passes_lets_the_next_step_begin(make: Any) -> None:
    fleet = canary(make, [wave("1", CHECK)])
    fleet.publish(2)
    fleet.run()
    assert fleet.serving() == [2, 1, 1, 1]
    assert fleet.reason(Condition.PROGRESSING) is Reason.CANARY_CHECKING
    assert fleet.plans[-1].probe.check == CHECK
    answer(fleet, True)
    assert fleet.serving() == [2, 2, 2, 2]
    assert fleet.plans[-1].probe is None


def test_a_check_holds_the_rollout_and_says_why(make: Any) -> None:
    fleet = canary(make, [wave("1", CHECK)])
    fleet.publish(2)
    fleet.run()
    answer(fleet, False, "HTTP 503 from eval")
    fleet.wait(3)
    assert fleet.serving() == [2, 1, 1, 1]
    status, reason, message = fleet.condition(Condition.PROGRESSING)
    assert (status, reason) == ("True", Reason.CANARY_CHECKING)
    assert "HTTP 503 from eval" in message
    assert "within 100 s, asked each 10 s" in message


def test_a_check_is_asked_each_interval_and_each_time_once(make: Any) -> None:
    fleet = canary(make, [wave("1", CHECK)])
    fleet.publish(2)
    fleet.run()
    first = fleet.decide().probe
    assert fleet.decide().probe == first
    answer(fleet, False)
    assert fleet.decide().probe is None
    fleet.wait(9.9)
    assert fleet.decide().probe is None
    fleet.wait(0.2)
    second = fleet.decide().probe
    assert second is not None
    assert second.key != first.key


def test_an_answer_to_another_question_is_none(make: Any) -> None:
    fleet = canary(make, [wave("1", CHECK)])
    fleet.publish(2)
    fleet.run()
    key = fleet.decide().probe.key
    fleet.restart_operator()
    fleet.verdict = Verdict(key, True, "HTTP 200")
    fleet.run()
    assert fleet.serving() == [2, 1, 1, 1]


def test_a_check_that_does_not_pass_in_time_holds_until_somebody_decides(make: Any) -> None:
    fleet = canary(make, [wave("1", CHECK)])
    fleet.publish(2)
    fleet.run()
    answer(fleet, False, "0.4 is above 0.1")
    fleet.wait(10_000)
    assert fleet.serving() == [2, 1, 1, 1]
    status, reason, message = fleet.condition(Condition.PROGRESSING)
    assert (status, reason) == ("False", Reason.CHECK_FAILED)
    assert "0.4 is above 0.1" in message
    assert "promote@a/2" in message
    assert len(fleet.events(Reason.CHECK_FAILED)) == 1
    assert fleet.decide().probe is None
    fleet.action = "promote@a/2"
    fleet.run()
    assert fleet.serving() == [2, 2, 2, 2]


def test_a_check_that_nobody_answers_ends_at_its_deadline_too(make: Any) -> None:
    fleet = canary(make, [wave("1", CHECK)])
    fleet.publish(2)
    fleet.wait(90)
    assert fleet.reason(Condition.PROGRESSING) is Reason.CANARY_CHECKING
    fleet.wait(11)
    assert fleet.reason(Condition.PROGRESSING) is Reason.CHECK_FAILED
    assert "not answered" in fleet.condition(Condition.PROGRESSING)[2]


def test_a_check_that_fails_rolls_back_by_itself_if_the_spec_says_so(make: Any) -> None:
    fleet = canary(make, [wave("2", CHECK)], on_failure=OnFailure.ROLLBACK)
    fleet.publish(2)
    fleet.run()
    answer(fleet, False, "0.4 is above 0.1")
    fleet.wait(200)
    assert fleet.serving() == [1, 1, 1, 1]
    assert fleet.status.rollout.outcome is Outcome.FAILED
    status, reason, message = fleet.condition(Condition.PROGRESSING)
    assert (status, reason) == ("False", Reason.CHECK_FAILED)
    assert "0.4 is above 0.1" in message
    assert fleet.condition(Condition.READY)[:2] == ("True", Reason.SYNCED)
    fleet.restart_operator()
    fleet.wait(1000)
    assert fleet.serving() == [1, 1, 1, 1]
    fleet.publish(3)
    fleet.run()
    assert fleet.serving() == [3, 3, 1, 1]


def test_a_check_begins_when_the_time_of_the_pause_is_over(make: Any) -> None:
    fleet = canary(make, [Wave("1", Pause(60.0), CHECK)])
    fleet.publish(2)
    fleet.wait(59)
    assert fleet.decide().probe is None
    fleet.wait(2)
    answer(fleet, True)
    assert fleet.serving() == [2, 2, 2, 2]


def test_a_check_and_a_promotion_must_both_come(make: Any) -> None:
    fleet = canary(make, [Wave("1", Pause(), CHECK)])
    fleet.publish(2)
    fleet.run()
    answer(fleet, True)
    assert fleet.serving() == [2, 1, 1, 1]
    assert "promote@a/2" in fleet.condition(Condition.PROGRESSING)[2]


def test_a_retried_check_is_asked_anew_as_the_spec_has_it_now(make: Any) -> None:
    fleet = canary(make, [wave("1", CHECK)])
    fleet.publish(2)
    fleet.wait(200)
    assert fleet.reason(Condition.PROGRESSING) is Reason.CHECK_FAILED
    other = replace(CHECK, http=HttpCheck("http://eval/right"))
    fleet.spec = replace(fleet.spec, waves=(wave("1", other),))
    fleet.generation += 1
    fleet.action = "retry@a/2"
    fleet.run()
    assert fleet.decide().probe.check == other
    answer(fleet, True)
    assert fleet.serving() == [2, 2, 2, 2]


def test_a_failing_check_is_not_written_each_time(make: Any) -> None:
    fleet = canary(make, [wave("1", replace(CHECK, interval=1.0, deadline=1000.0))])
    fleet.publish(2)
    fleet.run()
    fleet.writes.clear()
    for number in range(60):
        answer(fleet, False, f"0.{number} is above 0.1")
        fleet.wait(1.1)
    assert len(fleet.writes) <= 4
