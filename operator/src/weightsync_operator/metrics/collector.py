"""What is read at a scrape: conditions, members, versions. Nothing is kept, so nothing outlives what it is about."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from weightsync_contract.fleetview import FleetView
from weightsync_contract.messages import ServingState
from weightsync_contract.reasons import Role
from weightsync_operator.core.model import Status
from weightsync_operator.metrics import table

NOT_CONNECTED = "NotConnected"


@dataclass(frozen=True, slots=True)
class FleetNow:
    """A WeightSync at the moment of a scrape. ``view`` is None before it was looked at."""

    namespace: str
    name: str
    status: Status
    view: FleetView | None = None
    stalled: int = 0


@dataclass(frozen=True, slots=True)
class ReplicaNow:
    """A replica at the moment of a scrape; ``fleets`` are the leader's alone."""

    version: str
    leads: bool
    sessions: int
    queue_depth: int
    watch_failures: int
    list_failures: int
    fleets: Sequence[FleetNow] = ()


class ReplicaCollector(Collector):
    """Asks ``now`` at each scrape."""

    def __init__(self, registry: CollectorRegistry, now: Callable[[], ReplicaNow]) -> None:
        self._now = now
        registry.register(self)

    def describe(self) -> Iterator[Metric]:
        """Names alone, so that registering asks nobody."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """The families."""
        return families(self._now())


def families(now: ReplicaNow) -> Iterator[Metric]:
    """A replica as metrics."""
    yield _gauge(table.INFO, [((now.version,), 1)])
    yield _gauge(table.LEADER, [((), int(now.leads))])
    yield _counter(table.WATCH_FAILURES, now.watch_failures)
    yield _counter(table.LIST_FAILURES, now.list_failures)
    if not now.leads:
        return
    yield _gauge(table.SESSIONS, [((), now.sessions)])
    yield _gauge(table.QUEUE_DEPTH, [((), now.queue_depth)])
    rows: dict[table.Metric, list[Row]] = {each: [] for each in _BY_FLEET}
    for fleet in now.fleets:
        _of_status(fleet, rows)
        if fleet.view is not None:
            _of_view(fleet, fleet.view, rows)
    for metric, found in rows.items():
        yield _gauge(metric, found)


Row = tuple[tuple[str, ...], float]

_BY_FLEET = (
    *(table.CONDITION, table.MEMBERS, table.MEMBERS_SYNCED, table.MEMBERS_STALLED, table.EPOCH),
    *(table.TARGET_VERSION, table.CURRENT_VERSION, table.CURRENT_TIME),
    *(table.MEMBER_VERSION, table.MEMBER_BYTES, table.MEMBER_TOTAL),
)


def _of_status(fleet: FleetNow, rows: dict[table.Metric, list[Row]]) -> None:
    own, status = (fleet.namespace, fleet.name), fleet.status
    for each in status.conditions:
        rows[table.CONDITION].append(((*own, each.type, each.status, each.reason), 1))
    rows[table.MEMBERS_SYNCED].append((own, status.members.synced))
    if status.current is not None:
        rows[table.CURRENT_VERSION].append(((*own, status.current.run), status.current.version))
        if status.current.time:
            time = datetime.fromisoformat(status.current.time.replace("Z", "+00:00"))
            rows[table.CURRENT_TIME].append((own, time.timestamp()))


def _of_view(fleet: FleetNow, view: FleetView, rows: dict[table.Metric, list[Row]]) -> None:
    own = (fleet.namespace, fleet.name)
    rows[table.EPOCH].append((own, view.epoch))
    rows[table.MEMBERS_STALLED].append((own, fleet.stalled))
    if view.target is not None:
        rows[table.TARGET_VERSION].append(((*own, view.target.run), view.target.version))
    members = [each for each in view.members if each.role == Role.INFERENCE]
    states = Counter(
        each.serving.state if each.connected and each.serving else NOT_CONNECTED for each in members
    )
    for state in (*ServingState, NOT_CONNECTED):
        rows[table.MEMBERS].append(((*own, state), states[state]))
    for each in members:
        serving, transfer = each.serving, each.transfer
        if serving is not None and serving.version is not None and serving.state is ServingState.SERVING:
            rows[table.MEMBER_VERSION].append(
                ((*own, each.name, serving.version.run), serving.version.version)
            )
        rows[table.MEMBER_BYTES].append(((*own, each.name), transfer.bytes))
        rows[table.MEMBER_TOTAL].append(((*own, each.name), transfer.total_bytes))


def _gauge(metric: table.Metric, rows: Sequence[Row]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(metric.name, metric.help, labels=metric.labels)
    for labels, value in rows:
        family.add_metric(labels, value)
    return family


def _counter(metric: table.Metric, value: float) -> CounterMetricFamily:
    return CounterMetricFamily(metric.name, metric.help, value=value)
