"""The races of the design's table, one test each, named after them."""

from dataclasses import replace
from typing import Any

import pytest
from decided_fleet import hold, receiving, staged

from weightsync_contract.messages import (
    Failure,
    ServingState,
    Transfer,
    TransferState,
    VersionId,
)
from weightsync_contract.reasons import Condition, FailureCode, Outcome, Reason

V1, V2, V3 = (VersionId("a", number) for number in (1, 2, 3))


# ---------------------------------------------------------------------------- joins and versions


def test_joins_during_a_transfer(synced: Any) -> None:
    hold(synced, "transfer")
    synced.publish(2)
    synced.until(lambda: receiving(synced))
    group = synced.status.group
    late = synced.join("m2")
    for _ in range(5):
        plan = synced.decide()
        synced.obey()
        assert plan.desired[late.uid].group is None
        assert plan.desired[late.uid].commit is None
    assert synced.status.group == group
    hold(synced, "transfer", False)
    synced.run()
    assert synced.serving() == [2, 2, 2]
    assert synced.status.group.members == ("0:1:trainer:uid-trainer", "1:1:m2:uid-m2")


@pytest.mark.parametrize("step", ["Listening", "Joining", "Checking"])
def test_next_version_before_its_transfer_supersedes(make: Any, step: str) -> None:
    fleet = make()
    fleet.publish(1)
    fleet.until(fleet.step_is(step))
    fleet.publish(2)
    seen = set()
    fleet.hook = lambda world, plan: seen.update(
        told.wanted.version for told in plan.desired.values() if told.wanted
    )
    fleet.run()
    assert fleet.serving() == [2, 2]
    assert seen == {V2}
    assert fleet.status.previous is None
    assert fleet.memory.allowed == (V2,)


@pytest.mark.parametrize("step", ["Transferring", "Committing"])
def test_next_version_after_the_transfer_began_waits_and_only_the_newest_is_brought(
    synced: Any, step: str
) -> None:
    hold(synced, "transfer" if step == "Transferring" else "commit")
    synced.publish(2)
    synced.until(synced.step_is(step))
    synced.publish(3)
    synced.decide()
    synced.publish(4)
    synced.decide()
    assert synced.memory.round.target.version == V2
    hold(synced, step, False)
    served = []
    synced.hook = lambda *_: served.append(synced.serving()[0])
    # The trainer's agent keeps two copies, and what is being sent: as an agent pins it.
    synced.run()
    assert 3 not in served
    assert synced.serving() == [4, 4]
    assert synced.status.previous.version == 2


def test_a_publisher_that_is_faster_than_the_transfer_starves_nobody(synced: Any) -> None:
    served = set()
    for version in range(2, 40):
        synced.publish(version)
        synced.decide()
        synced.obey()
        served.add(synced.serving()[0])
    assert len(served) > 4


def test_a_version_that_the_epochs_loss_left_unstaged_gives_way_to_the_newer_one(synced: Any) -> None:
    hold(synced, "transfer")
    synced.publish(2)
    synced.until(lambda: receiving(synced))
    synced.publish(3)
    epoch = synced.memory.epoch.number
    failure = Failure(FailureCode.CHILD_FAILED, "killed", epoch, V2)
    synced.members[1].transfer = Transfer(epoch=epoch, failure=failure)
    synced.decide()
    assert synced.memory.round.target.version == V3
    hold(synced, "transfer", False)
    synced.wait(10)
    assert synced.serving() == [3, 3]


# ---------------------------------------------------------------------------- trainers


def test_trainer_restarts_with_a_lower_number(synced: Any) -> None:
    synced.publish(7)
    synced.run()
    synced.trainer.source = replace(synced.trainer.source, run="b")
    synced.wait(600)
    assert synced.serving() == [7, 7]
    assert synced.status.source.run == "a"
    synced.publish(1, run="b")
    synced.run()
    assert [member.serving.version for member in synced.members] == [VersionId("b", 1)] * 2
    assert synced.status.source.run == "b"
    assert synced.status.previous.version == 7


def test_a_version_never_goes_back_within_a_run(synced: Any) -> None:
    synced.publish(5)
    synced.run()
    versions = synced.trainer.source.versions
    synced.trainer.source = replace(synced.trainer.source, versions=versions[:1])
    synced.wait(60)
    assert synced.serving() == [5, 5]
    synced.trainer.source = replace(
        synced.trainer.source, versions=(*versions, replace(versions[0], version=V3))
    )
    synced.wait(60)
    assert synced.serving() == [5, 5]


def test_a_member_that_is_ahead_is_not_taken_back(make: Any) -> None:
    """Version 3 failed after half of the members had it, and its copy is gone; version 2 comes late."""
    fleet = make(members=4)
    fleet.publish(1)
    fleet.run()
    for member in fleet.members[:2]:
        member.stuck.add("commit")
    copies = fleet.trainer.source.versions
    fleet.publish(3)
    fleet.wait(70)
    assert fleet.status.rollout.outcome is Outcome.FAILED
    assert fleet.serving() == [1, 1, 3, 3]
    hold(fleet, "", False)
    fleet.trainer.source = replace(fleet.trainer.source, versions=copies)
    fleet.publish(2)
    asked = []
    fleet.hook = lambda world, plan: asked.extend(
        plan.desired[uid].commit for uid in ("uid-m2", "uid-m3") if uid in plan.desired
    )
    fleet.run()
    assert set(asked) == {None}
    assert fleet.serving()[:2] == [2, 2]


def test_the_same_version_with_other_bytes(synced: Any) -> None:
    source = synced.trainer.source
    synced.trainer.source = replace(source, versions=(replace(source.versions[0], digest="d-other"),))
    synced.run()
    status, reason, message = synced.condition(Condition.SOURCE_AVAILABLE)
    assert (status, reason) == ("False", Reason.VERSION_CONFLICT)
    assert "d-other" in message
    assert "d-a-1" in message
    assert synced.serving() == [1, 1]
    assert len(synced.events(Reason.VERSION_CONFLICT)) == 1


@pytest.mark.parametrize("how", ["deleted", "finished", "session"])
def test_trainer_dies_when_all_are_staged(synced: Any, how: str) -> None:
    hold(synced, "commit")
    synced.publish(2)
    synced.until(lambda: staged(synced))
    kill_trainer(synced, how)
    hold(synced, "commit", False)
    synced.run()
    assert synced.serving() == [2, 2]
    assert synced.status.current.version == 2


def kill_trainer(fleet: Any, how: str) -> None:
    match how:
        case "deleted":
            fleet.leave(fleet.trainer)
        case "finished":
            fleet.trainer.finished = True
            fleet.lose_session(fleet.trainer)
        case "session":
            fleet.lose_session(fleet.trainer)


@pytest.mark.parametrize("how", ["deleted", "finished", "session"])
def test_trainer_dies_when_none_is_staged(synced: Any, how: str) -> None:
    hold(synced, "transfer")
    synced.publish(2)
    synced.until(lambda: receiving(synced))
    epoch = synced.memory.epoch.number
    kill_trainer(synced, how)
    for member in synced.members:
        failure = Failure(FailureCode.PEER_LOST, "rank 0 is gone", epoch, V2)
        member.transfer = Transfer(epoch=epoch, failure=failure, checked="L1")
    synced.wait(120)
    assert synced.serving() == [1, 1]
    assert synced.status.rollout.outcome is Outcome.FAILED
    assert synced.reason(Condition.PROGRESSING) is Reason.TRANSFER_FAILED
    assert synced.condition(Condition.SOURCE_AVAILABLE)[0] == "False"


@pytest.mark.parametrize(("members", "ok"), [(4, True), (2, True), (8, True)])
def test_trainer_dies_when_not_all_are_staged_within_max_unavailable(
    make: Any, members: int, ok: bool
) -> None:
    fleet = make(members=members)
    fleet.publish(1)
    fleet.run()
    fleet.members[0].stuck.add("transfer")
    fleet.publish(2)
    fleet.until(lambda: receiving(fleet))
    epoch = fleet.memory.epoch.number
    for member in fleet.members[1:]:
        member.transfer = replace(member.transfer, state=TransferState.STAGED, digest="d-a-2")
    fleet.leave(fleet.trainer)
    failure = Failure(FailureCode.PEER_LOST, "rank 0 is gone", epoch, V2)
    fleet.members[0].transfer = Transfer(epoch=epoch, failure=failure, checked="L1")
    fleet.wait(10)
    assert fleet.serving() == [None, *[2] * (members - 1)]
    assert fleet.members[0].serving.state is ServingState.WITHHELD


def test_trainers_agent_comes_back_in_a_transfer(synced: Any) -> None:
    hold(synced, "transfer")
    synced.publish(2)
    synced.until(lambda: receiving(synced))
    epoch = synced.memory.epoch.number
    synced.lose_session(synced.trainer)
    for member in synced.members:
        failure = Failure(FailureCode.PEER_LOST, "rank 0 is gone", epoch, V2)
        member.transfer = Transfer(epoch=epoch, failure=failure, checked="L1")
    hold(synced, "transfer", False)
    synced.wait(20)
    assert synced.serving() == [1, 1]
    assert synced.memory.round is not None
    synced.trainer.restart_agent()
    synced.resume_session(synced.trainer)
    synced.run()
    assert synced.serving() == [2, 2]
    assert synced.status.group.epoch == epoch + 1


def test_two_publishers(synced: Any) -> None:
    rival = synced.add_trainer("another")
    synced.others.append(rival)
    synced.publish(9, run="z", by=rival)
    plan = synced.run()
    status, reason, message = synced.condition(Condition.SOURCE_AVAILABLE)
    assert (status, reason) == ("False", Reason.TRAINER_CONFLICT)
    assert "another" in message
    assert "trainer" in message
    assert synced.serving() == [1, 1]
    assert plan.desired[rival.uid].group is None
    synced.publish(2)
    synced.run()
    assert synced.serving() == [2, 2]
    synced.restart_operator()
    synced.wait(20)
    assert synced.serving() == [2, 2]
    assert synced.status.source.pod == "trainer"
    assert len(synced.events(Reason.TRAINER_CONFLICT)) == 2, "one a leader"


def test_two_publishers_of_which_none_was_followed_before(make: Any) -> None:
    fleet = make()
    rival = fleet.add_trainer("another")
    fleet.others.append(rival)
    fleet.publish(9, run="z", by=rival)
    fleet.publish(1)
    fleet.wait(60)
    assert fleet.serving() == [None, None]
    assert fleet.reason(Condition.SOURCE_AVAILABLE) is Reason.TRAINER_CONFLICT
    fleet.leave(rival)
    fleet.run()
    assert fleet.serving() == [1, 1]


def test_another_publisher_takes_over_once_the_first_one_is_gone(synced: Any) -> None:
    rival = synced.add_trainer("another")
    synced.others.append(rival)
    synced.publish(9, run="z", by=rival)
    synced.run()
    synced.trainer.source = replace(synced.trainer.source, connected=False)
    synced.run()
    assert synced.serving() == [9, 9]
    assert synced.status.source.pod == "another"


def test_fsdp_pods_without_a_publisher(make: Any) -> None:
    fleet = make()
    for number in range(3):
        fleet.others.append(fleet.add_trainer(f"fsdp-{number}"))
    fleet.publish(1)
    fleet.run()
    assert fleet.serving() == [1, 1]
    assert fleet.reason(Condition.SOURCE_AVAILABLE) is Reason.CONNECTED
    assert fleet.status.group.members[0] == "0:1:trainer:uid-trainer"
    assert all(each.told.group is None for each in fleet.others)


def test_trainer_job_completes(synced: Any) -> None:
    synced.trainer.source = replace(synced.trainer.source, connected=False, completed=True)
    synced.run()
    assert synced.condition(Condition.READY)[:2] == ("True", Reason.SYNCED)
    assert synced.condition(Condition.SOURCE_AVAILABLE)[:2] == ("False", Reason.TRAINER_COMPLETED)
    late = synced.join("m2")
    synced.run()
    assert late.serving.version == V1, "its agent still keeps the copy"
    synced.trainer.finished = synced.trainer.succeeded = True
    synced.lose_session(synced.trainer)
    late = synced.join("m3")
    synced.wait(60)
    assert synced.serving() == [1, 1, 1, None]
    assert synced.condition(Condition.SOURCE_AVAILABLE)[:2] == ("False", Reason.TRAINER_COMPLETED)
    assert late.told.allowed == (V1,)
    assert not late.told.serve_initial


def test_the_copy_that_a_late_member_needs_is_not_kept_any_more(synced: Any) -> None:
    synced.trainer.source = replace(synced.trainer.source, versions=())
    synced.join("m2")
    synced.wait(60)
    status, reason, message = synced.condition(Condition.SOURCE_AVAILABLE)
    assert (status, reason) == ("False", Reason.VERSION_NOT_RETAINED)
    assert "m2" in message
    assert synced.serving() == [1, 1, None]


# ---------------------------------------------------------------------------- the spec


def test_timeouts_edited_count_from_the_next_epoch_on(synced: Any) -> None:
    before = synced.spec.timeouts
    hold(synced, "transfer")
    synced.publish(2)
    synced.until(lambda: receiving(synced))
    synced.spec = replace(synced.spec, timeouts=replace(before, transfer=1.0))
    synced.generation += 1
    plan = synced.decide()
    assert plan.desired["uid-m0"].timeouts == before
    epoch = synced.status.group.epoch
    hold(synced, "transfer", False)
    synced.run()
    synced.publish(3)
    synced.run()
    assert synced.status.group.epoch == epoch + 1
    assert synced.members[0].told.timeouts.transfer == 1.0
    assert synced.serving() == [3, 3]


def test_paused_starts_no_rollout(synced: Any) -> None:
    synced.spec = replace(synced.spec, paused=True)
    synced.publish(2)
    synced.wait(7200)
    assert synced.serving() == [1, 1]
    assert synced.condition(Condition.PROGRESSING)[:2] == ("False", Reason.PAUSED)
    synced.spec = replace(synced.spec, paused=False)
    synced.run()
    assert synced.serving() == [2, 2]


@pytest.mark.parametrize("step", ["Joining", "Checking", "Transferring"])
def test_paused_in_a_rollout_starts_no_new_step_and_takes_no_time(make: Any, step: str) -> None:
    fleet = make()
    fleet.publish(1)
    fleet.until(fleet.step_is(step))
    fleet.spec = replace(fleet.spec, paused=True)
    fleet.wait(7200)
    assert fleet.memory.round.step.value == step
    assert fleet.serving() == [None, None]
    assert fleet.condition(Condition.PROGRESSING)[:2] == ("False", Reason.PAUSED)
    fleet.spec = replace(fleet.spec, paused=False)
    fleet.run()
    assert fleet.serving() == [1, 1]
    assert fleet.status.rollout.outcome is Outcome.SUCCEEDED


def test_paused_in_a_commit_lets_it_end(synced: Any) -> None:
    hold(synced, "commit")
    synced.publish(2)
    synced.until(synced.step_is("Committing"))
    synced.spec = replace(synced.spec, paused=True)
    hold(synced, "commit", False)
    synced.run()
    assert synced.serving() == [2, 2]
    assert synced.status.rollout.outcome is Outcome.SUCCEEDED


def test_paused_starts_no_catch_up(synced: Any) -> None:
    synced.spec = replace(synced.spec, paused=True)
    synced.join("m2")
    synced.wait(600)
    assert synced.serving() == [1, 1, None]
    assert synced.reason(Condition.PROGRESSING) is Reason.PAUSED


def test_unsupported_moves_nothing_and_names_the_field(synced: Any) -> None:
    synced.spec = replace(synced.spec, unsupported=("dataPlane.type Engine (planned for 0.2)",))
    synced.generation += 1
    synced.publish(2)
    plan = synced.decide()
    assert plan.desired == {}
    for type_ in (Condition.READY, Condition.PROGRESSING):
        status, reason, message = synced.condition(type_)
        assert (status, reason) == ("False", Reason.UNSUPPORTED)
        assert "dataPlane.type Engine (planned for 0.2)" in message
    assert synced.status.observed_generation == 2
    synced.spec = replace(synced.spec, unsupported=())
    synced.generation += 1
    synced.run()
    assert synced.serving() == [2, 2]
    assert synced.reason(Condition.READY) is Reason.SYNCED
