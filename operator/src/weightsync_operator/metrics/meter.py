"""What is counted from pass to pass: phases, rollouts, bytes and stalls. Losing it loses counts, nothing else."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Histogram

from weightsync_contract.fleetview import FleetView, MemberView
from weightsync_contract.messages import TransferState, VersionId
from weightsync_contract.reasons import Outcome, Reason, Role
from weightsync_operator.core.model import RolloutStatus, Status
from weightsync_operator.metrics import table
from weightsync_operator.metrics.table import Metric

PHASES: Final = (Reason.GROUPING, Reason.CHECKING, Reason.TRANSFERRING, Reason.COMMITTING)
STALLED_SECONDS: Final = 5.0
_PASS_BUCKETS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_PHASE_BUCKETS: Final = (
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.0,
    5.0,
    10.0,
    20.0,
    30.0,
    60.0,
    120.0,
    300.0,
    600.0,
    1800.0,
)

Key = tuple[str, str]


@dataclass(slots=True)
class _Moved:
    """A member's bytes of one version, and since when they are so many."""

    version: VersionId | None
    bytes: int
    since: float


@dataclass(slots=True)
class _Seen:
    """A fleet at the last pass."""

    phase: str
    phase_since: float
    active_since: float | None
    rollout: RolloutStatus | None
    members: dict[str, _Moved] = field(default_factory=dict)


class Meter:
    """Counts. ``clock`` is monotonic, in seconds."""

    def __init__(self, registry: CollectorRegistry, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._fleets: dict[Key, _Seen] = {}
        self._reconciles = _counter(table.RECONCILES, registry)
        self._reconcile_seconds = _histogram(table.RECONCILE_SECONDS, registry, _PASS_BUCKETS)
        self._phase_seconds = _histogram(table.PHASE_SECONDS, registry, _PHASE_BUCKETS)
        self._rollouts = _counter(table.ROLLOUTS, registry)
        self._rollout_seconds = _histogram(table.ROLLOUT_SECONDS, registry, _PHASE_BUCKETS)
        self._bytes = _counter(table.RECEIVED_BYTES, registry)
        for result in ("ok", "error"):
            # From the start on, so that a first error is an increase.
            self._reconciles.labels(result)

    def reconciled(self, ok: bool, seconds: float) -> None:
        """A pass has ended."""
        self._reconciles.labels("ok" if ok else "error").inc()
        self._reconcile_seconds.observe(seconds)

    def seen(self, key: Key, view: FleetView, status: Status) -> None:
        """A fleet as a pass left it. The first look counts nothing: another leader may have counted it."""
        now, before = self._clock(), self._fleets.get(key)
        if before is None:
            self._fleets[key] = _Seen(view.phase, now, _since(view.phase, None, now), status.rollout)
            self._fleets[key].members = {each.uid: _moved(each, now) for each in _receivers(view)}
            self._bytes.labels(*key)
            return
        if view.phase != before.phase:
            if before.phase in PHASES:
                self._phase_seconds.labels(before.phase).observe(now - before.phase_since)
            before.phase, before.phase_since = view.phase, now
        self._count_rollout(key, before, status.rollout, now)
        before.active_since = _since(view.phase, before.active_since, now)
        self._count_bytes(key, before, view, now)

    def stalled(self, key: Key, view: FleetView) -> int:
        """Members that receive and have had no byte for a while."""
        fleet, now = self._fleets.get(key), self._clock()
        if fleet is None:
            return 0
        return sum(
            each.uid in fleet.members and now - fleet.members[each.uid].since >= STALLED_SECONDS
            for each in _receivers(view)
            if each.transfer.state is TransferState.RECEIVING
        )

    def keep(self, keys: Iterable[Key]) -> None:
        """Forget all fleets but these, and their counts: they are gone."""
        for key in self._fleets.keys() - set(keys):
            del self._fleets[key]
            self._bytes.remove(*key)
            for outcome in Outcome:
                # Nothing is said of one that was never counted.
                self._rollouts.remove_by_labels(
                    {**dict(zip(table.FLEET, key, strict=True)), "outcome": outcome}
                )

    def clear(self) -> None:
        """Another replica leads now."""
        self._fleets.clear()

    def _count_rollout(self, key: Key, before: _Seen, rollout: RolloutStatus | None, now: float) -> None:
        if rollout is None or rollout == before.rollout:
            return
        before.rollout = rollout
        if rollout.outcome is Outcome.IN_PROGRESS:
            return
        self._rollouts.labels(*key, rollout.outcome).inc()
        if before.active_since is not None:
            self._rollout_seconds.labels(rollout.outcome).observe(now - before.active_since)

    def _count_bytes(self, key: Key, before: _Seen, view: FleetView, now: float) -> None:
        members = {}
        for each in _receivers(view):
            moved, old = _moved(each, now), before.members.get(each.uid)
            if old is not None and (old.version, old.bytes) == (moved.version, moved.bytes):
                moved = old
            else:
                same = old is not None and old.version == moved.version
                self._bytes.labels(*key).inc(max(0, moved.bytes - (old.bytes if old and same else 0)))
            members[each.uid] = moved
        before.members = members


def _since(phase: str, since: float | None, now: float) -> float | None:
    """When what is under way began; None at rest. A pause is a part of it."""
    if phase in (Reason.COMPLETE, Reason.WAITING_FOR_FIRST_VERSION, Reason.NO_MEMBERS):
        return None
    return now if since is None and phase in PHASES else since


def _receivers(view: FleetView) -> list[MemberView]:
    return [each for each in view.members if each.role == Role.INFERENCE]


def _moved(member: MemberView, now: float) -> _Moved:
    return _Moved(member.transfer.version, member.transfer.bytes, now)


def _counter(metric: Metric, registry: CollectorRegistry) -> Counter:
    return Counter(metric.name, metric.help, metric.labels, registry=registry)


def _histogram(metric: Metric, registry: CollectorRegistry, buckets: tuple[float, ...]) -> Histogram:
    return Histogram(metric.name, metric.help, metric.labels, registry=registry, buckets=buckets)
