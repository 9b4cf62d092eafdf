"""A fleet of obedient agents around decide: enough of an agent to have all of decide's rules meet their case.

Fake on purpose: what real agents do with what they are told is tested in tests/simulation, on their own core.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from weightsync_contract.codec import dumps, loads
from weightsync_contract.messages import (
    Capability,
    Desired,
    Failure,
    Hello,
    ObjectRef,
    Observed,
    Phase,
    PodRef,
    Published,
    Serving,
    ServingState,
    Source,
    Timeouts,
    Transfer,
    TransferState,
    VersionId,
)
from weightsync_contract.reasons import Condition, FailureCode, Reason, Role
from weightsync_operator.core.decide import decide
from weightsync_operator.core.memory import Memory
from weightsync_operator.core.model import (
    AgentView,
    Note,
    Plan,
    PodView,
    Selector,
    Spec,
    Status,
    Verdict,
    World,
)

CAPABILITIES = tuple(Capability)
REF = ObjectRef("rl", "policy", "cr-1")


@dataclass
class Agent:
    """``stuck`` and ``fails`` name the steps (join, check, transfer, commit) that it does not do."""

    name: str
    role: Role
    ranks: int = 1
    boot: str = "boot-1"
    incarnation: str = "1"
    connected: bool = True
    changed_at: float = 0.0
    nacked_term: int = 0
    highest_term: int = 0
    capabilities: tuple[Capability, ...] = CAPABILITIES
    stuck: set[str] = field(default_factory=set)
    fails: dict[str, Failure | FailureCode] = field(default_factory=dict)
    transfer: Transfer = field(default_factory=Transfer)
    serving: Serving = field(default_factory=lambda: Serving(ServingState.INITIAL, "boot-1"))
    source: Source | None = None
    corrupts: bool = False
    told: Desired | None = None
    reported: bool = True
    exists: bool = True
    finished: bool = False
    succeeded: bool = False
    terminating: bool = False
    labels: tuple[tuple[str, str], ...] = ()
    has_agent: bool = True
    generation: int = 1

    @property
    def uid(self) -> str:
        return f"uid-{self.name}" if self.generation == 1 else f"uid-{self.name}-{self.generation}"

    def pod(self) -> PodView:
        return PodView(
            self.uid,
            "rl",
            self.name,
            self.labels,
            "10.0.0.1",
            self.terminating,
            self.finished,
            self.succeeded,
        )

    def view(self) -> AgentView:
        hello = Hello(1, 1, PodRef("rl", self.name, self.uid), self.role, self.incarnation, self.highest_term)
        observed = Observed(
            self.told.term if self.told else 0,
            0,
            self.highest_term,
            self.ranks,
            self.transfer,
            self.serving if self.role is Role.INFERENCE else None,
            self.source,
            self.capabilities if self.role is Role.INFERENCE else (),
        )
        # What decide sees has been through the wire.
        observed = loads(Observed, dumps(observed))
        return AgentView(
            hello, observed if self.reported else None, self.connected, self.changed_at, self.nacked_term
        )

    def fail(self, step: str) -> bool:
        """Whether this step goes wrong here; says so."""
        what = self.fails.pop(step, None)
        if what is None:
            return False
        epoch, version = self.transfer.epoch, None
        if step == "join" and self.told and self.told.group:
            epoch = self.told.group.epoch
        if self.told and self.told.wanted:
            version = self.told.wanted.version
        failure = what if isinstance(what, Failure) else Failure(what, f"broken at {step}", epoch, version)
        if step == "commit":
            self.serving = replace(self.serving, failure=replace(failure, version=self.told.commit))
        elif failure.code in (FailureCode.MANIFEST_REFUSED, FailureCode.DIGEST_MISMATCH):
            self.transfer = replace(self.transfer, state=TransferState.JOINED, failure=failure)
        else:
            self.transfer = Transfer(epoch=epoch, failure=failure)
        return True

    def restart_engine(self, boot: str) -> None:
        self.boot = boot
        self.serving = Serving(ServingState.INITIAL, boot)

    def restart_agent(self) -> None:
        self.incarnation += "+"
        self.transfer, self.told = Transfer(), None


def published(version: int, run: str = "a", layout: str = "L1", digest: str = "") -> Published:
    return Published(VersionId(run, version), layout, digest or f"d-{run}-{version}", 1000, 3)


class Fleet:
    """One WeightSync with its pods, in a time of its own."""

    def __init__(self, members: int = 2, spec: dict[str, Any] | None = None) -> None:
        self.spec = Spec(
            Selector((("app", "trainer"),)),
            Selector((("app", "vllm"),)),
            timeouts=Timeouts(60.0, 300.0, 60.0),
            **(spec or {}),
        )
        self.generation = 1
        self.now = 1000.0
        self.leading_since = 900.0
        self.status, self.memory = Status(), Memory()
        self.trainer = self.add_trainer("trainer")
        self.others: list[Agent] = []
        self.members = [self.add_member(f"m{number}") for number in range(members)]
        self.claims: dict[str, ObjectRef] = {}
        self.plans: list[Plan] = []
        self.notes: list[Note] = []
        self.writes: list[Status] = []
        self.nonces = 0
        self.hook: Callable[[World, Plan], None] | None = None
        self.action = ""
        self.verdict: Verdict | None = None

    # -- who is there

    def add_trainer(self, name: str) -> Agent:
        return Agent(name, Role.TRAINER, source=Source())

    def add_member(self, name: str, **changes: Any) -> Agent:
        return Agent(name, Role.INFERENCE, **changes)

    def join(self, name: str, **changes: Any) -> Agent:
        member = self.add_member(name, changed_at=self.now, **changes)
        self.members.append(member)
        return member

    def leave(self, member: Agent) -> None:
        member.exists = False

    def publish(self, version: int, run: str = "a", by: Agent | None = None, **changes: Any) -> VersionId:
        trainer = by or self.trainer
        assert trainer.source is not None
        new = published(version, run, **changes)
        kept = (*trainer.source.versions, new)[-self.spec.retained_versions :]
        trainer.source = replace(trainer.source, run=run, connected=True, versions=kept)
        return new.version

    @property
    def agents(self) -> list[Agent]:
        return [each for each in (self.trainer, *self.others, *self.members) if each.exists]

    # -- passes

    def world(self) -> World:
        self.nonces += 1
        trainers = [each.pod() for each in self.agents if each.role is Role.TRAINER]
        members = [each.pod() for each in self.agents if each.role is Role.INFERENCE]
        return World(
            REF,
            self.generation,
            self.spec,
            self.status,
            tuple(trainers),
            tuple(members),
            {each.uid: each.view() for each in self.agents if each.has_agent},
            self.claims,
            self.leading_since,
            self.now,
            f"2026-11-24T09:00:00Z+{self.now}",
            f"nonce-{self.nonces}",
            self.action,
            self.verdict,
        )

    def decide(self) -> Plan:
        """One pass: decide, write, send."""
        world = self.world()
        plan, memory = decide(world, self.memory)
        if self.hook:
            self.hook(world, plan)
        if plan.status != self.status:
            self.writes.append(plan.status)
            self.status = plan.status
        self.memory = memory
        self.plans.append(plan)
        self.notes.extend(plan.notes)
        for agent in self.agents:
            if agent.uid in plan.desired and agent.connected:
                agent.told = plan.desired[agent.uid]
                agent.highest_term = max(agent.highest_term, agent.told.term)
        return plan

    def obey(self) -> None:
        """Every agent does one thing that it was told and can do."""
        for agent in self.agents:
            if agent.connected and agent.told is not None and agent.has_agent:
                _obey(self, agent, agent.told)

    def run(self, passes: int = 40) -> Plan:
        """Decide and obey until nothing changes any more, in no time."""
        for _ in range(passes):
            before = (self.status, self.memory, [each.view() for each in self.agents])
            plan = self.decide()
            self.obey()
            if before == (self.status, self.memory, [each.view() for each in self.agents]):
                return plan
        raise AssertionError("the fleet does not come to rest")

    def until(self, condition: Callable[[], bool], passes: int = 60) -> Plan:
        """Decide and obey until something holds, in no time."""
        for _ in range(passes):
            plan = self.decide()
            if condition():
                return plan
            self.obey()
        raise AssertionError(f"never came: {self.memory.round} {self.memory.epoch}")

    def wait(self, seconds: float) -> Plan:
        """Let time pass, waking whenever decide asked for it."""
        end = self.now + seconds
        plan = self.run()
        while plan.requeue_after is not None and self.now + plan.requeue_after < end:
            self.now += max(plan.requeue_after, 0.001)
            plan = self.run()
        self.now = end
        return self.run()

    def step_is(self, step: str) -> Callable[[], bool]:
        return lambda: self.memory.round is not None and self.memory.round.step.value == step

    def restart_operator(self) -> None:
        self.memory = Memory()
        self.leading_since = self.now

    def lose_session(self, agent: Agent) -> None:
        agent.connected, agent.changed_at = False, self.now

    def resume_session(self, agent: Agent) -> None:
        agent.connected, agent.changed_at = True, self.now

    # -- what is seen

    def condition(self, type_: Condition) -> tuple[str, Reason, str]:
        row = next(each for each in self.status.conditions if each.type == type_.value)
        return row.status, Reason(row.reason), row.message

    def reason(self, type_: Condition) -> Reason:
        return self.condition(type_)[1]

    def serving(self) -> list[int | None]:
        return [
            each.serving.version.version
            if each.serving.state is ServingState.SERVING and each.serving.version
            else None
            for each in self.members
            if each.exists
        ]

    def events(self, reason: Reason) -> list[str]:
        return [note.message for note in self.notes if note.reason == reason]


def _obey(fleet: Fleet, agent: Agent, told: Desired) -> None:
    _serve(agent, told)
    group, transfer = told.group, agent.transfer
    if transfer.epoch and transfer.nonce and (group is None or (group.epoch, group.nonce) != _key(agent)):
        kept = transfer.state is TransferState.STAGED
        agent.transfer = (
            replace(transfer, epoch=0, nonce="", endpoint="")
            if kept
            else Transfer(checked=transfer.checked, failure=transfer.failure)
        )
        return
    if group is not None and not transfer.nonce:
        if "join" in agent.stuck or agent.fail("join"):
            return
        failed = transfer.failure
        if failed and failed.epoch == group.epoch:
            return
        endpoint = f"10.0.0.1:{2000 + group.epoch}" if group.rank == 0 else ""
        state = transfer.state if transfer.state is TransferState.STAGED else TransferState.JOINING
        agent.transfer = replace(
            transfer, state=state, epoch=group.epoch, nonce=group.nonce, endpoint=endpoint, failure=None
        )
        return
    if transfer.state is TransferState.JOINING and group is not None:
        ranks = sum(each.ranks for each in fleet.agents if _key(each) == _key(agent))
        if ranks == group.world_size:
            agent.transfer = replace(transfer, state=TransferState.JOINED)
        return
    named = (told.commit, told.wanted.version if told.wanted else None)
    if transfer.state is TransferState.STAGED and transfer.version not in named:
        state = TransferState.JOINED if transfer.nonce else TransferState.IDLE
        agent.transfer = replace(transfer, state=state, version=None, digest="")
        return
    if transfer.state is TransferState.SENT and told.wanted is None:
        agent.transfer = replace(transfer, state=TransferState.JOINED, version=None)
        return
    if told.wanted is not None and transfer.nonce:
        _move(fleet, agent, told)


def _key(agent: Agent) -> tuple[int, str]:
    return agent.transfer.epoch, agent.transfer.nonce


def _move(fleet: Fleet, agent: Agent, told: Desired) -> None:
    wanted, transfer = told.wanted, agent.transfer
    assert wanted is not None
    if wanted.phase is Phase.CHECK:
        if transfer.checked != wanted.layout and "check" not in agent.stuck and not agent.fail("check"):
            agent.transfer = replace(transfer, checked=wanted.layout)
        return
    if transfer.version == wanted.version and transfer.state in (TransferState.STAGED, TransferState.SENT):
        return
    if agent.serving.version == wanted.version and agent.role is Role.INFERENCE:
        return
    if transfer.failure and transfer.failure.version == wanted.version:
        return
    busy = TransferState.SENDING if agent.role is Role.TRAINER else TransferState.RECEIVING
    if transfer.state is not busy:
        agent.transfer = replace(transfer, state=busy, version=wanted.version, digest="")
        return
    peers = [each for each in fleet.agents if _key(each) == _key(agent)]
    if any("transfer" in each.stuck for each in peers) or agent.fail("transfer"):
        return
    if agent.role is Role.TRAINER:
        agent.transfer = replace(transfer, state=TransferState.SENT)
        return
    digest = "corrupt" if agent.corrupts else f"d-{wanted.version.run}-{wanted.version.version}"
    agent.transfer = replace(transfer, state=TransferState.STAGED, digest=digest)


def _serve(agent: Agent, told: Desired) -> None:
    if agent.role is Role.TRAINER:
        return
    serving, transfer = agent.serving, agent.transfer
    clean = (ServingState.INITIAL, ServingState.SERVING, ServingState.WITHHELD)
    staged = transfer.state is TransferState.STAGED and transfer.version == told.commit
    if told.commit and staged and serving.version != told.commit and serving.state in clean:
        if "commit" in agent.stuck or agent.fail("commit"):
            return
        agent.serving = Serving(ServingState.SERVING, agent.boot, told.commit, transfer.digest)
        state = TransferState.JOINED if transfer.nonce else TransferState.IDLE
        agent.transfer = replace(transfer, state=state, version=None, digest="")
        return
    allowed = serving.version in told.allowed or serving.version == told.commit
    if serving.state is ServingState.SERVING and not allowed:
        agent.serving = replace(serving, state=ServingState.WITHHELD)
    elif serving.state is ServingState.WITHHELD and allowed:
        agent.serving = replace(serving, state=ServingState.SERVING)


@pytest.fixture
def make() -> type[Fleet]:
    """A fleet: ``make(members=2, spec={...})``."""
    return Fleet


@pytest.fixture
def synced(make: type[Fleet]) -> Fleet:
    """Two members that serve version 1."""
    fleet = make()
    fleet.publish(1)
    fleet.run()
    assert fleet.serving() == [1, 1]
    return fleet


@pytest.fixture
def four(make: Any) -> Any:
    """Four members that serve version 1; one may be missing."""
    fleet = make(members=4)
    fleet.publish(1)
    fleet.run()
    fleet.notes.clear()
    return fleet
