"""What users of such systems saw and reported, one test each, named after it; the report's place in brackets."""

from dataclasses import replace
from typing import Any

from decided_fleet import canary, hold, kill_child, receiving, staged

from weightsync_contract.messages import ServingState, Transfer, TransferState, VersionId
from weightsync_contract.reasons import Condition, FailureCode, Outcome, Reason
from weightsync_operator.core.model import Pause, Wave

V1, V2 = VersionId("a", 1), VersionId("a", 2)


def test_it_hangs_and_there_is_no_error(four: Any) -> None:
    """[trl 2923, 3925, 6796] Whatever step nobody answers in: it ends, names who, and the others serve on."""
    for version, step in enumerate(("join", "check", "commit"), 2):
        four.members[0].stuck = {step}
        # Another layout and a lost group, so that each step is taken again.
        four.memory = replace(four.memory, epoch=None)
        four.publish(version, layout=f"L{version}")
        four.wait(1000)
        assert four.memory.round is None, step
        assert four.serving()[1:] == [version] * 3, step
        assert any("m0" in message for message in four.events(Reason.EXCLUDED)), step
        four.members[0].stuck.clear()
        four.notes.clear()
        four.wait(1000)
        assert four.serving() == [version] * 4, step


def test_ranks_are_wrong_with_data_parallel_engines(make: Any) -> None:
    """[vllm 36932, 56949, SkyRL 1398, prime-rl 1693, 2199, 2707] Each member takes as many as it says, none twice."""
    fleet = make(members=0)
    for name, ranks in (("m0", 4), ("m1", 1), ("m2", 2)):
        fleet.join(name, ranks=ranks)
    fleet.publish(1)
    fleet.run()
    rows = [row.split(":")[:3] for row in fleet.status.group.members]
    assert rows == [["0", "1", "trainer"], ["1", "4", "m0"], ["5", "1", "m1"], ["6", "2", "m2"]]
    assert fleet.status.group.world_size == 8


def test_after_a_trainer_restart_every_server_has_to_be_restarted(synced: Any) -> None:
    """[vllm 40646] A new group without a restart of anybody, and the first publish of the new run goes through."""
    boots = [member.boot for member in synced.members]
    synced.trainer.restart_agent()
    synced.publish(1, run="b")
    synced.wait(10)
    assert [member.serving.version for member in synced.members] == [VersionId("b", 1)] * 2
    assert [member.boot for member in synced.members] == boots


def test_the_update_said_ok_and_no_byte_had_moved(synced: Any) -> None:
    """[vllm 57022] The sender's word counts for nothing: only who has the bytes, with their digest, switches."""
    hold(synced, "transfer")
    synced.publish(2)
    synced.until(lambda: receiving(synced))
    synced.trainer.transfer = replace(synced.trainer.transfer, state=TransferState.SENT)
    synced.wait(200)
    assert synced.serving() == [1, 1]
    assert all(member.told.commit is None for member in synced.members)


def test_uninitialised_memory_is_served(synced: Any) -> None:
    """[tokenspeed 1373] What arrived is not what was published: nobody is told to use it."""
    for member in synced.members:
        member.corrupts = True
    asked = []
    synced.hook = lambda world, plan: asked.extend(told.commit for told in plan.desired.values())
    synced.publish(2)
    synced.wait(1000)
    assert V2 not in asked
    assert synced.reason(Condition.PROGRESSING) is Reason.DIGEST_MISMATCH


def test_a_recovered_engine_gets_traffic_before_its_weights(synced: Any) -> None:
    """[miles 1724] Between its restart and its commit nothing that it has is allowed."""
    synced.members[0].restart_engine("boot-2")
    synced.members[0].stuck.add("commit")
    synced.wait(3)
    assert synced.step_is("Committing")()
    told = synced.members[0].told
    assert synced.members[0].serving.state is ServingState.INITIAL
    assert not told.serve_initial
    assert set(told.allowed) == {V1}
    assert synced.condition(Condition.READY)[0] == "False"


def test_the_version_goes_backwards(make: Any) -> None:
    """[miles 2244] Not by an older copy, a late word, another leader or a lost status; only if somebody says so."""
    fleet = make(members=3, spec={"retained_versions": 5})
    for number in (1, 2, 3):
        fleet.publish(number)
        fleet.run()
    seen = []
    fleet.hook = lambda world, plan: seen.extend(told.commit for told in plan.desired.values() if told.commit)
    versions = fleet.trainer.source.versions
    fleet.trainer.source = replace(fleet.trainer.source, versions=versions[:2])
    fleet.wait(100)
    fleet.restart_operator()
    fleet.wait(100)
    fleet.status = replace(fleet.status, current=None, rollout=None, group=None)
    fleet.restart_operator()
    fleet.action = "promote@a/1"
    fleet.wait(100)
    assert seen == []
    assert fleet.serving() == [3, 3, 3]


def test_a_fleet_serves_two_versions_and_nobody_knows(four: Any) -> None:
    """[dynamo 9131] Who is behind is named until he is not, and is withheld if it was not left as it is on purpose."""
    four.lose_session(four.members[0])
    four.publish(2)
    four.wait(30)
    assert [member.serving.version.version for member in four.members] == [1, 2, 2, 2]
    status, reason, message = four.condition(Condition.READY)
    assert (status, reason) == ("False", Reason.DEGRADED)
    assert "m0" in message
    four.resume_session(four.members[0])
    states = []
    four.hook = lambda *_: states.append((four.members[0].serving.state, four.members[0].serving.version))
    four.run()
    assert four.serving() == [2, 2, 2, 2]
    withheld = (ServingState.WITHHELD, V1)
    assert withheld in states, "it went on with the old version among the new ones"


def test_one_dead_rank_blocks_all_the_others(four: Any) -> None:
    """[NeMo-RL 3472, 3591] At once a group without it, in no time but what the others need."""
    hold(four, "transfer")
    four.publish(2)
    four.until(lambda: receiving(four))
    before = four.now
    kill_child(four, four.members[0])
    hold(four, "transfer", False)
    four.run()
    assert four.serving()[1:] == [2, 2, 2]
    assert four.now == before


def test_a_member_is_resumed_after_a_failed_update(synced: Any) -> None:
    """[sglang-omni 784] Fenced is no state to be committed to or allowed in; only its restart ends it."""
    hold(synced, "commit")
    synced.publish(2)
    synced.until(lambda: staged(synced))
    member = synced.members[0]
    synced.until(synced.step_is("Committing"))
    member.serving = replace(member.serving, state=ServingState.FENCED, version=None)
    hold(synced, "commit", False)
    asked = []
    synced.hook = lambda world, plan: asked.append(plan.desired[member.uid].commit)
    synced.wait(100)
    assert not any(asked[1:])
    assert member.serving.state is ServingState.FENCED
    assert synced.condition(Condition.MEMBERS_HEALTHY)[:2] == ("False", Reason.FENCED)


def test_groups_can_not_change_after_they_were_made(synced: Any) -> None:
    """[vllm 31848] Members come and go; each time another epoch, never a changed one."""
    maps: dict[int, tuple[str, ...]] = {}

    def look(world: Any, plan: Any) -> None:
        group = plan.status.group
        assert maps.setdefault(group.epoch, group.members) == group.members

    synced.hook = look
    for number in range(3):
        synced.join(f"n{number}")
        synced.publish(number + 2)
        synced.run()
        synced.leave(synced.members[0] if number == 0 else synced.members[-2])
        synced.run()
    assert len(maps) >= 3
    assert set(synced.serving()) == {4}


def test_a_new_version_in_mid_rollout_gets_stuck(make: Any) -> None:
    """[argo 3331, kuberay 4989] In every step of a rollout in waves a newer one comes, and is served in the end."""
    for step in ("Listening", "Checking", "Transferring", "Committing"):
        fleet = canary(make, [Wave("1", Pause(10.0))])
        fleet.memory = replace(fleet.memory, epoch=None)
        fleet.publish(2, layout="L2")
        fleet.until(fleet.step_is(step))
        fleet.publish(3, layout="L2")
        fleet.wait(100)
        assert fleet.serving() == [3] * 4, step


def test_a_rollout_stays_stuck_after_the_bad_spec_was_reverted(synced: Any) -> None:
    """[CNPG 3541]"""
    good = synced.spec
    synced.spec = replace(good, unsupported=("dataPlane.type Engine (planned for 0.2)",))
    synced.generation += 1
    synced.publish(2)
    synced.wait(1000)
    assert synced.reason(Condition.READY) is Reason.UNSUPPORTED
    synced.spec = good
    synced.generation += 1
    synced.run()
    assert synced.serving() == [2, 2]
    assert synced.reason(Condition.READY) is Reason.SYNCED


def test_an_upgrade_of_the_operator_restarts_or_updates_everything(make: Any) -> None:
    """[CNPG 5950, lws 225] A canary stays a canary, nobody is told anything new, and nobody moves."""
    fleet = canary(make, [Wave("1", Pause())])
    fleet.publish(2)
    fleet.run()
    before = fleet.serving()
    told = [replace(member.told, term=0, seq=0) for member in fleet.members]
    for _ in range(5):
        fleet.restart_operator()
        fleet.wait(100)
    assert fleet.serving() == before
    for member, old in zip(fleet.members, told, strict=True):
        assert replace(member.told, term=0, seq=0, commit=None, commit_digest="") == replace(
            old, commit=None, commit_digest=""
        )


def test_it_failed_and_there_is_no_event_and_no_reason(four: Any) -> None:
    """[cert-manager 9139] Each way to fail has its reason in a condition and one Event with the same word."""
    codes = {
        "join": (FailureCode.CHILD_FAILED, Reason.TRANSFER_FAILED),
        "check": (FailureCode.MANIFEST_REFUSED, Reason.MANIFEST_REFUSED),
        "transfer": (FailureCode.DIGEST_MISMATCH, Reason.DIGEST_MISMATCH),
        "commit": (FailureCode.APPLY_FAILED, Reason.ENGINE_REJECTED),
    }
    for version, (step, (code, reason)) in enumerate(codes.items(), 2):
        four.notes.clear()
        four.memory = replace(four.memory, epoch=None, exclusions=())
        for member in four.members:
            member.transfer = Transfer()
            member.fails[step] = code
        four.publish(version, layout=f"L{version}")
        four.wait(10)
        assert four.status.rollout.outcome is Outcome.FAILED, step
        assert four.condition(Condition.PROGRESSING)[:2] == ("False", reason), step
        assert len(four.events(reason)) == 1, step
        for member in four.members:
            member.fails.clear()
