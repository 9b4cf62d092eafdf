"""The way a rollout goes when nothing goes wrong."""

from typing import Any

from weightsync_contract.messages import Phase, ServingState, VersionId
from weightsync_contract.reasons import Condition, Outcome, Reason


def test_first_version_reaches_everybody(make: Any) -> None:
    fleet = make(members=3)
    version = fleet.publish(1)
    fleet.run()
    assert fleet.serving() == [1, 1, 1]
    status = fleet.status
    assert (status.current.run, status.current.version, status.current.digest) == ("a", 1, "d-a-1")
    assert (status.rollout.version, status.rollout.outcome) == (1, Outcome.SUCCEEDED)
    assert status.source.run == "a"
    assert status.source.pod == "trainer"
    assert status.synced == "3/3"
    assert fleet.condition(Condition.READY)[:2] == ("True", Reason.SYNCED)
    assert fleet.condition(Condition.PROGRESSING)[:2] == ("True", Reason.COMPLETE)
    assert fleet.condition(Condition.SOURCE_AVAILABLE)[:2] == ("True", Reason.CONNECTED)
    assert fleet.condition(Condition.MEMBERS_HEALTHY)[:2] == ("True", Reason.ALL_HEALTHY)
    assert fleet.memory.allowed == (version,)


def test_order_of_a_rollout(make: Any) -> None:
    fleet = make()
    fleet.publish(1)
    seen = []
    for _ in range(20):
        plan = fleet.decide()
        step = fleet.memory.round.step.value if fleet.memory.round else "-"
        if not seen or seen[-1] != step:
            seen.append(step)
        if step == "Listening":
            assert plan.desired["uid-trainer"].group.endpoint == ""
            assert plan.desired["uid-m0"].group is None
        if step == "Joining":
            assert plan.status.group.endpoint == plan.desired["uid-m0"].group.endpoint != ""
        if step == "Checking":
            assert plan.desired["uid-m0"].wanted.phase is Phase.CHECK
        if step == "Transferring":
            assert plan.desired["uid-m1"].wanted.phase is Phase.TRANSFER
            assert plan.desired["uid-m1"].commit is None
        if step == "Committing":
            assert plan.desired["uid-m1"].commit == VersionId("a", 1)
            assert plan.desired["uid-m1"].commit_digest == "d-a-1"
        fleet.obey()
    assert seen == ["-", "Listening", "Joining", "Checking", "Transferring", "Committing", "-"]
    assert fleet.serving() == [1, 1]


def test_ranks_are_contiguous_and_the_trainer_is_the_first(make: Any) -> None:
    fleet = make(members=0)
    for name, ranks in (("c", 2), ("a", 4), ("b", 1)):
        fleet.join(name, ranks=ranks)
    fleet.publish(1)
    fleet.run()
    assert fleet.status.group.members == (
        "0:1:trainer:uid-trainer",
        "1:4:a:uid-a",
        "5:1:b:uid-b",
        "6:2:c:uid-c",
    )
    assert fleet.status.group.world_size == 8


def phases(fleet: Any) -> set[Phase]:
    """Collects what member m0 is asked for from here on."""
    seen: set[Phase] = set()

    def hook(_: Any, plan: Any) -> None:
        wanted = plan.desired["uid-m0"].wanted
        if wanted:
            seen.add(wanted.phase)

    fleet.hook = hook
    return seen


def test_the_group_is_kept_for_the_next_version_and_its_layout_is_known(synced: Any) -> None:
    epoch, endpoint = synced.status.group.epoch, synced.status.group.endpoint
    seen = phases(synced)
    synced.publish(2)
    synced.run()
    assert synced.serving() == [2, 2]
    assert (synced.status.group.epoch, synced.status.group.endpoint) == (epoch, endpoint)
    assert seen == {Phase.TRANSFER}


def test_a_new_layout_is_checked_again(synced: Any) -> None:
    seen = phases(synced)
    synced.publish(2, layout="L2")
    synced.run()
    assert synced.serving() == [2, 2]
    assert seen == {Phase.CHECK, Phase.TRANSFER}


def test_previous_is_kept(synced: Any) -> None:
    synced.publish(2)
    synced.run()
    assert (synced.status.previous.version, synced.status.current.version) == (1, 2)


def test_after_success_only_the_current_version_is_allowed(synced: Any) -> None:
    allowed = []
    synced.hook = lambda world, plan: allowed.append(plan.desired["uid-m0"].allowed)
    synced.publish(2)
    synced.run()
    assert (VersionId("a", 1), VersionId("a", 2)) in allowed
    assert allowed[-1] == (VersionId("a", 2),)
    assert all(member.serving.state is ServingState.SERVING for member in synced.members)


def test_a_fast_rollout_writes_the_status_once_at_its_end(synced: Any) -> None:
    synced.writes.clear()
    synced.publish(2)
    synced.run()
    assert len(synced.writes) == 1
    assert synced.writes[0].rollout.outcome is Outcome.SUCCEEDED


def test_a_first_rollout_writes_term_group_and_end(make: Any) -> None:
    fleet = make(members=8)
    fleet.publish(1)
    fleet.run()
    assert [bool(each.group) for each in fleet.writes] == [False, True, True]


def test_one_event_for_a_rollout(synced: Any) -> None:
    synced.notes.clear()
    synced.publish(2)
    synced.run()
    assert [(note.reason, note.warning) for note in synced.notes] == [(Reason.COMPLETE, False)]
    assert synced.notes[0].message.startswith("a/2 is served by 2 of 2 members")


def test_the_trainer_is_told_how_the_fleet_stands(synced: Any) -> None:
    synced.publish(2)
    synced.until(synced.step_is("Transferring"))
    rollout = synced.trainer.told.fleet.rollout
    assert (rollout.version.version, rollout.outcome) == (2, Outcome.IN_PROGRESS)
    synced.run()
    told = synced.trainer.told.fleet
    assert (told.current.version, told.members, told.synced) == (2, 2, 2)
    assert told.rollout.outcome is Outcome.SUCCEEDED


def test_nothing_is_asked_of_an_idle_fleet(synced: Any) -> None:
    plan = synced.wait(3600)
    assert plan.requeue_after is None
    assert plan.notes == ()
    assert plan.desired["uid-m0"].wanted is None
    assert plan.desired["uid-m0"].commit is None
    assert plan.desired["uid-m0"].group is not None
