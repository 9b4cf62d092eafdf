"""What holds in every pass, whatever happens to the fleet: random histories, each plan checked."""

from dataclasses import dataclass, field, replace
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from weightsync_contract.messages import Failure, ServingState, Transfer, TransferState, VersionId
from weightsync_contract.reasons import FailureCode, Outcome
from weightsync_operator.core.memory import Step
from weightsync_operator.core.model import Plan, Status, World

MEMBERS = 4
ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(
            [
                "pass",
                "pass",
                "obey",
                "obey",
                "run",
                "publish",
                "new run",
                "time",
                "long",
                "child dies",
                "agent restarts",
                "engine restarts",
                "session lost",
                "session back",
                "stuck",
                "unstuck",
                "corrupts",
                "fenced",
                "pod leaves",
                "pod joins",
                "operator dies",
                "pause",
                "edit",
                "refuses",
                "trainer's child dies",
                "fails to join",
            ]
        ),
        st.integers(0, MEMBERS + 1),
        st.sampled_from(["join", "check", "transfer", "commit"]),
    ),
    min_size=5,
    max_size=60,
)


@dataclass
class Checker:
    """Sees every world and every plan for it."""

    fleet: Any
    maps: dict[tuple[int, str], dict[int, str]] = field(default_factory=dict)
    nonces: dict[int, str] = field(default_factory=dict)
    highest: int = 0
    outcomes: list[Outcome] = field(default_factory=list)

    def __call__(self, world: World, plan: Plan) -> None:
        self.terms(world, plan)
        self.ranks(world, plan)
        self.commits(world, plan)
        self.status(world, plan)
        if plan.view is not None:
            assert plan.view.phase
            assert plan.view.message

    def terms(self, world: World, plan: Plan) -> None:
        for told in plan.desired.values():
            assert told.term == world.status.term == plan.status.term > 0, "sent before it was written"

    def ranks(self, world: World, plan: Plan) -> None:
        for uid, told in plan.desired.items():
            group = told.group
            if group is None:
                continue
            known = self.maps.setdefault((group.epoch, group.nonce), {})
            for rank in range(group.rank, group.rank + group.ranks):
                assert known.setdefault(rank, uid) == uid, "a rank map changed"
            assert group.rank + group.ranks <= group.world_size
            if group.rank:
                assert plan.status.group.epoch == group.epoch, "ranks were given before they were written"
                assert plan.status.group.endpoint == group.endpoint != ""
                assert self.nonces.setdefault(group.epoch, group.nonce) == group.nonce, "an epoch again"
        written = plan.status.group
        if written is None or written == world.status.group:
            return
        before = world.status.group.epoch if world.status.group else 0
        assert written.epoch > before, "an epoch number was used again"
        at = 0
        for row in written.members:
            rank, ranks, *_ = row.split(":")
            assert int(rank) == at, "ranks have a gap"
            at += int(ranks)
        assert written.world_size == at == 1 + sum(int(row.split(":")[1]) for row in written.members[1:])

    def commits(self, world: World, plan: Plan) -> None:
        for uid, told in plan.desired.items():
            if told.commit is None:
                continue
            observed = world.agents[uid].observed
            assert observed is not None
            assert observed.serving is not None
            serving, transfer = observed.serving, observed.transfer
            held = serving.version
            clean = serving.state in (ServingState.SERVING, ServingState.WITHHELD)
            if clean and held is not None and held.run == told.commit.run:
                assert held.version <= told.commit.version, "told to go back"
            source = f"d-{told.commit.run}-{told.commit.version}"
            assert told.commit_digest == source
            if transfer.state is TransferState.STAGED and transfer.version == told.commit:
                assert transfer.digest == source, "told to commit other bytes"

    def status(self, world: World, plan: Plan) -> None:
        before, after = world.status.current, plan.status.current
        if before and after and before.run == after.run:
            assert after.version >= before.version, "the current version went back"
        memory = self.fleet.memory
        rollout = plan.status.rollout
        ended = rollout is not None and rollout != world.status.rollout
        if ended and rollout.outcome is Outcome.SUCCEEDED and memory.round is not None:
            version = VersionId(rollout.run, rollout.version)
            lacking = [
                uid
                for uid in memory.round.scope
                if any(pod.uid == uid for pod in world.members)
                and (observed := world.agents[uid].observed)
                and observed.serving
                and observed.serving.version != version
            ]
            beyond = [uid for uid in lacking if self.ahead(world, uid, version)]
            assert len(lacking) - len(beyond) <= self.allowed(world), "succeeded without too many"
        types = [row.type for row in plan.status.conditions]
        assert len(types) == len(set(types))
        assert all(row.message and row.last_transition_time for row in plan.status.conditions)

    @staticmethod
    def ahead(world: World, uid: str, version: VersionId) -> bool:
        held = world.agents[uid].observed.serving.version  # type: ignore[union-attr]
        return held is not None and held.run == version.run and held.version > version.version

    @staticmethod
    def allowed(world: World) -> int:
        total = sum(not pod.finished and not pod.terminating for pod in world.members)
        return max(1, -(-total * 25 // 100))


def act(fleet: Any, action: str, number: int, step: str) -> None:
    members = [each for each in fleet.members if each.exists]
    member = members[number % len(members)] if members else None
    match action:
        case "pass":
            fleet.decide()
        case "obey":
            fleet.obey()
        case "run":
            for _ in range(number + 2):
                fleet.decide()
                fleet.obey()
        case "publish":
            versions = fleet.trainer.source.versions
            last = versions[-1].version if versions else VersionId("a", 0)
            fleet.publish(last.version + 1, run=last.run)
        case "new run":
            run = fleet.trainer.source.run or "a"
            fleet.publish(1, run=run + "x")
        case "time":
            fleet.now += 0.5 + number
        case "long":
            fleet.now += 30.0 * number
        case "trainer's child dies":
            epoch = fleet.trainer.transfer.epoch
            failure = Failure(FailureCode.CHILD_FAILED, "killed", epoch)
            fleet.trainer.transfer = Transfer(epoch=epoch, failure=failure)
        case "operator dies":
            fleet.restart_operator()
        case "pause":
            fleet.spec = replace(fleet.spec, paused=not fleet.spec.paused)
            fleet.generation += 1
        case "edit":
            fleet.generation += 1
        case "pod joins" if len(members) < MEMBERS + 2:
            fleet.join(f"n{len(fleet.members)}", ranks=number % 3)
        case _ if member is not None:
            harm(fleet, member, action, step)


def harm(fleet: Any, member: Any, action: str, step: str) -> None:
    match action:
        case "child dies":
            epoch = member.transfer.epoch
            failure = Failure(FailureCode.CHILD_FAILED, "killed", epoch)
            member.transfer = Transfer(epoch=epoch, failure=failure, checked=member.transfer.checked)
        case "agent restarts":
            member.restart_agent()
        case "engine restarts":
            member.restart_engine(member.boot + "+")
            member.ranks = 1
        case "session lost":
            fleet.lose_session(member)
        case "session back":
            fleet.resume_session(member)
        case "stuck":
            member.stuck.add(step)
        case "unstuck":
            member.stuck.clear()
            member.corrupts = False
        case "corrupts":
            member.corrupts = True
        case "fenced":
            member.serving = replace(member.serving, state=ServingState.FENCED, version=None)
        case "pod leaves":
            fleet.leave(member)
        case "refuses":
            member.fails["check"] = FailureCode.MANIFEST_REFUSED
        case "fails to join":
            member.fails["join"] = FailureCode.CHILD_FAILED


SETTINGS = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@SETTINGS
@given(ACTIONS)
def test_every_plan_of_a_random_history(make: Any, actions: list[tuple[str, int, str]]) -> None:
    fleet = make(members=MEMBERS)
    fleet.publish(1)
    fleet.hook = Checker(fleet)
    for action, number, step in actions:
        act(fleet, action, number, step)
    fleet.decide()


@settings(SETTINGS, max_examples=60)
@given(ACTIONS)
def test_what_waits_is_woken_and_comes_to_an_end(make: Any, actions: list[tuple[str, int, str]]) -> None:
    """After the last fault: within the sum of the deadlines each member is on target, or it is said why not."""
    fleet = make(members=MEMBERS)
    fleet.publish(1)
    checker = fleet.hook = Checker(fleet)
    for action, number, step in actions:
        act(fleet, action, number, step)
    fleet.spec = replace(fleet.spec, paused=False)
    fleet.generation += 1
    for member in (*fleet.members, fleet.trainer):
        member.stuck.clear()
        member.fails.clear()
        member.corrupts = False
        member.ranks = max(member.ranks, 1)
        fleet.resume_session(member)
        if member.serving.state is ServingState.FENCED:
            member.restart_engine(member.boot + "+")
    fleet.hook = checker
    plan = fleet.wait(2000)
    assert fleet.memory.round is None
    assert plan.requeue_after is None
    view = {row.uid: row for row in plan.view.members}
    for member in fleet.members:
        if not member.exists:
            continue
        served = member.serving.version if member.serving.state is ServingState.SERVING else None
        latest = fleet.trainer.source.versions[-1].version
        failed = fleet.status.rollout is not None and fleet.status.rollout.outcome is Outcome.FAILED
        assert served == latest or failed or view[member.uid].message, member


@SETTINGS
@given(st.integers(0, 12), st.integers(0, 3))
def test_an_epoch_number_is_higher_than_any_that_anybody_knows(make: Any, written: int, told: int) -> None:
    fleet = make()
    fleet.status = Status(group=None)
    fleet.members[0].transfer = Transfer(epoch=written)
    fleet.members[1].transfer = Transfer(failure=Failure(FailureCode.CHILD_FAILED, "", epoch=told))
    fleet.publish(1)
    fleet.until(lambda: fleet.memory.round is not None and fleet.memory.round.step is Step.LISTENING)
    assert fleet.memory.epoch.number == max(written, told) + 1
