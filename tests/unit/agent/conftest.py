"""A bench on which an agent's core runs alone: time by hand, a journal that works unless told not to."""

from collections import deque
from dataclasses import replace
from typing import Any

import pytest

from weightsync_contract.messages import (
    Desired,
    Group,
    ObjectRef,
    Observed,
    Phase,
    Published,
    Source,
    VersionId,
    Wanted,
)
from weightsync_contract.reasons import Role
from weightsync_engine.agent.core import observed, start, step, wake_at
from weightsync_engine.agent.core.effects import Effect, Report, WriteJournal, WritePermit
from weightsync_engine.agent.core.events import (
    ApplyDone,
    ChildReady,
    ChildReceived,
    ChildUnmapped,
    DesiredReceived,
    EngineSeen,
    Event,
    JournalFailed,
    JournalWritten,
    ManifestExchanged,
    PreflightEnded,
    ResumeEnded,
    SourceChanged,
    StagingAllocated,
    StagingSealed,
    Tick,
)
from weightsync_engine.agent.core.journal import Journal
from weightsync_engine.permit import Permit

REF = ObjectRef("default", "demo", "cr-1")
V1, V2 = VersionId("run", 1), VersionId("run", 2)
LAYOUT = "sha256:l"


class Bench:
    """One agent's core with everything that it did, in order."""

    def __init__(
        self, role: Role = Role.INFERENCE, journal: Journal | None = None, permit: Permit | None = None
    ):
        self.state = start(role, journal or Journal(), permit)
        self.now = 100.0
        self.did: list[Effect] = []
        self.journal = self.state.journal.durable
        self.permit = permit
        self.journal_works: bool | None = True
        """None: a disk that does not answer."""
        self.seq = 0
        self.term = 1

    def send(self, *events: Event) -> list[Effect]:
        """Let events happen; what the agent did for them, reports left out."""
        mark, queue = len(self.did), deque(events)
        while queue:
            self.state, effects = step(self.state, queue.popleft(), self.now)
            for effect in effects:
                self.did.append(effect)
                if isinstance(effect, WritePermit):
                    self.permit = effect.permit
                if isinstance(effect, WriteJournal):
                    if self.journal_works:
                        self.journal = self.journal.add(effect.entry)
                        queue.appendleft(JournalWritten(effect.entry))
                    elif self.journal_works is False:
                        queue.appendleft(JournalFailed(effect.entry, "no space left on device"))
        return [effect for effect in self.did[mark:] if not isinstance(effect, Report)]

    def later(self, seconds: float) -> list[Effect]:
        """Let time pass, with a tick whenever the agent wants one."""
        until, mark = self.now + seconds, len(self.did)
        while True:
            at = wake_at(self.state, self.now)
            if at is None or at > until:
                break
            assert at > self.now, "a moment that has come must have been acted on"
            self.now = at
            self.send(Tick())
        self.now = until
        self.send(Tick())
        return [effect for effect in self.did[mark:] if not isinstance(effect, Report)]

    def restart(self) -> "Bench":
        """The agent's process is killed and a new one starts; the engine noticed nothing."""
        new = Bench(self.state.role, self.journal, self.permit)
        new.now, new.seq, new.term = self.now + 1, self.seq, self.term
        return new

    @property
    def told(self) -> Observed:
        """What the operator would be told now."""
        return observed(self.state)

    def desire(self, **wants: Any) -> list[Effect]:
        """The operator's next word."""
        self.seq += 1
        serving = self.state.serving.version
        given: dict[str, Any] = {
            "weightsync": REF,
            "term": self.term,
            "seq": self.seq,
            "allowed": (serving,) if serving else (),
            **wants,
        }
        return self.send(DesiredReceived(Desired(**given)))

    # ----------------------------------------------------------------------- ways to a usual state

    def join(self, epoch: int = 1, **wants: Any) -> "Bench":
        """A member in a group."""
        self.desire(group=group(epoch), **wants)
        self.send(ChildReady(self.state.transfer.child))
        return self

    def check(self, version: VersionId = V1, epoch: int = 1, **wants: Any) -> "Bench":
        """A member whose engine takes the manifest, with memory for the version."""
        self.desire(group=group(epoch), wanted=wanted(version, Phase.CHECK), **wants)
        boot = self.state.engine.boot
        self.send(ManifestExchanged(self.state.transfer.child, LAYOUT), PreflightEnded(boot, LAYOUT))
        self.send(StagingAllocated(self.state.staging.slot))
        return self

    def receive(self, version: VersionId = V1, epoch: int = 1, **wants: Any) -> "Bench":
        """A member that receives."""
        self.desire(group=group(epoch), wanted=wanted(version, Phase.TRANSFER), **wants)
        self.send(StagingAllocated(self.state.staging.slot))
        return self

    def stage(self, version: VersionId = V1, **wants: Any) -> "Bench":
        """A member that has the version staged."""
        self.receive(version, **wants)
        child = self.state.transfer.child
        self.send(ChildReceived(child, digest(version)), ChildUnmapped(child))
        self.send(StagingSealed(self.state.staging.slot))
        return self

    def commit(self, version: VersionId = V1, **wants: Any) -> "Bench":
        """A member that applies."""
        given: dict[str, Any] = {
            "wanted": wanted(version, Phase.TRANSFER),
            "commit": version,
            "commit_digest": digest(version),
            **wants,
        }
        self.desire(group=group(self.state.transfer.group.epoch if self.state.transfer.group else 1), **given)
        return self

    def serve(self, version: VersionId = V1) -> "Bench":
        """A member that serves."""
        if not self.state.transfer.child:
            self.join()
        if LAYOUT not in self.state.transfer.exchanged:
            self.check(version)
        self.stage(version).commit(version)
        self.send(ApplyDone(self.state.serving.boot, self.state.staging.slot))
        self.send(ResumeEnded(self.state.serving.boot))
        return self


def digest(version: VersionId) -> str:
    return f"xxh3-128:{version.version}"


def group(epoch: int = 1, rank: int = 1, endpoint: str = "10.0.0.1:29500") -> Group:
    return Group(epoch, f"nonce-{epoch}", rank, 1, 2, endpoint)


def wanted(version: VersionId = V1, phase: Phase = Phase.TRANSFER, layout: str = LAYOUT) -> Wanted:
    return Wanted(version, layout, digest(version), 1000, phase)


def published(*versions: VersionId) -> Source:
    return Source("run", True, tuple(Published(each, LAYOUT, digest(each), 1000, 3) for each in versions))


class Kit:
    """The names above, for tests (test modules import no other test module)."""

    Bench = Bench
    REF, V1, V2, LAYOUT = REF, V1, V2, LAYOUT
    digest, group, wanted, published = (
        staticmethod(digest),
        staticmethod(group),
        staticmethod(wanted),
        staticmethod(published),
    )
    replace = staticmethod(replace)


@pytest.fixture
def kit() -> type[Kit]:
    return Kit


@pytest.fixture
def member() -> Bench:
    """An inference agent whose engine has just started as boot ``b1``."""
    bench = Bench()
    bench.send(EngineSeen("b1", 1))
    return bench


@pytest.fixture
def trainer() -> Bench:
    """A trainer's agent that holds two versions."""
    bench = Bench(Role.TRAINER)
    bench.send(SourceChanged(published(V1, V2)))
    return bench
