"""Seeded random lives of an agent: whatever happens in whatever order, what may never be never is.

The world below is a model: an engine that can die, hang and mix its weights, a disk that can fail, a child
that can do anything late, an operator that says anything. A failing seed is in the assertion's message.
"""

import random
from dataclasses import dataclass, field, replace

import pytest
from modelled_engine import INITIAL, MIXED, Engine

from weightsync_contract.messages import (
    Desired,
    Group,
    ObjectRef,
    Phase,
    Published,
    Released,
    ServingState,
    Source,
    TransferState,
    VersionId,
    Wanted,
)
from weightsync_contract.reasons import FailureCode, Role
from weightsync_engine.agent.core import effects as do
from weightsync_engine.agent.core import events as on
from weightsync_engine.agent.core import observed, start, step, wake_at
from weightsync_engine.agent.core.journal import Journal
from weightsync_engine.permit import Mode, Permit

VERSIONS = tuple(VersionId("run", number) for number in range(1, 5))
LAYOUTS = {version: f"layout-{version.version // 3}" for version in VERSIONS}


@dataclass
class Unmapping:
    """A child gives up what it received into, some time."""

    child: int
    slot: int


@dataclass
class World:
    seed: int
    role: Role = Role.INFERENCE
    faults: bool = True
    engine: Engine = field(default_factory=Engine)
    permit: Permit | None = None
    journal: Journal = field(default_factory=Journal)
    now: float = 50.0

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.history: list[object] = []
        self.term, self.seq, self.epoch, self.nonce = 1, 0, 0, 0
        self.highest = 0
        self.target = VERSIONS[0]
        self.joined: set[tuple[int, str]] = set()
        self.boot()

    def boot(self) -> None:
        """A new agent process: memory, children and staged bytes are gone, disk and engine are not."""
        self.state = start(self.role, self.journal, self.permit)
        self.jobs: list[object] = []
        self.children: dict[int, str | None] = {}
        self.slots: dict[int, VersionId | None] = {}
        self.sealed: set[int] = set()
        self.mapped: dict[int, int] = {}
        self.applying: int | None = None
        self.seen_sequence = (0, 0)

    def fail(self, why: str) -> None:
        tail = "\n".join(str(each)[:400] for each in self.history[-25:])
        raise AssertionError(f"seed {self.seed}: {why}\n{tail}")

    def demand(self, holds: object, why: str) -> None:
        if not holds:
            self.fail(why)

    # ----------------------------------------------------------------------------------- events in

    def send(self, event: object) -> None:
        queue = [event]
        while queue:
            event = queue.pop(0)
            self.history.append(event)
            self.state, effects = step(self.state, event, self.now)
            queue = self.perform(effects) + queue
            at = wake_at(self.state, self.now)
            self.demand(
                at is None or at > self.now or queue, f"a moment has passed unused: {at} at {self.now}"
            )

    def perform(self, effects: tuple) -> list:
        answers, permitted = [], True
        for effect in effects:
            if isinstance(effect, do.REST_ON_PERMIT) and not permitted:
                continue
            if not isinstance(effect, do.Report):
                self.history.append(effect)
            if isinstance(effect, do.WriteJournal):
                if self.fault(0.03):
                    if self.random.random() < 0.5:
                        self.journal = self.journal.add(effect.entry)
                    answers.append(on.JournalFailed(effect.entry, "disk"))
                else:
                    self.journal = self.journal.add(effect.entry)
                    answers.append(on.JournalWritten(effect.entry))
            elif isinstance(effect, do.WritePermit):
                if self.fault(0.03):
                    permitted = False
                    answers.append(on.PermitFailed(effect.permit, "disk"))
                else:
                    self.permit = effect.permit
            else:
                self.other(effect)
            self.check()
        return answers

    def fault(self, chance: float) -> bool:
        return self.faults and self.random.random() < chance

    def other(self, effect: object) -> None:
        match effect:
            case do.Report() | do.SendNack() | do.Retain() | do.Pin() | do.TellFleet():
                return
            case do.Apply():
                record = self.journal.record
                self.demand(
                    self.permit == Permit(effect.boot, Mode.HOLD, self.permit and self.permit.version),
                    "applied without Hold",
                )
                self.demand(
                    record
                    and (record.state, record.boot, record.version)
                    == (ServingState.APPLYING, effect.boot, effect.version),
                    "applied before the journal said so",
                )
                self.demand(effect.slot in self.sealed, "applied what is not sealed")
                self.demand(self.slots[effect.slot] == effect.version, "applied other bytes than named")
                self.applying = effect.slot
                self.engine.paused = True
            case do.Resume():
                record = self.journal.record
                self.demand(
                    record and record.state is not ServingState.APPLYING, "resumed before the journal said so"
                )
                if effect.boot == self.engine.name:
                    self.demand(self.engine.weights is not MIXED, "resumed mixed weights")
            case do.RestartEngine():
                self.demand(
                    self.state.serving.state is ServingState.FENCED, "restarted an engine that is not fenced"
                )
                self.jobs = [job for job in self.jobs if not isinstance(job, (do.Apply, do.Resume))]
                self.applying = None
            case do.AllocateStaging():
                self.demand(not self.slots, f"two pieces of memory: {self.slots}")
                self.demand(effect.child in self.children, "memory for a child that is gone")
                self.slots[effect.slot] = None
                self.command(effect.child, "allocate")
            case do.SealStaging():
                self.demand(self.slots.get(effect.slot) is not None, "sealed what no complete version is in")
            case do.DropStaging():
                self.demand(effect.slot in self.slots, "dropped what is not there")
                ended = self.state.serving.state is ServingState.FENCED
                self.demand(ended or self.applying != effect.slot, "dropped what is being applied")
                del self.slots[effect.slot]
                self.sealed.discard(effect.slot)
                return
            case do.OpenChild():
                key = (effect.group.epoch, effect.group.nonce)
                self.demand(key not in self.joined, f"joined group {key} twice")
                self.joined.add(key)
                self.children[effect.child] = "open"
            case do.ExchangeManifest():
                self.command(effect.child, "exchange")
            case do.SendVersion():
                self.command(effect.child, "send")
            case do.ReceiveVersion():
                self.demand(
                    effect.slot in self.slots and effect.slot not in self.sealed,
                    "received into sealed memory",
                )
                self.mapped[effect.slot] = effect.child
                self.command(effect.child, "receive")
            case do.KillChild():
                pass
        self.jobs.append(effect)

    def command(self, child: int, what: str) -> None:
        self.demand(child in self.children, f"told {what} to a child that is gone")
        # Memory that took too long is had, and given back, before the next is.
        busy = self.children[child] not in (None, "allocate")
        self.demand(not busy, f"told {what} to a child that does {self.children[child]}")
        self.children[child] = what

    # ---------------------------------------------------------------------------------- invariants

    def check(self) -> None:
        permit, engine = self.permit, self.engine
        if permit and permit.mode is Mode.SERVE and engine.alive and permit.boot == engine.name:
            self.demand(engine.weights == (permit.version or INITIAL), f"{permit} serves {engine.weights}")
            if permit.version and not self.journal.corrupt:
                record = self.journal.record
                self.demand(record and record.boot == permit.boot, "a permit without a commit of this boot")
        self.demand(self.state.journal.durable.highest_term >= self.highest, "a term went back")
        self.highest = self.state.journal.durable.highest_term
        place = observed(self.state)
        self.demand((place.term, place.seq) >= self.seen_sequence or place.term == 0, "a sequence went back")
        self.seen_sequence = (place.term, place.seq)
        side = self.state.transfer
        if place.transfer.state is TransferState.STAGED:
            held = self.slots[self.state.staging.slot]
            self.demand(held == place.transfer.version, f"told as staged, but holds {held}")
        if side.state in (TransferState.JOINED, TransferState.CHECKING, TransferState.RECEIVING):
            self.demand(side.child in self.children, "in a group without a child")

    # ----------------------------------------------------------------------------- what may happen

    def answer(self, job: object) -> None:
        """One thing under way ends, well or badly."""
        self.jobs.remove(job)
        good = not self.fault(0.2)
        engine = self.engine
        match job:
            case do.Preflight():
                code = (
                    None
                    if good
                    else self.random.choice([FailureCode.MANIFEST_REFUSED, FailureCode.ENGINE_UNREACHABLE])
                )
                if not engine.alive or job.boot != engine.name:
                    code = FailureCode.ENGINE_UNREACHABLE
                self.send(on.PreflightEnded(job.boot, job.layout, code, "" if code is None else "no"))
            case do.Apply():
                self.ended_apply(job, good)
            case do.Resume():
                alive = good and engine.alive and job.boot == engine.name
                if alive:
                    engine.paused = False
                self.send(on.ResumeEnded(job.boot, "" if alive else "gone"))
            case do.RestartEngine():
                if good:
                    engine.restart()
            case do.AllocateStaging():
                self.free(job.child, "allocate")
                self.send(on.StagingAllocated(job.slot) if good else on.StagingFailed(job.slot, "no memory"))
            case do.SealStaging():
                good = good and job.slot not in self.mapped
                if good and job.slot in self.slots:
                    self.sealed.add(job.slot)
                self.send(on.StagingSealed(job.slot) if good else on.StagingFailed(job.slot, "busy"))
            case Unmapping() if job.child in self.children:
                del self.mapped[job.slot]
                self.send(on.ChildUnmapped(job.child))
            case Unmapping():
                pass
            case do.KillChild():
                self.children.pop(job.child, None)
                self.mapped = {slot: child for slot, child in self.mapped.items() if child != job.child}
                self.send(on.ChildExited(job.child, "killed"))
            case _:
                self.ended_command(job, good)

    def ended_apply(self, job: do.Apply, good: bool) -> None:
        self.applying = None
        same = self.engine.alive and self.engine.name == job.boot
        if good and same:
            self.engine.weights = job.version
            self.send(on.ApplyDone(job.boot, job.slot))
        elif same and self.random.random() < 0.5:
            self.send(on.ApplyFailed(job.boot, job.slot, True, "refused"))
        else:
            if same:
                self.engine.weights = MIXED
            self.send(on.ApplyFailed(job.boot, job.slot, False, "broke"))

    def free(self, child: int, what: str) -> None:
        if self.children.get(child) == what:
            self.children[child] = None

    def ended_command(self, job: object, good: bool) -> None:
        child = job.child
        if child not in self.children:
            return
        if not good:
            self.send(on.ChildFailed(child, FailureCode.PEER_LOST, "reset"))
            return
        self.children[child] = None
        match job:
            case do.OpenChild():
                self.send(on.ChildListening(child, "h:1"))
                self.send(on.ChildReady(child))
            case do.ExchangeManifest():
                self.send(on.ManifestExchanged(child, job.wanted.layout))
            case do.SendVersion():
                self.send(on.ChildSent(child))
            case do.ReceiveVersion():
                right = not self.fault(0.1)
                if job.slot in self.slots:
                    self.slots[job.slot] = job.wanted.version if right else VersionId("wrong", 0)
                self.jobs.append(Unmapping(child, job.slot))
                self.send(on.ChildProgress(child, 500))
                self.send(on.ChildReceived(child, job.wanted.digest if right else "wrong"))

    def desired(self) -> Desired:
        """Anything an operator may say, old words and those of a deposed leader included."""
        pick, dice = self.random.choice, self.random.random
        self.term += dice() < 0.05
        self.seq += 1
        if dice() < 0.1:
            self.epoch += 1
            self.nonce += 1
        group = Group(self.epoch, f"n{self.nonce}", 0 if self.role is Role.TRAINER else 1, 1, 2, "h:1")
        version = pick(VERSIONS)
        wanted = Wanted(version, LAYOUTS[version], f"digest-{version}", 1000, pick([*Phase, Phase.TRANSFER]))
        staged = self.state.staging.wanted
        commit = staged.version if staged and dice() < 0.7 else pick((*VERSIONS, None))
        if staged and dice() < 0.7:
            wanted = staged
        stale = dice() < 0.1
        return Desired(
            ObjectRef("n", "w", "uid"),
            self.term - stale,
            self.seq - 2 * (dice() < 0.05),
            group=group if self.epoch and dice() < 0.9 else None,
            wanted=wanted if dice() < 0.9 else None,
            commit=commit if dice() < 0.7 else None,
            commit_digest=f"digest-{commit}" if commit else "",
            allowed=tuple(each for each in VERSIONS if dice() < 0.7),
            serve_initial=dice() < 0.2,
            remaining_ms=pick([0, 1000, 30000]),
        )

    def happen(self) -> None:
        dice = self.random.random()
        if dice < 0.5 and self.jobs:
            self.answer(self.random.choice(self.jobs))
        elif dice < 0.65:
            self.say()
        elif dice < 0.8:
            self.probe()
        elif dice < 0.9:
            self.now += self.random.choice([0.1, 1.0, 5.0, 40.0])
            self.send(on.Tick())
        elif dice < 0.93 and self.faults:
            self.engine_fault()
        elif dice < 0.95 and self.faults:
            self.agent_dies()
        elif dice < 0.96:
            self.send(on.ReleasedReceived(Released(self.term)))
        elif dice < 0.98:
            held = tuple(
                Published(v, LAYOUTS[v], f"digest-{v}", 1000) for v in VERSIONS if self.random.random() < 0.8
            )
            self.send(on.SourceChanged(Source("run", True, held)))
        else:
            self.send(self.random.choice([on.SessionOpened(), on.SessionClosed()]))

    def say(self) -> None:
        """Mostly what leads somewhere, so that the rest hits an agent in every state."""
        dice = self.random.random()
        if dice < 0.1:
            self.target = self.random.choice(VERSIONS)
        if dice < 0.25 or self.role is Role.TRAINER:
            self.send(on.DesiredReceived(self.desired()))
        else:
            told = observed(self.state)
            allowed = (self.target, told.serving.version) if told.serving.version else (self.target,)
            self.send(on.DesiredReceived(replace(self.honest(self.target, told), allowed=allowed)))

    def probe(self) -> None:
        if self.role is Role.TRAINER:
            return
        engine = self.engine
        self.send(on.EngineSeen(engine.name, 1) if engine.alive and engine.reachable else on.EngineGone())

    def engine_fault(self) -> None:
        if self.random.random() < 0.3:
            self.engine.reachable = not self.engine.reachable
        elif self.random.random() < 0.5:
            self.engine.alive = False
        else:
            self.engine.restart()
        self.history.append(f"engine: {self.engine}")
        self.check()

    def agent_dies(self) -> None:
        """In the middle of an apply, the engine may hold anything afterwards."""
        for job in self.jobs:
            if isinstance(job, do.Apply) and self.engine.name == job.boot:
                self.engine.weights = self.random.choice([job.version, MIXED, self.engine.weights])
            elif isinstance(job, do.Resume):
                self.engine.paused = self.random.random() < 0.5
        self.history.append("agent restarts")
        if self.fault(0.1):
            self.journal = Journal(None, self.journal.seen, corrupt=True)
        self.boot()
        self.check()

    # ---------------------------------------------------------------------------- after the faults

    def settle(self, version: VersionId) -> None:
        """An honest operator, and nothing fails any more: the member ends on the version."""
        self.faults, self.engine.reachable = False, True
        self.term += 1
        for _ in range(400):
            if not self.engine.alive:
                self.engine.restart()
            self.probe()
            told = observed(self.state)
            if (
                told.serving.state is ServingState.SERVING
                and told.serving.version == version
                and not self.jobs
            ):
                self.demand(
                    self.permit == Permit(self.engine.name, Mode.SERVE, version), "serves without a permit"
                )
                self.demand(not self.engine.paused, "serves though paused")
                return
            stays = told.serving.state is ServingState.FENCED and self.state.serving.restart_at is None
            if stays or self.state.check.code is FailureCode.MANIFEST_REFUSED:
                # Somebody looks after it: an engine that says no goes on saying no.
                self.engine.restart()
            self.send(on.DesiredReceived(self.honest(version, told)))
            while self.jobs:
                self.answer(self.jobs[0])
            self.now += 1.0
            self.send(on.Tick())
        self.fail(f"did not end on {version}: {told} {self.engine}")

    def honest(self, version: VersionId, told: object) -> Desired:
        self.seq += 1
        transfer = told.transfer
        failed = transfer.failure is not None and transfer.failure.epoch >= self.epoch
        if (
            failed
            or not self.epoch
            or (told.transfer.state is TransferState.IDLE and self.random.random() < 0.1)
        ):
            self.epoch, self.nonce = max(self.epoch, transfer.epoch) + 1, self.nonce + 1
        staged = transfer.state is TransferState.STAGED and transfer.version == version
        moved = transfer.state is TransferState.JOINED and self.state.transfer.done == version
        if moved and self.state.transfer.group.epoch == self.epoch:
            # It went round in this group and was given back since: only another group brings it again.
            self.epoch, self.nonce = self.epoch + 1, self.nonce + 1
        failed = told.serving.failure is not None and told.serving.failure.version == version
        phase = Phase.TRANSFER if staged or transfer.checked == LAYOUTS[version] else Phase.CHECK
        return Desired(
            ObjectRef("n", "w", "uid"),
            self.term,
            self.seq,
            group=Group(self.epoch, f"n{self.nonce}", 1, 1, 2, "h:1"),
            wanted=Wanted(version, LAYOUTS[version], f"digest-{version}", 1000, phase),
            commit=version if staged and not (failed and self.random.random() < 0.5) else None,
            commit_digest=f"digest-{version}",
            allowed=(version,),
        )


@pytest.mark.parametrize("block", range(8))
def test_what_may_never_be_never_is(block):
    for seed in range(block * 100, block * 100 + 100):
        world = World(seed)
        for _ in range(400):
            world.happen()


@pytest.mark.parametrize("block", range(4))
def test_after_the_last_fault_the_member_ends_on_the_wanted_version(block):
    for seed in range(block * 50, block * 50 + 50):
        world = World(seed)
        for _ in range(200):
            world.happen()
        world.settle(VERSIONS[seed % len(VERSIONS)])


def test_what_may_never_be_never_is_for_a_trainer():
    for seed in range(100):
        world = World(seed, Role.TRAINER)
        for _ in range(300):
            world.happen()


def test_these_lives_reach_every_state():
    """The lives above are worth something: each state is seen in them."""
    seen = set()
    for seed in range(60):
        world = World(seed)
        for _ in range(400):
            world.happen()
            told = observed(world.state)
            seen |= {told.serving.state, told.transfer.state}
            if world.state.serving.commit:
                seen.add(world.state.serving.commit.stage)
            if told.transfer.failure:
                seen.add(told.transfer.failure.code)
    expected = {
        *ServingState,
        *(set(TransferState) - {TransferState.SENDING, TransferState.SENT}),
        FailureCode.DIGEST_MISMATCH,
        FailureCode.JOIN_TIMEOUT,
        FailureCode.TRANSFER_TIMEOUT,
        FailureCode.PEER_LOST,
        FailureCode.MANIFEST_REFUSED,
        FailureCode.STAGING_FAILED,
    }
    assert expected <= seen, expected - seen
