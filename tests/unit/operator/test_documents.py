"""Documents of the API server become the model, and back."""

from typing import Any

import pytest

from weightsync_contract.codec import from_document
from weightsync_contract.messages import InFlight, Mode
from weightsync_contract.reasons import Outcome
from weightsync_operator.core.model import (
    ConditionStatus,
    CurrentVersion,
    GroupStatus,
    InitialWeights,
    RolloutStatus,
    Status,
)
from weightsync_operator.core.spec import parse_quantity, parse_spec
from weightsync_operator.documents import parse_pod, status_document

SELECTORS: dict[str, Any] = {
    "trainer": {"selector": {"matchLabels": {"app": "trainer"}}},
    "inference": {"selector": {"matchLabels": {"app": "vllm"}}},
}


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("256Mi", 256 << 20),
        ("1.5Gi", 3 << 29),
        ("1048576", 1 << 20),
        ("2M", 2_000_000),
        ("1e9", 10**9),
        ("1000000000m", 10**6),
    ],
)
def test_quantities(text: str, number: int) -> None:
    assert parse_quantity(text) == number


@pytest.mark.parametrize("text", ["", "Mi", "1 Mi", "1mi", "1.2.3", "one"])
def test_no_quantities(text: str) -> None:
    with pytest.raises(ValueError, match=r"quantity|float"):
        parse_quantity(text)


def test_a_spec_is_read_whole() -> None:
    spec = parse_spec(
        {
            "trainer": {**SELECTORS["trainer"], "retainedVersions": 4},
            "inference": {**SELECTORS["inference"], "initialWeights": "Serve", "inFlightRequests": "Wait"},
            "transport": {"mode": "PerTensor", "bufferSize": "64Mi", "numBuffers": 2, "port": 2000},
            "strategy": {"maxUnavailable": 3},
            "verification": "None",
            "timeouts": {"joinSeconds": 1, "transferSeconds": 2, "commitSeconds": 3, "progressSeconds": 9},
            "paused": True,
        }
    )
    assert (spec.retained_versions, spec.initial_weights, spec.in_flight) == (
        4,
        InitialWeights.SERVE,
        InFlight.WAIT,
    )
    assert (spec.transport.mode, spec.transport.buffer_bytes) == (Mode.PER_TENSOR, 64 << 20)
    assert (spec.transport.num_buffers, spec.transport.port) == (2, 2000)
    assert (spec.max_unavailable, spec.verify, spec.paused) == ("3", False, True)
    assert (spec.timeouts.join, spec.timeouts.transfer, spec.timeouts.commit) == (1.0, 2.0, 3.0)
    assert spec.progress_seconds == 9.0


def test_what_comes_later_is_named() -> None:
    spec = parse_spec({**SELECTORS, "dataPlane": {"type": "Engine"}})
    assert spec.unsupported == ("dataPlane.type Engine (planned for 0.2)",)


def test_a_status_comes_back_as_it_was() -> None:
    status = Status(
        observed_generation=2,
        term=1,
        current=CurrentVersion("run", 3),
        rollout=RolloutStatus("run", 4, Outcome.IN_PROGRESS),
        group=GroupStatus(5, 2, "", ("0:1:a:b",)),
        conditions=(ConditionStatus("Ready", "True", "Synced", "", "2026-01-01T00:00:00Z", 2),),
    )
    document = status_document(status)
    assert from_document(Status, document) == status


def test_a_time_that_is_not_known_is_left_out() -> None:
    document = status_document(Status(current=CurrentVersion("run", 3)))
    assert document["current"] == {"run": "run", "version": 3}


def test_a_pod_that_is_over() -> None:
    pod = parse_pod(
        {
            "metadata": {
                "uid": "u",
                "name": "n",
                "namespace": "ns",
                "deletionTimestamp": "2026-01-01T00:00:00Z",
            },
            "status": {"phase": "Failed", "podIP": "10.0.0.1"},
        }
    )
    assert (pod.terminating, pod.finished, pod.succeeded, pod.ip) == (True, True, False, "10.0.0.1")
