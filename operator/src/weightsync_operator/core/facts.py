"""What one pass rests on, and the state that its rules move on."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

from weightsync_contract.messages import VersionId
from weightsync_contract.reasons import Reason
from weightsync_operator.core.membership import Member, fleet, limit
from weightsync_operator.core.memory import Epoch, Memory, Round
from weightsync_operator.core.model import Note, Status, World
from weightsync_operator.core.source import SourceView, look


@dataclass(frozen=True, slots=True)
class Facts:
    """The world, read. Nothing in it changes during a pass."""

    world: World
    members: Mapping[str, Member]
    source: SourceView
    limit: int
    """How many members a rollout may leave out."""

    @property
    def now(self) -> float:
        return self.world.now

    @property
    def verify(self) -> bool:
        return self.world.spec.verify

    def scope(self, round_: Round) -> list[Member]:
        """The round's members that are still in the fleet."""
        return [self.members[uid] for uid in round_.scope if uid in self.members]


def read(world: World, memory: Memory) -> Facts:
    """Look at everything once."""
    members = fleet(world)
    return Facts(world, members, look(world, memory.source), limit(world, members))


@dataclass(frozen=True, slots=True)
class State:
    """What a pass moves on: what is remembered, what will be written and what is told."""

    memory: Memory
    status: Status
    notes: tuple[Note, ...] = ()

    @property
    def round(self) -> Round | None:
        return self.memory.round

    @property
    def epoch(self) -> Epoch | None:
        return self.memory.epoch

    @property
    def current(self) -> VersionId | None:
        current = self.status.current
        return VersionId(current.run, current.version) if current else None

    def after(self, version: VersionId) -> bool:
        """Whether the version comes after the current one. Asked of the state, which a pass moves on, and not of
        the world that it began with: else a version that was just reached would be left for an older one."""
        current = self.current
        return current is None or version.run != current.run or version.version > current.version

    def remember(self, **changes: Any) -> Self:
        """With another memory."""
        return replace(self, memory=replace(self.memory, **changes))

    def change(self, **changes: Any) -> Self:
        """With another round; there must be one."""
        assert self.memory.round is not None
        return self.remember(round=replace(self.memory.round, **changes))

    def write(self, **changes: Any) -> Self:
        """With another status."""
        return replace(self, status=replace(self.status, **changes))

    def note(self, reason: Reason, message: str, warning: bool = False) -> Self:
        """With one more Event."""
        return replace(self, notes=(*self.notes, Note(reason, message, warning)))

    def active_exclusions(self) -> Iterator[str]:
        """Uids of the members that are left out."""
        return (each.uid for each in self.memory.exclusions if each.active)
