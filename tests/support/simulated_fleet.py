"""A whole fleet in virtual time: the operator's real decide, the agents' real core, and all that can fail."""

from dataclasses import replace
from typing import Any

from simulated_agent import Groups, SimAgent
from simulated_history import History
from simulated_time import Clock
from simulated_user import User

from weightsync_contract.messages import Desired, Nack, ObjectRef, Observed, ServingState, Timeouts, VersionId
from weightsync_contract.reasons import RefusalCode, Role
from weightsync_engine.agent.core import events as ev
from weightsync_operator.core.decide import decide
from weightsync_operator.core.memory import Memory
from weightsync_operator.core.model import AgentView, PodView, Selector, Spec, Status, World

REF = ObjectRef("ns", "policy", "cr-1")
TIMEOUTS = Timeouts(join=10.0, transfer=20.0, commit=10.0)
PROGRESS = 120.0
FAULT_SECONDS = 60.0
SETTLE_SECONDS = 400.0
"""Within this after the last fault everybody is on target or says why not: two rollouts with retries."""


class Simulation:
    """``run`` raises ViolationError, or AssertionError when the fleet does not come to rest."""

    def __init__(self, seed: int, faults: bool = True, meddles: bool | None = None) -> None:
        self.seed = seed
        self.clock = Clock(seed)
        self.history = History()
        random = self.clock.random
        self.groups = Groups(self.clock, faults=faults)
        self.members = [self._agent(f"m{number}", Role.INFERENCE) for number in range(random.randint(2, 4))]
        self.trainer = self._agent("trainer", Role.TRAINER)
        self.agents = {each.uid: each for each in (self.trainer, *self.members)}
        self.user = User(self, faults if meddles is None else meddles)
        self.generation = 1
        self.spec = Spec(
            Selector((("app", "trainer"),)),
            Selector((("app", "vllm"),)),
            timeouts=TIMEOUTS,
            progress_seconds=PROGRESS,
            max_unavailable=random.choice(["25%", "50%", "1", "0"]),
            waves=self.user.waves,
            on_failure=self.user.on_failure,
        )
        self.status = Status()
        self.revision = 0
        self.operator = Operator(self)
        self.versions = random.randint(2, 3)
        self.faults = faults
        self.dropped_until: dict[str, float] = {}

    def _agent(self, name: str, role: Role) -> SimAgent:
        agent = SimAgent(self.clock, self.history, self.groups, name, role)
        # The operator is made after the agents.
        agent.report = agent.nack = self._to_operator
        return agent

    def _to_operator(self, agent: SimAgent, message: Observed | Nack) -> None:
        self.operator.hear_later(agent, message)

    # -- running

    def run(self) -> None:
        clock = self.clock
        for agent in self.agents.values():
            clock.soon(0.0, 2.0, agent.born)
            clock.soon(2.0, 3.0, lambda agent=agent: self.dial(agent))
        self.operator.start()
        for number in range(self.versions):
            at = clock.random.uniform(1.0, FAULT_SECONDS * 0.9)
            clock.after(at, lambda: None)
            clock.soon(
                number * FAULT_SECONDS / self.versions,
                (number + 1) * FAULT_SECONDS / self.versions,
                lambda number=number: self.trainer.publish(VersionId("run", number + 1)),
            )
        if self.faults:
            for _ in range(clock.random.randint(1, 6)):
                clock.soon(1.0, FAULT_SECONDS, self._fault)
        self.user.begin(FAULT_SECONDS)
        clock.run(1000.0 + FAULT_SECONDS)
        if not clock.run(1000.0 + FAULT_SECONDS + SETTLE_SECONDS, self.settled):
            raise AssertionError(f"not settled: {self.describe()}")

    def settled(self) -> bool:
        """Nothing is under way, and each member serves the newest version or is said why not, for good."""
        return (
            self.operator.up
            and self.operator.memory.round is None
            and self.operator.memory.parked is None
            and self.spec.pin is None
            and self.published()
            and all(self.serves(member) or self._given_up(member) for member in self.members)
        )

    def published(self) -> bool:
        """Whether the trainer has published all it will."""
        return bool(self.trainer.stored) and self.trainer.stored[-1].version.version == self.versions

    def newest(self) -> VersionId:
        """What the fleet is to serve at the end: the newest version, unless somebody gave it up."""
        newest, current = VersionId("run", self.versions), self.status.current
        given_up = any(each.version >= self.versions for each in self.status.rejected)
        return VersionId(current.run, current.version) if given_up and current else newest

    def serves(self, member: SimAgent) -> bool:
        """Whether its engine answers from the newest version."""
        permit, engine, newest = member.permit, member.engine, self.newest()
        answers = engine.up and permit is not None and permit.boot == engine.boot
        return answers and permit is not None and permit.version == newest == (engine.weights or (None,))[0]

    def _given_up(self, member: SimAgent) -> bool:
        view, rollout = self.operator.view, self.status.rollout
        row = next((each for each in view.members if each.uid == member.uid), None) if view else None
        if row is None or row.serving is None:
            return False
        if rollout and (rollout.version, rollout.outcome) == (self.versions, "Failed"):
            return (
                row.serving.state is ServingState.SERVING or bool(row.message) or self.status.current is None
            )
        exclusion = self.operator.memory.exclusion(member.uid)
        lasting = exclusion is not None and exclusion.active and exclusion.until == float("inf")
        fenced = row.serving.state is ServingState.FENCED and row.serving.fences >= 3
        return bool(row.message) and (lasting or fenced)

    def describe(self) -> str:
        rows = [
            f"{each.name}: {each.state.serving.state} {each.state.serving.version} "
            f"{each.state.transfer.state} {each.state.transfer.failure}"
            for each in self.members
        ]
        memory = self.operator.memory
        return "\n".join([str(memory.round), str(memory.exclusions), str(self.status.conditions), *rows])

    # -- faults

    def _fault(self) -> None:
        random = self.clock.random
        victim = random.choice(list(self.agents.values()))
        kinds: list[Any] = [
            victim.child_dies,
            victim.child_dies,
            victim.child_freezes,
            lambda: self._restart_agent(victim),
            lambda: self._partition(victim),
            self._wipe,
            self.operator.restart,
            self.operator.restart,
        ]
        if victim.role is Role.INFERENCE:
            kinds += [victim.engine_dies, victim.engine_dies]
        random.choice(kinds)()

    def _wipe(self) -> None:
        """The status is lost, and with it, half of the times, the operator."""
        if not self.clock.chance(0.3):
            return
        self.history.note(self.clock.now, "status is wiped")
        self.status = Status()
        if self.clock.chance(0.5):
            self.operator.restart()
        self.operator.wake()

    def _restart_agent(self, agent: SimAgent) -> None:
        agent.dies()
        self.operator.hang_up(agent)

        def back() -> None:
            agent.born()
            self.clock.soon(0.1, 1.0, lambda: self.dial(agent))

        self.clock.soon(0.3, 3.0, back)

    def _partition(self, agent: SimAgent) -> None:
        seconds = self.clock.random.uniform(0.5, 20.0)
        self.history.note(self.clock.now, f"{agent.name}: cut off for {seconds:.1f} s")
        self.dropped_until[agent.uid] = self.clock.now + seconds
        self.operator.hang_up(agent)
        agent.post(ev.SessionClosed())
        self.clock.after(seconds, lambda: self.dial(agent))

    def dial(self, agent: SimAgent) -> None:
        """The agent dials until the operator is there."""
        if not agent.alive or self.operator.connected(agent):
            return
        if not self.operator.up or self.dropped_until.get(agent.uid, 0) > self.clock.now:
            self.clock.soon(0.1, 5.0, lambda: self.dial(agent))
            return
        self.operator.welcome(agent)


class Operator:
    """What is around decide: sessions, the status with its revision, one leader after the other."""

    def __init__(self, simulation: Simulation) -> None:
        self.sim = simulation
        self.clock = simulation.clock
        self.memory = Memory()
        self.leading_since = 0.0
        self.views: dict[str, AgentView] = {}
        self.sessions: dict[str, int] = {}
        self.asked: dict[str, Desired] = {}
        self.heard: dict[str, int] = {}
        self.seq = 0
        self.count = 0
        self.life = 0
        self.up = False
        self.view: Any = None
        self._due: float | None = None

    # -- life

    def start(self) -> None:
        self.life += 1
        self.up, self.memory, self.leading_since = True, Memory(), self.clock.now
        self.views, self.sessions, self.asked, self.seq, self._due = {}, {}, {}, 0, None
        self.sim.history.note(self.clock.now, "operator starts")
        self._wake(0.05)

    def restart(self) -> None:
        """Killed; another one leads some time later."""
        if not self.up:
            return
        self.sim.history.note(self.clock.now, "operator dies")
        self.up = False
        self.life += 1
        for agent in self.sim.agents.values():
            if agent.uid in self.sessions and agent.alive:
                agent.post(ev.SessionClosed())
            self.clock.soon(0.1, 5.0, lambda agent=agent: self.sim.dial(agent))
        self.sessions = {}
        self.clock.soon(0.1, 15.0, self.start)

    # -- sessions

    def connected(self, agent: SimAgent) -> bool:
        return agent.uid in self.sessions

    def welcome(self, agent: SimAgent) -> None:
        self.count += 1
        self.sessions[agent.uid] = self.count
        known = self.views.get(agent.uid)
        same = known is not None and known.hello.incarnation == agent.incarnation
        observed = known.observed if known and same else None
        nacked = known.nacked_term if known else 0
        self.views[agent.uid] = AgentView(agent.hello(), observed, True, self.clock.now, nacked)
        self.asked.pop(agent.uid, None)
        agent.post(ev.SessionOpened())
        self._wake()

    def hang_up(self, agent: SimAgent) -> None:
        if self.sessions.pop(agent.uid, None) is None:
            return
        view = self.views[agent.uid]
        self.views[agent.uid] = replace(view, connected=False, changed_at=self.clock.now)
        self._wake()

    def hear_later(self, agent: SimAgent, message: Observed | Nack) -> None:
        """Through the session that there is: in order, after a while, or with a keep-alive after a loss."""
        session = self.sessions.get(agent.uid)
        if session is None:
            return
        self.count += 1
        number = self.count
        delay = self.clock.random.uniform(0.001, 0.03)
        if self.clock.chance(0.02):
            delay += self.clock.random.uniform(0.5, 5.0)

        def arrive() -> None:
            if self.sessions.get(agent.uid) != session:
                return
            view = self.views[agent.uid]
            if isinstance(message, Nack):
                taken = message.code is RefusalCode.STALE_SEQ and message.seq > self.seq
                if taken or message.code is RefusalCode.STALE_TERM:
                    view = replace(view, nacked_term=max(view.nacked_term, message.term))
            elif self.heard.get(agent.uid, 0) < number:
                # One after the other: of two that are on their way only the newer one counts.
                self.heard[agent.uid] = number
                view = replace(view, observed=message)
            if view != self.views[agent.uid]:
                self.views[agent.uid] = view
                self._wake()

        self.clock.after(delay, arrive)

    def ask(self, uid: str, desired: Desired) -> None:
        agent, session = self.sim.agents[uid], self.sessions.get(uid)
        known = self.asked.get(uid)
        plain = replace(desired, seq=0, remaining_ms=0)
        if session is None or (known is not None and replace(known, seq=0, remaining_ms=0) == plain):
            return
        self.seq += 1
        desired = replace(desired, seq=self.seq)
        self.asked[uid] = desired
        self.sim.history.told(uid, desired)
        self._deliver(agent, session, desired)

    def _deliver(self, agent: SimAgent, session: int, desired: Desired) -> None:
        """Late, twice, or not at all: then the keep-alive brings it."""
        random = self.clock.random

        def arrive() -> None:
            if agent.alive and self.sessions.get(agent.uid) == session:
                agent.post(ev.DesiredReceived(desired))

        def again() -> None:
            if self.asked.get(agent.uid) == desired:
                self._deliver(agent, session, desired)

        if self.clock.chance(0.02):
            self.clock.after(5.0, again)
            return
        late = random.uniform(0.5, 4.0) if self.clock.chance(0.02) else 0.0
        self.clock.after(random.uniform(0.001, 0.03) + late, arrive)
        if self.clock.chance(0.03):
            self.clock.after(random.uniform(0.001, 3.0), arrive)

    # -- passes

    def wake(self) -> None:
        """Something that is no agent's has changed."""
        self._wake()

    def _wake(self, seconds: float = 0.002) -> None:
        at = self.clock.now + seconds
        if not self.up or (self._due is not None and self._due <= at):
            return
        self._due, life = at, self.life

        def go() -> None:
            if self.up and self.life == life and self._due == at:
                self._due = None
                self.reconcile()

        self.clock.after(seconds, go)

    def world(self) -> World:
        sim = self.sim
        pods = {uid: PodView(uid, "ns", agent.name) for uid, agent in sim.agents.items()}
        return World(
            REF,
            sim.generation,
            sim.spec,
            sim.status,
            (pods[sim.trainer.uid],),
            tuple(pods[each.uid] for each in sim.members),
            dict(self.views),
            {},
            self.leading_since,
            self.clock.now,
            f"T{self.clock.now:.3f}",
            f"{self.clock.random.getrandbits(64):016x}",
            sim.user.action,
            sim.user.verdict,
        )

    def reconcile(self) -> None:
        world = self.world()
        plan, memory = decide(world, self.memory)
        if plan.stand_down:
            raise AssertionError("only one leader is simulated, and it stood down")
        before = self.sim.status
        if plan.status != before and self.clock.chance(0.02):
            # Somebody else wrote, or the API server was not there: nothing was done, all is seen anew.
            self._wake(0.1)
            return
        self.sim.user.watch(before, plan)
        if plan.status != before:
            self.sim.status = plan.status
            self.sim.history.writes += 1
            if self.clock.chance(0.005) and self.sim.faults and self.clock.now < 1000 + FAULT_SECONDS:
                self.restart()
                return
        self._note(plan)
        if plan.probe is not None:
            self.sim.user.ask(plan.probe)
        for uid, desired in plan.desired.items():
            self.ask(uid, desired)
        self.memory, self.view = memory, plan.view
        if plan.requeue_after is not None:
            self._wake(plan.requeue_after)

    def _note(self, plan: Any) -> None:
        for note in plan.notes:
            self.sim.history.note(self.clock.now, f"event {note.reason}: {note.message}")
        before = self.view.phase if self.view else ""
        if plan.view and plan.view.phase != before:
            self.sim.history.note(self.clock.now, f"operator: {plan.view.phase}: {plan.view.message}")
