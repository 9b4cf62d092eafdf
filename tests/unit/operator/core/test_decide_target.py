"""``spec.target``: a version that the spec names is what the fleet gets, forwards and back, if a copy is kept."""

from dataclasses import replace
from typing import Any

import pytest
from decided_fleet import canary, hold

from weightsync_contract.messages import VersionId
from weightsync_contract.reasons import Condition, Outcome, Reason
from weightsync_operator.core.model import Pause, Pin, Wave


@pytest.fixture
def three(make: Any) -> Any:
    """Four members that serve version 3; versions 1 to 3 are kept."""
    fleet = make(members=4, spec={"retained_versions": 5})
    for number in (1, 2, 3):
        fleet.publish(number)
        fleet.run()
    return fleet


def pin(fleet: Any, version: int | None, run: str = "") -> None:
    fleet.spec = replace(fleet.spec, pin=None if version is None else Pin(version, run))
    fleet.generation += 1


def test_a_pinned_fleet_takes_no_newer_version(three: Any) -> None:
    pin(three, 3)
    three.publish(4)
    three.wait(10_000)
    assert three.serving() == [3] * 4
    status, reason, message = three.condition(Condition.PROGRESSING)
    assert (status, reason) == ("True", Reason.COMPLETE)
    assert "spec.target names a/3; the newest is a/4" in message
    pin(three, None)
    three.run()
    assert three.serving() == [4] * 4


def test_a_pin_to_an_older_version_takes_the_fleet_back_and_keeps_it_there(three: Any) -> None:
    pin(three, 1)
    three.run()
    assert three.serving() == [1] * 4
    assert three.status.current.version == 1
    late = three.join("m4")
    three.restart_operator()
    three.wait(1000)
    assert three.serving() == [1] * 5
    assert late.serving.version == VersionId("a", 1)


def test_a_pin_to_a_newer_version_goes_in_waves_as_any_other(make: Any) -> None:
    fleet = canary(make, [Wave("1", Pause())])
    pin(fleet, 2)
    fleet.publish(2)
    fleet.publish(3)
    fleet.run()
    assert fleet.serving() == [2, 1, 1, 1]
    fleet.action = "promote@a/2"
    fleet.run()
    assert fleet.serving() == [2] * 4


@pytest.mark.parametrize("version", [1, 9])
def test_a_pinned_version_of_which_there_is_no_copy_is_said_and_nothing_moves(
    three: Any, version: int
) -> None:
    three.trainer.source = replace(three.trainer.source, versions=three.trainer.source.versions[1:])
    pin(three, version)
    three.wait(10_000)
    assert three.serving() == [3] * 4
    for type_ in (Condition.PROGRESSING, Condition.SOURCE_AVAILABLE):
        status, reason, message = three.condition(type_)
        assert (status, reason) == ("False", Reason.VERSION_NOT_RETAINED)
        assert f"a/{version}" in message
        assert "it keeps a/2, a/3" in message
    assert three.condition(Condition.READY)[:2] == ("True", Reason.SYNCED)


def test_a_pinned_version_that_is_published_later_is_brought_then(three: Any) -> None:
    pin(three, 5)
    three.publish(4)
    three.run()
    assert three.serving() == [3] * 4
    three.publish(5)
    three.run()
    assert three.serving() == [5] * 4


def test_a_pin_to_another_run(three: Any) -> None:
    three.publish(1, run="b")
    three.run()
    pin(three, 2, "a")
    three.run()
    assert [member.serving.version for member in three.members] == [VersionId("a", 2)] * 4


def test_a_pin_without_a_run_is_of_the_run_that_the_fleet_is_on(three: Any) -> None:
    """The trainer has restarted and numbers its versions from 1 again: the pin does not change its meaning."""
    pin(three, 3)
    three.run()
    for number in (1, 2, 3):
        three.publish(number, run="b")
        three.run()
    assert [member.serving.version for member in three.members] == [VersionId("a", 3)] * 4


def test_a_pinned_version_stays_wanted_of_the_trainer(three: Any) -> None:
    pin(three, 2)
    three.decide()
    assert VersionId("a", 2) in three.trainer.told.keep


def test_the_version_of_a_canary_stays_wanted_of_the_trainer(make: Any) -> None:
    fleet = canary(make, [Wave("1", Pause())])
    fleet.publish(2)
    fleet.run()
    fleet.join("m4")
    seen = []
    fleet.hook = lambda world, plan: seen.append(VersionId("a", 2) in plan.desired["uid-trainer"].keep)
    fleet.run()
    assert all(seen)
    assert len(seen) > 3


def test_a_pin_that_is_moved_in_a_canary_ends_it_as_superseded(make: Any) -> None:
    fleet = canary(make, [Wave("1", Pause())])
    fleet.publish(2)
    fleet.run()
    pin(fleet, 1)
    fleet.run()
    assert fleet.serving() == [1] * 4
    assert fleet.status.rollout.outcome is Outcome.SUPERSEDED
    assert fleet.memory.allowed == (VersionId("a", 1),)


def test_a_pin_that_is_moved_in_a_transfer_counts_after_it(three: Any) -> None:
    hold(three, "transfer")
    three.publish(4)
    three.until(three.step_is("Transferring"))
    pin(three, 2)
    hold(three, "transfer", False)
    three.wait(10)
    assert three.serving() == [2] * 4


def test_a_pin_that_is_set_while_no_operator_leads_is_not_run_over_by_the_next_one(three: Any) -> None:
    for member in three.members[1:]:
        member.stuck.add("commit")
    three.publish(4)
    three.until(lambda: three.serving() == [4, 3, 3, 3])
    pin(three, 3)
    three.restart_operator()
    hold(three, "", False)
    for member in three.members[1:]:
        member.told = None
    asked = []
    three.hook = lambda world, plan: asked.extend(told.commit for told in plan.desired.values())
    three.wait(100)
    assert VersionId("a", 4) not in asked
    assert three.serving() == [3] * 4


def test_two_pins_that_follow_each_other_fast_end_at_the_last(three: Any) -> None:
    for version in (1, 2, 1, 3, 2):
        pin(three, version)
        three.decide()
        three.obey()
    three.run()
    assert three.serving() == [2] * 4
    assert three.status.current.version == 2


def test_a_superseded_rollout_that_was_shown_is_told_of(make: Any) -> None:
    fleet = make(members=2)
    fleet.publish(1)
    fleet.run()
    hold(fleet, "check")
    fleet.publish(2, layout="L2")
    fleet.wait(5)
    assert (fleet.status.rollout.version, fleet.status.rollout.outcome) == (2, Outcome.IN_PROGRESS)
    fleet.publish(3, layout="L2")
    fleet.decide()
    assert (fleet.status.rollout.version, fleet.status.rollout.outcome) == (3, Outcome.IN_PROGRESS)
    assert fleet.events(Reason.SUPERSEDED) == ["a/2 gives way to a/3 before it was transferred"]
    hold(fleet, "check", False)
    fleet.run()
    assert (fleet.status.rollout.version, fleet.status.rollout.outcome) == (3, Outcome.SUCCEEDED)
