"""What a scrape says of a replica and its fleets; and that table, code and page say the same."""

import re
from pathlib import Path

import pytest
from aiohttp.test_utils import TestClient, TestServer
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from weightsync_contract.fleetview import FleetView, MemberView
from weightsync_contract.messages import Serving, ServingState, Transfer, TransferState, VersionId
from weightsync_operator.core.model import ConditionStatus, CurrentVersion, MemberCounts, Status
from weightsync_operator.metrics import table
from weightsync_operator.metrics.collector import FleetNow, ReplicaCollector, ReplicaNow
from weightsync_operator.metrics.meter import Meter
from weightsync_operator.metrics.server import metrics_app, new_registry

ROOT = Path(__file__).parents[4]
V4, V5 = VersionId("run", 4), VersionId("run", 5)
STATUS = Status(
    current=CurrentVersion("run", 4, time="2026-01-01T00:00:00Z"),
    members=MemberCounts(total=3, synced=1),
    conditions=(ConditionStatus("Ready", "True", "RollingOut", ""),),
)


def member(name: str, connected: bool = True, serving: Serving | None = None) -> MemberView:
    transfer = Transfer(TransferState.RECEIVING, version=V5, bytes=7, total_bytes=9)
    return MemberView(name, name, "inference", connected, 1, 1, transfer, serving=serving)


VIEW = FleetView(
    *("team", "policy", 2, 3, 4, "Transferring", ""),
    target=V5,
    current=V4,
    members=(
        MemberView("trainer-0", "t", "trainer", True, 1, 0, Transfer()),
        member("vllm-0", serving=Serving(ServingState.SERVING, version=V4)),
        member("vllm-1", serving=Serving(ServingState.FENCED, version=V4)),
        member("vllm-2", connected=False, serving=Serving(ServingState.SERVING, version=V4)),
    ),
)
LEADER = ReplicaNow("0.1.0", True, 3, 2, 1, 0, (FleetNow("team", "policy", STATUS, VIEW, 1),))
FOLLOWER = ReplicaNow("0.1.0", False, 0, 0, 0, 4)


def scraped(now: ReplicaNow) -> CollectorRegistry:
    registry = CollectorRegistry()
    ReplicaCollector(registry, lambda: now)
    return registry


@pytest.mark.parametrize(
    ("name", "labels", "value"),
    [
        ("weightsync_condition", {"condition": "Ready", "status": "True", "reason": "RollingOut"}, 1),
        ("weightsync_members", {"state": "Serving"}, 1),
        ("weightsync_members", {"state": "Fenced"}, 1),
        ("weightsync_members", {"state": "NotConnected"}, 1),
        ("weightsync_members", {"state": "Applying"}, 0),
        ("weightsync_members_synced", {}, 1),
        ("weightsync_members_stalled", {}, 1),
        ("weightsync_epoch", {}, 3),
        ("weightsync_target_version", {"run": "run"}, 5),
        ("weightsync_current_version", {"run": "run"}, 4),
        ("weightsync_current_version_timestamp_seconds", {}, 1767225600),
        ("weightsync_member_version", {"pod": "vllm-0", "run": "run"}, 4),
        # What is fenced serves nothing, whatever it holds.
        ("weightsync_member_version", {"pod": "vllm-1", "run": "run"}, None),
        ("weightsync_member_received_bytes", {"pod": "vllm-1"}, 7),
        ("weightsync_member_expected_bytes", {"pod": "vllm-1"}, 9),
        ("weightsync_member_received_bytes", {"pod": "trainer-0"}, None),
    ],
)
def test_a_fleet(name: str, labels: dict[str, str], value: float | None) -> None:
    own = {"namespace": "team", "weightsync": "policy", **labels}
    assert scraped(LEADER).get_sample_value(name, own) == value


def test_a_replica() -> None:
    leader = scraped(LEADER)
    values = {
        name: leader.get_sample_value(f"weightsync_{name}")
        for name in ("leader", "sessions", "queue_depth", "watch_failures_total", "list_failures_total")
    }
    assert values == {
        "leader": 1,
        "sessions": 3,
        "queue_depth": 2,
        "watch_failures_total": 1,
        "list_failures_total": 0,
    }


def test_a_follower_tells_of_itself_alone() -> None:
    names = {family.name for family in scraped(FOLLOWER).collect()}
    own = {metric.name.removesuffix("_total") for metric in table.METRICS if not metric.leader}
    assert names == own


def test_a_fleet_that_was_not_looked_at_yet_has_its_status() -> None:
    now = ReplicaNow("0.1.0", True, 0, 0, 0, 0, (FleetNow("team", "policy", STATUS),))
    own = {"namespace": "team", "weightsync": "policy"}
    assert scraped(now).get_sample_value("weightsync_members_synced", own) == 1
    assert scraped(now).get_sample_value("weightsync_epoch", own) is None


async def test_what_is_served_is_what_the_table_says() -> None:
    registry = new_registry()
    Meter(registry)
    ReplicaCollector(registry, lambda: LEADER)
    async with TestClient(TestServer(metrics_app(registry))) as http:
        answer = await http.get("/metrics")
        assert answer.headers["Content-Type"].startswith("text/plain")
        text = await answer.text()
    families = {
        family.name: (family.type, family.documentation)
        for family in text_string_to_metric_families(text)
        if family.name.startswith("weightsync_") and not family.name.endswith("_created")
    }
    assert families == {each.name.removesuffix("_total"): (each.kind, each.help) for each in table.METRICS}
    assert "process_resident_memory_bytes" in text


def test_names_are_as_prometheus_wants_them() -> None:
    for each in table.METRICS:
        assert re.fullmatch(r"weightsync_[a-z_]+", each.name)
        assert each.name.endswith("_total") == (each.kind is table.Kind.COUNTER), each.name
        if each.kind is table.Kind.HISTOGRAM:
            assert each.name.endswith("_seconds")
    assert len({each.name for each in table.METRICS}) == len(table.METRICS)


def test_the_page_has_the_table_of_the_code() -> None:
    page = (ROOT / "docs/metrics.md").read_text()
    assert table.markdown() in page, "put it there: python -m weightsync_operator.metrics.table"
