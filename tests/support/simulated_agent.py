"""An agent's real core with a simulated engine, simulated children and a simulated disk around it."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from simulated_history import History
from simulated_time import Clock

from weightsync_contract.messages import (
    Capability,
    Desired,
    Hello,
    Observed,
    PodRef,
    Published,
    Source,
    VersionId,
)
from weightsync_contract.reasons import FailureCode, Role
from weightsync_engine.agent.core import effects as fx
from weightsync_engine.agent.core import events as ev
from weightsync_engine.agent.core.journal import Journal
from weightsync_engine.agent.core.state import start
from weightsync_engine.agent.core.step import step, wake_at
from weightsync_engine.permit import Mode, Permit

CAPABILITIES = tuple(Capability)
TICK_SECONDS = 0.05
"""A tick comes this much late: a moment that has come without a rule acting on it must not stop the clock."""


@dataclass
class Engine:
    """``weights`` are what it would answer from, if it may."""

    name: str
    boots: int = 1
    up: bool = True
    weights: tuple[VersionId, str] | None = None
    mixed: bool = False
    applying: bool = False

    @property
    def boot(self) -> str:
        return f"{self.name}-boot-{self.boots}"


@dataclass
class Child:
    """A rank of a group, as a process."""

    owner: "SimAgent"
    number: int
    rank: int
    world: int
    key: tuple[int, str]
    alive: bool = True
    joined: bool = False
    frozen: bool = False
    layout: str = ""
    slot: int = 0
    """Memory that it has mapped."""
    moving: object = None
    started_version: VersionId | None = None


@dataclass
class Groups:
    """All children of all agents: what one does, the others of its group notice."""

    clock: Clock
    children: list[Child] = field(default_factory=list)
    faults: bool = True

    def of(self, key: tuple[int, str]) -> list[Child]:
        return [each for each in self.children if each.key == key and each.alive]

    def open(self, child: Child) -> None:
        self.children.append(child)
        if child.rank == 0:
            endpoint = f"{child.owner.name}:{20000 + child.key[0]}"
            self.clock.soon(
                0.01, 0.1, lambda: child.owner.from_child(child, ev.ChildListening(child.number, endpoint))
            )
        self.clock.soon(0.02, 0.2, lambda: self._join(child))

    def _join(self, child: Child) -> None:
        child.joined = child.alive and not child.frozen
        peers = self.of(child.key)
        if child.joined and len([each for each in peers if each.joined]) == child.world:
            for each in peers:
                self._later(each, ev.ChildReady(each.number))

    def _later(self, child: Child, event: ev.Event, low: float = 0.001, high: float = 0.05) -> None:
        self.clock.soon(low, high, lambda: child.owner.from_child(child, event))

    def exchange(self, child: Child, layout: str) -> None:
        child.layout = layout
        peers = self.of(child.key)
        if len(peers) == child.world and all(each.layout == layout and not each.frozen for each in peers):
            for each in peers:
                self._later(each, ev.ManifestExchanged(each.number, layout))

    def move(self, child: Child, version: VersionId, order: object) -> None:
        child.started_version, child.moving = version, order
        peers = self.of(child.key)
        if len(peers) < child.world or any(each.started_version != version for each in peers):
            return
        seconds = self.clock.random.uniform(0.3, 3.0)
        steps = 4
        for number in range(1, steps + 1):
            self.clock.after(seconds * number / steps, self._mover(peers, version, number, steps))

    def _mover(self, peers: list[Child], version: VersionId, number: int, steps: int) -> Callable[[], None]:
        def tick() -> None:
            stuck = any(not each.alive or each.frozen or each.started_version != version for each in peers)
            if stuck:
                return
            for each in peers:
                order = each.moving
                if number < steps:
                    each.owner.from_child(each, ev.ChildProgress(each.number, 1000 * number // steps))
                elif isinstance(order, fx.SendVersion):
                    self._later(each, ev.ChildSent(each.number))
                elif isinstance(order, fx.ReceiveVersion):
                    corrupt = self.faults and self.clock.chance(0.01)
                    digest = "corrupt" if corrupt else order.wanted.digest
                    each.owner.bytes[order.slot] = digest
                    self._received(each, order.slot, digest)

        return tick

    def _received(self, child: Child, slot: int, digest: str) -> None:
        child.slot = slot

        def said() -> None:
            child.owner.from_child(child, ev.ChildReceived(child.number, digest))
            # One in a hundred hangs.
            if not (self.faults and self.clock.chance(0.01)):
                self.clock.soon(0.001, 0.3, unmapped)

        def unmapped() -> None:
            if child.alive and not child.frozen and child.slot == slot:
                child.slot = 0
                child.owner.from_child(child, ev.ChildUnmapped(child.number))

        self.clock.soon(0.001, 0.05, said)

    def kill(self, child: Child, why: str = "") -> None:
        """It is gone; its peers notice, mostly soon."""
        if not child.alive:
            return
        child.alive = False
        self.children.remove(child)
        for each in self.of(child.key):
            busy = each.started_version is not None or not each.joined or each.layout
            if busy or self.clock.chance(0.7):
                failed = ev.ChildFailed(
                    each.number, FailureCode.PEER_LOST, f"rank {child.rank} is gone {why}"
                )
                self._later(each, failed, 0.005, 0.3)


class SimAgent:
    """One pod: agent and engine, or agent and trainer. ``send`` goes to whatever operator there is."""

    def __init__(self, clock: Clock, history: History, groups: Groups, name: str, role: Role) -> None:
        self.clock, self.history, self.groups = clock, history, groups
        self.name, self.role, self.uid = name, role, f"uid-{name}"
        self.engine = Engine(name)
        self.journal, self.permit = Journal(), None
        self.stored: tuple[Published, ...] = ()
        self.run, self.retained, self.pinned = "", 2, ()
        self.incarnations = 0
        self.alive = False
        self.bytes: dict[int, str] = {}
        self.sealed: set[int] = set()
        self.child: Child | None = None
        self.report: Callable[[SimAgent, Observed], None] = lambda *_: None
        self.nack: Callable[[SimAgent, object], None] = lambda *_: None
        self.latest: Observed | None = None
        self.state = start(role, Journal(), None)
        self.life = 0
        self._due: float | None = None

    # -- life

    @property
    def incarnation(self) -> str:
        return f"{self.name}-{self.incarnations}"

    def hello(self) -> Hello:
        term = self.journal.highest_term
        return Hello(1, 1, PodRef("ns", self.name, self.uid), self.role, self.incarnation, term)

    def born(self) -> None:
        """The agent's process starts."""
        self.life += 1
        self.incarnations += 1
        self.alive, self.latest, self._due = True, None, None
        self.state = start(self.role, self.journal, self.permit)
        self.history.note(self.clock.now, f"{self.name}: agent starts")
        self.post(ev.Tick())
        if self.role is Role.TRAINER:
            self.post(ev.SourceChanged(self.source()))
        elif self.engine.up:
            self.later(0.05, 0.3, self._seen)

    def dies(self) -> None:
        """The agent's process is killed, and with it its child and its memory."""
        if not self.alive:
            return
        self.history.note(self.clock.now, f"{self.name}: agent dies")
        self.alive = False
        self.life += 1
        self.bytes.clear()
        self.sealed.clear()
        if self.child:
            self.groups.kill(self.child, "(agent died)")
            self.child = None

    def later(self, low: float, high: float, action: Callable[[], None]) -> None:
        """Do it, unless the agent's process is another by then."""
        life = self.life

        def guarded() -> None:
            if self.alive and self.life == life:
                action()

        self.clock.soon(low, high, guarded)

    def answer(self, low: float, high: float, event: ev.Event) -> None:
        self.later(low, high, lambda: self.post(event))

    # -- the engine

    def engine_dies(self) -> None:
        """It restarts by itself, on the weights that it was made with."""
        engine = self.engine
        if not engine.up:
            return
        self.history.note(self.clock.now, f"{self.name}: engine dies")
        engine.up, engine.applying = False, False
        self.later(0.2, 1.0, self._gone)
        self.clock.soon(1.0, 4.0, self._rises)

    def _gone(self) -> None:
        if not self.engine.up:
            self.post(ev.EngineGone())

    def _rises(self) -> None:
        self.engine = Engine(self.name, self.engine.boots + 1)
        self.history.note(self.clock.now, f"{self.name}: engine is back, {self.engine.boot}")
        self.check()
        self.later(0.05, 1.0, self._seen)

    def _seen(self) -> None:
        if self.engine.up:
            self.post(ev.EngineSeen(self.engine.boot, 1, CAPABILITIES))

    def check(self) -> None:
        """Whether the engine answers now, and from what."""
        engine, permit = self.engine, self.permit
        if self.role is Role.TRAINER or not engine.up or permit is None:
            return
        if permit.boot == engine.boot and permit.mode is Mode.SERVE:
            self.history.answers(self.name, engine.boot, engine.weights, engine.mixed, permit.version)

    # -- the trainer

    def source(self) -> Source:
        return Source(self.run, True, self.stored)

    def publish(self, version: VersionId) -> None:
        """A training process hands over a version; its agent's store outlives the agent."""
        digest = f"digest-{version}"
        self.history.publish(version, digest)
        self.history.note(self.clock.now, f"{self.name}: publishes {version}")
        self.run = version.run
        self.stored = (*self.stored, Published(version, "layout", digest, 1000, 3))
        self._trim()
        self._source_changed()

    def _trim(self) -> None:
        keep = {each.version for each in self.stored[-self.retained :]} | set(self.pinned)
        self.stored = tuple(each for each in self.stored if each.version in keep)

    def _source_changed(self) -> None:
        self.answer(0.0, 0.01, ev.SourceChanged(self.source()))

    # -- the core

    def post(self, event: ev.Event) -> None:
        """One step, and its effects in their order."""
        if not self.alive:
            return
        before = self.state.desired.taken
        self.state, effects = step(self.state, event, self.clock.now)
        taken = self.state.desired.taken
        if taken is not None and taken is not before:
            self.history.took(self.uid, self.incarnation, taken.term)
        for effect in effects:
            self._perform(effect)
        self._schedule()

    def _schedule(self) -> None:
        due = wake_at(self.state, self.clock.now)
        if due is None or (self._due is not None and self._due <= due):
            return
        self._due = due

        def tick() -> None:
            self._due = None
            self.post(ev.Tick())

        late = max(due - self.clock.now, 0.0) + TICK_SECONDS
        self.later(late, late, tick)

    def from_child(self, child: Child, event: ev.Event) -> None:
        if self.alive and child.owner is self and (child.alive or isinstance(event, ev.ChildFailed)):
            self.post(event)

    def child_dies(self) -> None:
        """By no doing of the agent."""
        child = self.child
        if child is None or not child.alive:
            return
        self.history.note(self.clock.now, f"{self.name}: child dies")
        self.groups.kill(child)
        self.child = None
        self.answer(0.001, 0.05, ev.ChildExited(child.number, "killed"))

    def child_freezes(self) -> None:
        if self.child is not None:
            self.history.note(self.clock.now, f"{self.name}: child hangs")
            self.child.frozen = True

    # -- effects

    def _perform(self, effect: fx.Effect) -> None:
        match effect:
            case fx.WriteJournal():
                self._write(effect)
            case fx.WritePermit():
                self.permit = effect.permit
                self.check()
            case fx.Report():
                self.latest = effect.observed
                self.report(self, effect.observed)
            case fx.SendNack():
                self.nack(self, effect.nack)
            case fx.AllocateStaging():
                self.bytes[effect.slot] = ""
                self.answer(0.001, 0.1, ev.StagingAllocated(effect.slot))
            case fx.SealStaging():
                self._seal(effect.slot)
            case fx.DropStaging():
                self.bytes.pop(effect.slot, None)
            case fx.Retain():
                self.retained = effect.versions
                self._trim()
                self._source_changed()
            case fx.Pin():
                self.pinned = effect.versions
                self._trim()
                self._source_changed()
            case fx.TellFleet():
                pass
            case _:
                self._perform_long(effect)

    def _seal(self, slot: int) -> None:
        if self.child is not None and self.child.slot == slot:
            self.answer(0.0, 0.01, ev.StagingFailed(slot, "somebody still has it mapped"))
        else:
            self.sealed.add(slot)
            self.answer(0.0, 0.01, ev.StagingSealed(slot))

    def _write(self, effect: fx.WriteJournal) -> None:
        def durable() -> None:
            if self.clock.chance(0.005):
                if self.clock.chance(0.5):
                    self.journal = self.journal.add(effect.entry)
                self.post(ev.JournalFailed(effect.entry, "the disk is full"))
            else:
                self.journal = self.journal.add(effect.entry)
                self.post(ev.JournalWritten(effect.entry))

        self.later(0.0005, 0.005, durable)

    def _perform_long(self, effect: fx.Effect) -> None:
        match effect:
            case fx.OpenChild():
                group = effect.group
                child = Child(self, effect.child, group.rank, group.world_size, (group.epoch, group.nonce))
                self.child = child
                self.groups.open(child)
            case fx.KillChild():
                child = self.child
                self.child = None
                if child is not None:
                    self.groups.kill(child, "(told to)")
                self.answer(0.001, 0.05, ev.ChildExited(effect.child))
            case fx.ExchangeManifest() if self.child:
                self.groups.exchange(self.child, effect.wanted.layout)
            case fx.SendVersion() | fx.ReceiveVersion() if self.child:
                self.groups.move(self.child, effect.wanted.version, effect)
            case fx.Preflight():
                self.later(0.005, 0.1, lambda: self._preflight(effect))
            case fx.Apply():
                self._apply(effect)
            case fx.Resume():
                self.later(0.001, 0.02, lambda: self._resume(effect))
            case fx.RestartEngine():
                if effect.boot == self.engine.boot:
                    self.engine_dies()

    def _preflight(self, effect: fx.Preflight) -> None:
        up = self.engine.up and self.engine.boot == effect.boot
        code = None if up else FailureCode.ENGINE_UNREACHABLE
        self.post(ev.PreflightEnded(effect.boot, effect.layout, code))

    def _resume(self, effect: fx.Resume) -> None:
        up = self.engine.up and self.engine.boot == effect.boot
        self.post(ev.ResumeEnded(effect.boot, "" if up else "unreachable"))

    def _apply(self, effect: fx.Apply) -> None:
        engine = self.engine
        digest = self.bytes.get(effect.slot, "")
        assert effect.slot in self.sealed, f"{self.name} applies what is not sealed"
        self.history.applies(self.name, effect.version, digest)
        failed = ev.ApplyFailed(effect.boot, effect.slot, False, "unreachable")
        if not engine.up or engine.boot != effect.boot:
            self.answer(0.01, 0.1, replace(failed, clean=True))
            return
        engine.applying = True
        kind = self.clock.random.random() if self.groups.faults else 1.0

        def begin() -> None:
            if engine.up and engine is self.engine:
                engine.mixed = True

        def end() -> None:
            if not engine.up or engine is not self.engine or not engine.applying:
                return
            engine.applying = False
            engine.mixed, engine.weights = False, (effect.version, digest)
            self.later(0.001, 0.05, lambda: self.post(ev.ApplyDone(effect.boot, effect.slot)))

        if kind < 0.01:
            self.answer(0.01, 0.1, replace(failed, clean=True, message="refused by all ranks"))
            return
        self.clock.soon(0.01, 0.05, begin)
        if kind < 0.02:
            self.answer(0.06, 0.3, replace(failed, message="rank 1 failed"))
        elif kind < 0.03:
            pass
        else:
            self.clock.soon(0.06, 0.5, end)


__all__ = ["CAPABILITIES", "Child", "Desired", "Groups", "Permit", "SimAgent"]
