"""The races of who is a member: selectors, sessions, boots, and the start of a fleet."""

from dataclasses import replace
from typing import Any

import pytest
from decided_fleet import hold, receiving

from weightsync_contract.messages import (
    ObjectRef,
    Serving,
    ServingState,
    TransferState,
    VersionId,
)
from weightsync_contract.reasons import Condition, Outcome, Reason
from weightsync_operator.core.model import InitialWeights

V1, V2, V3 = (VersionId("a", number) for number in (1, 2, 3))


# ---------------------------------------------------------------------------- who is a member


def test_two_weightsyncs_one_pod(synced: Any) -> None:
    pod = synced.members[1]
    synced.claims = {pod.uid: ObjectRef("rl", "elder", "cr-0")}
    synced.publish(2)
    plan = synced.run()
    assert pod.uid not in plan.desired
    assert pod.uid not in plan.released
    status, reason, message = synced.condition(Condition.MEMBERS_HEALTHY)
    assert (status, reason) == ("False", Reason.CONFLICT)
    assert "m1" in message
    assert "elder" in message
    assert synced.status.members.total == 1
    assert len(synced.events(Reason.CONFLICT)) == 1
    assert synced.serving()[0] == 2


def test_a_trainer_of_another_weightsync_is_no_trainer(synced: Any) -> None:
    synced.claims = {synced.trainer.uid: ObjectRef("rl", "elder", "cr-0")}
    synced.publish(2)
    plan = synced.run()
    assert synced.trainer.uid not in plan.desired
    assert synced.reason(Condition.SOURCE_AVAILABLE) is Reason.NO_PUBLISHER
    assert synced.serving() == [1, 1]


def test_selector_no_longer_matches_in_a_transfer(synced: Any) -> None:
    hold(synced, "transfer")
    synced.publish(2)
    synced.until(lambda: receiving(synced))
    synced.leave(synced.members[1])
    hold(synced, "transfer", False)
    plan = synced.run()
    assert synced.serving() == [2]
    assert "uid-m1" not in plan.desired
    assert synced.status.members.total == 1
    assert not synced.events(Reason.EXCLUDED)


def test_evicted_while_fenced_is_an_ordinary_leave(synced: Any) -> None:
    synced.members[1].serving = Serving(ServingState.FENCED, "boot-1", fences=1)
    synced.run()
    assert synced.reason(Condition.MEMBERS_HEALTHY) is Reason.FENCED
    synced.leave(synced.members[1])
    synced.run()
    assert synced.reason(Condition.MEMBERS_HEALTHY) is Reason.ALL_HEALTHY
    assert synced.reason(Condition.READY) is Reason.SYNCED


def test_same_name_with_a_new_uid_is_a_new_member(synced: Any) -> None:
    old = synced.members.pop()
    new = synced.join("m1", generation=2)
    assert (new.name, new.uid) != (old.name, old.uid)
    assert new.name == old.name
    synced.run()
    assert synced.serving() == [1, 1]
    assert synced.status.group.members[-1].endswith(new.uid)


def test_the_last_member_leaves_in_a_rollout(synced: Any) -> None:
    hold(synced, "transfer")
    synced.publish(2)
    synced.until(lambda: receiving(synced))
    for member in synced.members:
        synced.leave(member)
    synced.run()
    assert synced.memory.round is None
    assert synced.condition(Condition.READY)[:2] == ("True", Reason.NO_MEMBERS)


def test_scale_to_zero_and_back(synced: Any) -> None:
    for member in synced.members:
        synced.leave(member)
    synced.publish(2)
    plan = synced.run()
    assert synced.condition(Condition.READY)[:2] == ("True", Reason.NO_MEMBERS)
    assert "app=vllm" in synced.condition(Condition.READY)[2]
    assert plan.desired[synced.trainer.uid].fleet.members == 0
    synced.join("n0")
    synced.run()
    assert synced.serving() == [2]


def test_scale_up_in_a_rollout_gets_the_version_after_it(synced: Any) -> None:
    hold(synced, "commit")
    synced.publish(2)
    synced.until(synced.step_is("Committing"))
    late = synced.join("m2")
    synced.decide()
    assert late.told is None or late.told.group is None
    hold(synced, "commit", False)
    synced.run()
    assert synced.serving() == [2, 2, 2]


def test_late_joiners_are_batched(synced: Any) -> None:
    epoch = synced.status.group.epoch
    synced.join("m2")
    coming = synced.join("m3", ranks=0)
    synced.wait(2)
    assert synced.serving() == [1, 1, None, None]
    coming.ranks = 1
    synced.run()
    assert synced.serving() == [1, 1, 1, 1]
    assert synced.status.group.epoch == epoch + 1


def test_late_joiners_wait_five_seconds_at_most(synced: Any) -> None:
    late = synced.join("m2")
    synced.join("m3", ranks=0)
    synced.wait(6)
    assert late.serving.version == V1


def test_a_restarted_member_gets_the_new_version_and_not_first_the_old_one(synced: Any) -> None:
    """Its rollout waits a little for the other one, which is about to come up; the old version lies staged."""
    back = synced.members[0]
    back.restart_engine("boot-2")
    back.transfer = replace(back.transfer, state=TransferState.STAGED, version=V1, digest="d-a-1")
    synced.members[1].ranks = 0
    synced.members[1].restart_engine("boot-2")
    synced.publish(2)
    synced.wait(1)
    assert synced.memory.round is None
    synced.wait(6)
    assert synced.serving() == [2, None]


def test_late_joiners_do_not_delay_a_new_version(synced: Any) -> None:
    synced.join("m2", ranks=0)
    synced.run()
    synced.publish(2)
    synced.run()
    assert synced.serving() == [2, 2, None]


# ---------------------------------------------------------------------------- sessions and boots


def test_a_session_that_is_lost_with_the_group_healthy_excludes_nobody(synced: Any) -> None:
    synced.lose_session(synced.members[1])
    synced.wait(3600)
    assert not synced.memory.exclusions
    assert synced.status.group.epoch == 1
    synced.resume_session(synced.members[1])
    synced.publish(2)
    synced.run()
    assert synced.serving() == [2, 2]
    assert synced.status.group.epoch == 1


def test_a_session_lost_in_a_transfer_stays_staged_and_is_not_committed_without_one(synced: Any) -> None:
    hold(synced, "transfer")
    synced.publish(2)
    synced.until(lambda: receiving(synced))
    away = synced.members[1]
    synced.lose_session(away)
    hold(synced, "transfer", False)
    away.transfer = replace(away.transfer, state=TransferState.STAGED, digest="d-a-2")
    synced.wait(20)
    assert synced.memory.round.step.value == "Committing"
    assert away.serving.version == V1
    synced.resume_session(away)
    synced.run()
    assert synced.serving() == [2, 2]


def test_a_member_whose_session_is_gone_is_waited_for_some_seconds(synced: Any) -> None:
    synced.lose_session(synced.members[1])
    synced.publish(2)
    synced.wait(3)
    assert synced.serving() == [1, 1]
    synced.resume_session(synced.members[1])
    synced.run()
    assert synced.serving() == [2, 2]


def test_a_member_whose_session_is_gone_is_done_without(synced: Any) -> None:
    synced.lose_session(synced.members[1])
    synced.publish(2)
    synced.wait(7)
    assert synced.serving() == [2, 1]
    assert synced.status.current.version == 2
    away = synced.members[1]
    synced.resume_session(away)
    synced.wait(10)
    assert synced.serving() == [2, 2]


def test_more_sessions_gone_than_may_be_missing_are_waited_for_as_long_as_for_anybody_to_join(
    make: Any,
) -> None:
    fleet = make(members=4)
    fleet.publish(1)
    fleet.run()
    for member in fleet.members[:2]:
        fleet.lose_session(member)
    fleet.publish(2)
    fleet.wait(50)
    assert fleet.serving() == [1, 1, 1, 1]
    assert fleet.memory.round is not None
    fleet.wait(15)
    assert fleet.status.rollout.outcome is Outcome.FAILED
    assert fleet.reason(Condition.PROGRESSING) is Reason.JOIN_TIMEOUT
    assert fleet.serving() == [1, 1, 1, 1]


def test_engine_container_restarts(synced: Any) -> None:
    synced.members[0].restart_engine("boot-2")
    plan = synced.decide()
    assert not plan.desired["uid-m0"].serve_initial
    synced.run()
    assert synced.serving() == [1, 1]
    assert synced.status.rollout.version == 1


def test_engine_restarts_again_and_again_each_time_caught_up(synced: Any) -> None:
    """The version went round in the member's group already: each time it takes another epoch."""
    epochs = []
    for number in range(3):
        synced.members[0].restart_engine(f"boot-{number + 2}")
        synced.run()
        epochs.append(synced.status.group.epoch)
        assert synced.serving() == [1, 1]
    assert epochs == [2, 3, 4]


def test_an_engine_that_comes_back_with_other_ranks_means_a_new_epoch(synced: Any) -> None:
    synced.members[0].ranks = 2
    synced.publish(2)
    synced.run()
    assert synced.serving() == [2, 2]
    assert synced.status.group.epoch == 2
    assert synced.status.group.members[1:] == ("1:2:m0:uid-m0", "3:1:m1:uid-m1")


def test_sidecar_restarts_with_an_engine_that_serves(synced: Any) -> None:
    synced.members[0].restart_agent()
    synced.run()
    assert synced.serving() == [1, 1]
    assert synced.status.group.epoch == 1
    synced.publish(2)
    synced.run()
    assert synced.serving() == [2, 2]
    assert synced.status.group.epoch == 2


def test_an_old_version_that_comes_back_is_withheld_and_caught_up(make: Any) -> None:
    fleet = make(members=4)
    fleet.publish(1)
    fleet.run()
    away = fleet.members[3]
    fleet.lose_session(away)
    fleet.publish(2)
    fleet.wait(10)
    assert away.serving.version == V1
    fleet.resume_session(away)
    fleet.decide()
    fleet.obey()
    assert away.serving.state is ServingState.WITHHELD
    fleet.wait(10)
    assert fleet.serving() == [2, 2, 2, 2]


# ---------------------------------------------------------------------------- the start


def test_nobody_serves_before_the_first_version(make: Any) -> None:
    fleet = make()
    plan = fleet.run()
    assert not plan.desired["uid-m0"].serve_initial
    assert plan.desired["uid-m0"].allowed == ()
    assert fleet.condition(Condition.READY)[:2] == ("False", Reason.WAITING_FOR_FIRST_VERSION)
    assert fleet.condition(Condition.SOURCE_AVAILABLE)[:2] == ("False", Reason.NO_PUBLISHER)


def test_initial_weights_serve_counts_only_while_no_version_exists(make: Any) -> None:
    fleet = make(spec={"initial_weights": InitialWeights.SERVE})
    plan = fleet.run()
    assert plan.desired["uid-m0"].serve_initial
    assert fleet.condition(Condition.READY)[:2] == ("True", Reason.WAITING_FOR_FIRST_VERSION)
    fleet.publish(1)
    plan = fleet.decide()
    assert not plan.desired["uid-m0"].serve_initial
    fleet.run()
    fleet.join("m2")
    plan = fleet.decide()
    assert not plan.desired["uid-m2"].serve_initial


def test_initial_weights_are_not_served_once_anything_is_published(make: Any) -> None:
    fleet = make(spec={"initial_weights": InitialWeights.SERVE, "paused": True})
    fleet.publish(1)
    plan = fleet.run()
    assert not plan.desired["uid-m0"].serve_initial


def test_initial_weights_are_not_served_while_a_version_is_known_to_any_member(make: Any) -> None:
    fleet = make(spec={"initial_weights": InitialWeights.SERVE})
    fleet.members[1].serving = Serving(ServingState.UNREACHABLE, "boot-1", V1, "d-a-1")
    plan = fleet.run()
    assert not plan.desired["uid-m0"].serve_initial


def test_initial_weights_are_never_served_again_though_the_status_was_lost(make: Any) -> None:
    fleet = make(spec={"initial_weights": InitialWeights.SERVE})
    fleet.publish(1)
    fleet.run()
    fleet.leave(fleet.trainer)
    fleet.status = type(fleet.status)()
    fleet.restart_operator()
    fleet.members[0].restart_engine("boot-2")
    fleet.run()
    assert not fleet.members[0].told.serve_initial


def test_first_version_waits_a_little_for_members_that_are_about_to_come_up(make: Any) -> None:
    fleet = make(members=3)
    fleet.members[2].ranks = 0
    fleet.publish(1)
    fleet.wait(3)
    assert fleet.serving() == [None] * 3
    fleet.members[2].ranks = 1
    fleet.run()
    assert fleet.serving() == [1, 1, 1]
    assert fleet.status.group.epoch == 1


def test_a_pod_without_an_agent_holds_nobody_up(make: Any) -> None:
    fleet = make(members=2)
    fleet.members[1].has_agent = False
    fleet.publish(1)
    fleet.wait(6)
    assert fleet.serving() == [1, None]
    assert fleet.status.rollout.outcome is Outcome.SUCCEEDED
    assert fleet.condition(Condition.READY)[:2] == ("False", Reason.DEGRADED)
    status, reason, message = fleet.condition(Condition.MEMBERS_HEALTHY)
    assert (status, reason) == ("False", Reason.AGENT_MISSING)
    assert message.startswith("m1: no agent has connected")


@pytest.mark.parametrize("gone", ["finished", "terminating"])
def test_a_pod_that_is_going_is_no_member(synced: Any, gone: str) -> None:
    setattr(synced.members[1], gone, True)
    synced.publish(2)
    synced.run()
    assert synced.status.members.total == 1
    assert synced.members[0].serving.version == V2
