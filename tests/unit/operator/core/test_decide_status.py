"""What is written, when, and how often; what is told; what can be seen."""

from dataclasses import replace
from typing import Any

import pytest

from weightsync_contract.codec import from_document, to_document
from weightsync_contract.fleetview import FleetView
from weightsync_contract.messages import Capability, Serving, ServingState, TransferState
from weightsync_contract.reasons import Condition, FailureCode, Outcome, Reason, Role
from weightsync_operator.core.model import Status


def slow(fleet: Any, step: str) -> None:
    for member in fleet.members:
        member.stuck = {step}


def go_on(fleet: Any) -> None:
    for member in fleet.members:
        member.stuck = set()


def test_conditions_are_a_map_and_others_rows_stay(synced: Any) -> None:
    foreign = replace(synced.status.conditions[0], type="example.com/Other")
    synced.status = replace(synced.status, conditions=(foreign, *synced.status.conditions))
    synced.publish(2)
    synced.run()
    types = [each.type for each in synced.status.conditions]
    assert len(types) == len(set(types)) == 5
    assert foreign in synced.status.conditions


def test_the_time_of_a_condition_changes_only_with_its_status(synced: Any) -> None:
    def time() -> str:
        return next(each for each in synced.status.conditions if each.type == "Ready").last_transition_time

    before = time()
    synced.now += 10
    synced.publish(2)
    synced.run()
    assert time() == before
    synced.now += 10
    synced.members[0].serving = Serving(ServingState.FENCED, "boot-1")
    synced.run()
    assert synced.condition(Condition.READY)[0] == "False"
    assert time() != before


def test_the_generation_that_was_seen_is_written(synced: Any) -> None:
    synced.generation = 7
    synced.run()
    assert synced.status.observed_generation == 7
    assert {each.observed_generation for each in synced.status.conditions} == {7}


@pytest.mark.parametrize(
    ("step", "reason"),
    [
        ("join", Reason.GROUPING),
        ("check", Reason.CHECKING),
        ("transfer", Reason.TRANSFERRING),
        ("commit", Reason.COMMITTING),
    ],
)
def test_a_step_is_shown_once_it_has_lasted(make: Any, step: str, reason: Reason) -> None:
    fleet = make()
    slow(fleet, step)
    fleet.publish(1)
    plan = fleet.wait(1)
    writes = len(fleet.writes)
    assert all(each.type != "Progressing" or each.reason != reason for each in fleet.status.conditions)
    assert plan.view.phase == reason
    assert plan.requeue_after < 2
    fleet.wait(2)
    assert fleet.condition(Condition.PROGRESSING)[:2] == ("True", reason)
    assert fleet.status.rollout.outcome is Outcome.IN_PROGRESS
    assert len(fleet.writes) == writes + 1
    fleet.wait(20)
    assert len(fleet.writes) == writes + 1
    go_on(fleet)
    fleet.run()
    assert fleet.reason(Condition.PROGRESSING) is Reason.COMPLETE


def test_a_slow_rollout_is_written_twice(synced: Any) -> None:
    slow(synced, "transfer")
    synced.writes.clear()
    synced.publish(2)
    synced.wait(30)
    go_on(synced)
    synced.run()
    assert [each.rollout.outcome for each in synced.writes] == [Outcome.IN_PROGRESS, Outcome.SUCCEEDED]


def test_bytes_are_never_in_the_status(synced: Any) -> None:
    slow(synced, "transfer")
    synced.publish(2)
    synced.wait(5)
    before = synced.status
    synced.writes.clear()
    for count in range(0, 1000, 100):
        for member in synced.members:
            member.transfer = replace(member.transfer, bytes=count, total_bytes=1000)
        plan = synced.wait(1)
        assert {each.transfer.bytes for each in plan.view.members if each.role == "inference"} == {count}
    assert synced.writes == []
    assert synced.status == before


def test_writes_do_not_grow_with_members(make: Any) -> None:
    counts = []
    for members in (2, 32):
        fleet = make(members=members)
        fleet.publish(1)
        fleet.run()
        slow(fleet, "commit")
        fleet.publish(2)
        fleet.wait(3)
        for member in fleet.members:
            member.stuck = set()
            fleet.run()
            fleet.wait(0.5)
        counts.append(len(fleet.writes))
    assert counts[0] == counts[1]


def test_members_that_come_up_one_by_one_are_not_written_one_by_one(make: Any) -> None:
    fleet = make(members=40)
    for member in fleet.members:
        member.reported = False
    fleet.run()
    before = len(fleet.writes)
    for member in fleet.members:
        member.reported = True
        fleet.wait(0.1)
    fleet.wait(3)
    assert len(fleet.writes) - before <= 5
    assert fleet.reason(Condition.MEMBERS_HEALTHY) is Reason.ALL_HEALTHY


def test_counts(make: Any) -> None:
    fleet = make(members=4)
    fleet.publish(1)
    fleet.run()
    fleet.members[0].corrupts = True
    fleet.members[3].serving = Serving(ServingState.FENCED, "boot-1", fences=3)
    fleet.run()
    fleet.publish(2)
    fleet.run()
    counts = fleet.status.members
    assert (counts.total, counts.synced, counts.fenced, counts.excluded) == (4, 2, 1, 1)
    assert fleet.status.synced == "2/4"


@pytest.mark.parametrize("fraction", [0.0, 1.0])
def test_ready_while_a_version_is_rolled_out(make: Any, fraction: float) -> None:
    fleet = make()
    expected = "False"
    if fraction:
        fleet.publish(1)
        fleet.run()
        expected = "True"
    slow(fleet, "transfer")
    fleet.publish(2)
    fleet.wait(5)
    assert fleet.condition(Condition.READY)[:2] == (expected, Reason.ROLLING_OUT)


def test_an_engine_without_a_guard_is_told_of(synced: Any) -> None:
    synced.members[1].capabilities = (Capability.STAGES, Capability.ABORTS, Capability.DIGESTS)
    synced.run()
    status, reason, message = synced.condition(Condition.MEMBERS_HEALTHY)
    assert (status, reason) == ("False", Reason.CAPABILITY_MISSING)
    assert message.startswith("m1: ")
    synced.publish(2)
    synced.run()
    assert synced.serving() == [2, 2]


def test_an_engine_that_can_not_stage_takes_no_part(synced: Any) -> None:
    synced.join("stock", capabilities=())
    synced.wait(60)
    assert synced.serving() == [1, 1, None]
    assert synced.reason(Condition.MEMBERS_HEALTHY) is Reason.CAPABILITY_MISSING
    synced.publish(2)
    synced.run()
    assert synced.serving() == [2, 2, None]


def test_an_agent_in_the_wrong_role_takes_no_part(synced: Any) -> None:
    synced.join("odd").role = Role.TRAINER
    odd = synced.members[-1]
    odd.role = Role.INFERENCE
    view = odd.view
    odd.view = lambda: replace(view(), hello=replace(view().hello, role=Role.TRAINER))  # type: ignore[method-assign]
    synced.wait(60)
    assert "--role trainer" in synced.condition(Condition.MEMBERS_HEALTHY)[2]
    assert odd.told is None


def test_messages_name_the_first_pods_and_count_the_rest(make: Any) -> None:
    fleet = make(members=9)
    for member in fleet.members:
        member.has_agent = False
    fleet.run()
    message = fleet.condition(Condition.MEMBERS_HEALTHY)[2]
    assert "m0: " in message
    assert "m4: " in message
    assert "m5: " not in message
    assert message.endswith("and 4 more")


def test_the_status_survives_the_wire(synced: Any) -> None:
    synced.members[0].corrupts = True
    synced.publish(2)
    synced.run()
    assert from_document(Status, to_document(synced.status)) == synced.status


def test_the_view_shows_everybody(synced: Any) -> None:
    slow(synced, "transfer")
    synced.publish(2)
    synced.until(synced.step_is("Transferring"))
    synced.join("m2", ranks=0)
    view = synced.decide().view
    assert from_document(FleetView, to_document(view)) == view
    assert [(each.name, each.role, each.rank) for each in view.members] == [
        ("trainer", "trainer", 0),
        ("m0", "inference", 1),
        ("m1", "inference", 2),
        ("m2", "inference", -1),
    ]
    assert (view.epoch, view.world_size, view.term) == (1, 3, 1)
    assert (view.target.version, view.current.version) == (2, 1)
    assert view.members[3].message == "m2: its engine does not answer"
    assert view.members[0].source.versions[-1].version.version == 2


def test_publishers_are_told_why_a_rollout_failed(synced: Any) -> None:
    for member in synced.members:
        member.fails["check"] = FailureCode.MANIFEST_REFUSED
    synced.publish(2, layout="L2")
    synced.run()
    rollout = synced.trainer.told.fleet.rollout
    assert (rollout.version.version, rollout.outcome) == (2, Outcome.FAILED)
    assert rollout.reason is Reason.MANIFEST_REFUSED
    assert "m0" in rollout.message


def test_events_of_a_failure_are_told_once(synced: Any) -> None:
    synced.notes.clear()
    for member in synced.members:
        member.fails["check"] = FailureCode.MANIFEST_REFUSED
    synced.publish(2, layout="L2")
    synced.wait(600)
    assert [note.reason for note in synced.notes] == ["Excluded", "Excluded", "ManifestRefused"]


def test_everything_that_is_wanted_is_told_to_everybody(make: Any) -> None:
    fleet = make(spec={"retained_versions": 5})
    plan = fleet.run()
    assert plan.desired["uid-trainer"].retained_versions == 5
    assert plan.desired["uid-m0"].weightsync == fleet.world().ref
    assert plan.desired["uid-m0"].timeouts == fleet.spec.timeouts
    assert plan.desired["uid-m0"].transport == fleet.spec.transport
    assert {told.seq for told in plan.desired.values()} == {0}


def test_the_time_left_of_a_step_is_told(make: Any) -> None:
    fleet = make()
    slow(fleet, "join")
    fleet.publish(1)
    fleet.run()
    fleet.now += 20
    plan = fleet.decide()
    assert plan.desired["uid-m0"].remaining_ms == 40_000
    go_on(fleet)
    plan = fleet.run()
    assert plan.desired["uid-m0"].remaining_ms == 0


def test_agents_without_a_session_are_told_nothing(synced: Any) -> None:
    synced.lose_session(synced.members[0])
    plan = synced.decide()
    assert set(plan.desired) == {"uid-trainer", "uid-m1"}


def test_what_a_step_waits_for_has_a_time(make: Any) -> None:
    for step in ("join", "check", "transfer", "commit"):
        fleet = make()
        slow(fleet, step)
        fleet.publish(1)
        plan = fleet.run()
        assert plan.requeue_after is not None
        fleet.wait(5)
        assert fleet.run().requeue_after is not None
    assert fleet.members[0].transfer.state is TransferState.STAGED


@pytest.mark.parametrize(
    ("step", "says"),
    [
        ("join", "all are to have joined within 60 s"),
        ("check", "to say within 60 s whether they can take it"),
        ("transfer", "all are to have received it within 300 s"),
        ("commit", "each is to have switched within 60 s"),
    ],
)
def test_describe_says_what_comes_next_and_until_when(make: Any, step: str, says: str) -> None:
    fleet = make()
    for member in fleet.members:
        member.stuck.add(step)
    fleet.publish(1)
    fleet.wait(3)
    assert says in fleet.condition(Condition.PROGRESSING)[2]


def test_describe_says_when_who_was_left_out_is_tried_again(synced: Any) -> None:
    synced.members[0].fails["check"] = FailureCode.MANIFEST_REFUSED
    synced.publish(2, layout="L2")
    synced.wait(3)
    message = synced.condition(Condition.MEMBERS_HEALTHY)[2]
    assert "m0: broken at check; tried again once its engine restarts" in message


def test_describe_says_what_a_new_version_waits_for(synced: Any) -> None:
    synced.publish(2)
    synced.lose_session(synced.trainer)
    synced.wait(3)
    assert "a/2 waits: the agent of trainer is not connected" in synced.condition(Condition.PROGRESSING)[2]


def test_describe_says_what_a_failed_version_waits_for(synced: Any) -> None:
    for member in synced.members:
        member.fails["check"] = FailureCode.MANIFEST_REFUSED
    synced.publish(2, layout="L2")
    synced.wait(3)
    assert "retry@a/2" in synced.condition(Condition.PROGRESSING)[2]
