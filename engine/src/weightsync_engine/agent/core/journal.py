"""What an agent must still know after it was killed: entries, and what a journal of them adds up to."""

from dataclasses import dataclass, replace

from weightsync_contract.messages import ServingState, VersionId


@dataclass(frozen=True, slots=True)
class Seen:
    """The highest term, and the highest epoch, that a WeightSync (by uid) has told this agent."""

    weightsync: str
    term: int
    epoch: int = 0


@dataclass(frozen=True, slots=True)
class Record:
    """Where the serving side is. ``state`` is one of Initial, Applying, Serving, Withheld, Fenced.

    ``version`` and ``digest`` are those in the engine of ``boot``, or in Applying those on their way into it.
    """

    state: ServingState
    boot: str
    version: VersionId | None = None
    digest: str = ""
    resumed: bool = True
    """The engine was told to go on after its pause. False: that must still be done."""
    fences: tuple[float, ...] = ()
    """Monotonic times (of this machine) at which the member was fenced, newest last."""
    weightsync: str = ""
    message: str = ""


Entry = Seen | Record


@dataclass(frozen=True, slots=True)
class Journal:
    """All that the entries say together."""

    record: Record | None = None
    seen: tuple[Seen, ...] = ()
    corrupt: bool = False
    """Something was written that can't be read any more: nothing may be concluded from what is there."""

    def add(self, entry: Entry) -> "Journal":
        """The journal after one more entry."""
        if isinstance(entry, Record):
            return replace(self, record=entry)
        others = tuple(seen for seen in self.seen if seen.weightsync != entry.weightsync)
        return replace(self, seen=(*others, entry))

    def of(self, weightsync: str) -> Seen:
        """What is known of a WeightSync; term 0 for nothing."""
        return next((seen for seen in self.seen if seen.weightsync == weightsync), Seen(weightsync, 0))

    @property
    def highest_term(self) -> int:
        """Highest term that any WeightSync told."""
        return max((seen.term for seen in self.seen), default=0)
