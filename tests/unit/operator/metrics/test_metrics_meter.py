"""Counts over a fleet's passes, with a clock of the test's."""

from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from weightsync_contract.fleetview import FleetView, MemberView
from weightsync_contract.messages import Transfer, TransferState, VersionId
from weightsync_contract.reasons import Outcome
from weightsync_operator.core.model import RolloutStatus, Status
from weightsync_operator.metrics.meter import STALLED_SECONDS, Meter

KEY = ("team", "policy")
V1, V2 = VersionId("run", 1), VersionId("run", 2)


class Bench:
    """A meter, its clock, and what a scrape would say."""

    def __init__(self) -> None:
        self.now = 100.0
        self.registry = CollectorRegistry()
        self.meter = Meter(self.registry, lambda: self.now)

    def value(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(name, labels)

    def fleet(self, **labels: str) -> dict[str, str]:
        return {"namespace": "team", "weightsync": "policy", **labels}

    def pass_(
        self,
        phase: str,
        seconds: float = 0.0,
        status: Status | None = None,
        **members: tuple[VersionId | None, int],
    ) -> FleetView:
        self.now += seconds
        rows = tuple(
            MemberView(
                name,
                name,
                "inference",
                True,
                1,
                1,
                Transfer(TransferState.RECEIVING, version=version, bytes=nbytes, total_bytes=100),
            )
            for name, (version, nbytes) in members.items()
        )
        view = FleetView(*KEY, 1, 1, 2, phase, "", members=rows)
        self.meter.seen(KEY, view, status or Status())
        return view


def rollout(outcome: Outcome, version: int = 1) -> Status:
    return Status(rollout=RolloutStatus("run", version, outcome))


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_a_phase_is_as_long_as_it_was_seen(bench: Bench) -> None:
    for phase, seconds in (("Complete", 9.0), ("Grouping", 5.0), ("Transferring", 2.0), ("Complete", 3.0)):
        bench.pass_(phase, seconds)
    name = "weightsync_phase_duration_seconds"
    assert bench.value(f"{name}_sum", phase="Grouping") == 2.0
    assert bench.value(f"{name}_sum", phase="Transferring") == 3.0
    assert bench.value(f"{name}_count", phase="Complete") is None


@pytest.mark.parametrize("outcome", [Outcome.SUCCEEDED, Outcome.FAILED, Outcome.SUPERSEDED, Outcome.ABORTED])
def test_a_rollout_is_counted_once_when_it_ends(bench: Bench, outcome: Outcome) -> None:
    bench.pass_("Complete")
    bench.pass_("Grouping", 1.0)
    bench.pass_("Paused", 1.0, rollout(Outcome.IN_PROGRESS))
    bench.pass_("Transferring", 1.0, rollout(Outcome.IN_PROGRESS))
    for _ in range(2):
        bench.pass_("Complete", 2.0, rollout(outcome))
    assert bench.value("weightsync_rollouts_total", **bench.fleet(outcome=outcome)) == 1.0
    assert bench.value("weightsync_rollout_duration_seconds_sum", outcome=outcome) == 4.0


def test_the_next_rollout_is_counted_too_though_it_ended_the_same_way(bench: Bench) -> None:
    bench.pass_("Complete")
    for version in (1, 2):
        bench.pass_("Complete", 1.0, rollout(Outcome.SUCCEEDED, version))
    assert bench.value("weightsync_rollouts_total", **bench.fleet(outcome="Succeeded")) == 2.0


def test_what_an_earlier_leader_saw_is_not_counted_again(bench: Bench) -> None:
    bench.pass_("Complete", 0.0, rollout(Outcome.SUCCEEDED), vllm_0=(V1, 100))
    bench.pass_("Complete", 1.0, rollout(Outcome.SUCCEEDED), vllm_0=(V1, 100))
    assert bench.value("weightsync_rollouts_total", **bench.fleet(outcome="Succeeded")) is None
    assert bench.value("weightsync_received_bytes_total", **bench.fleet()) == 0.0


def test_bytes_are_those_that_came_since(bench: Bench) -> None:
    name = "weightsync_received_bytes_total"
    bench.pass_("Transferring", 0.0, vllm_0=(V1, 10))
    bench.pass_("Transferring", 1.0, vllm_0=(V1, 60))
    assert bench.value(name, **bench.fleet()) == 50.0
    # The next version begins at nothing; what has fallen was not received.
    bench.pass_("Transferring", 1.0, vllm_0=(V2, 20))
    assert bench.value(name, **bench.fleet()) == 70.0
    bench.pass_("Grouping", 1.0, vllm_0=(V2, 0))
    assert bench.value(name, **bench.fleet()) == 70.0
    # One that came late, and has some already.
    bench.pass_("Transferring", 1.0, vllm_0=(V2, 0), vllm_1=(V2, 5))
    assert bench.value(name, **bench.fleet()) == 75.0


def test_who_gets_no_bytes_for_a_while_is_stalled(bench: Bench) -> None:
    bench.pass_("Transferring", 0.0, vllm_0=(V1, 10), vllm_1=(V1, 10))
    view = bench.pass_("Transferring", STALLED_SECONDS - 1, vllm_0=(V1, 10), vllm_1=(V1, 11))
    assert bench.meter.stalled(KEY, view) == 0
    bench.now += 1
    assert bench.meter.stalled(KEY, view) == 1
    view = bench.pass_("Transferring", 1.0, vllm_0=(V1, 12), vllm_1=(V1, 12))
    assert bench.meter.stalled(KEY, view) == 0


def test_passes(bench: Bench) -> None:
    assert bench.value("weightsync_reconcile_total", result="error") == 0.0
    bench.meter.reconciled(True, 0.02)
    bench.meter.reconciled(False, 1.0)
    assert bench.value("weightsync_reconcile_total", result="ok") == 1.0
    assert bench.value("weightsync_reconcile_total", result="error") == 1.0
    assert bench.value("weightsync_reconcile_duration_seconds_sum") == 1.02


def test_a_weightsync_that_is_gone_leaves_no_series(bench: Bench) -> None:
    bench.pass_("Complete")
    bench.pass_("Complete", 1.0, rollout(Outcome.FAILED), vllm_0=(V1, 1))
    bench.meter.keep([("team", "other")])
    left: list[Any] = [
        sample
        for family in bench.registry.collect()
        for sample in family.samples
        if "weightsync" in sample.labels
    ]
    assert left == []
