"""A spec is read as the CRD fills it, and everything else is named."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightsync_contract.messages import InFlight, Mode, Staging, Timeouts, Transport
from weightsync_operator.core.model import (
    Check,
    HttpCheck,
    InitialWeights,
    OnFailure,
    Pause,
    Pin,
    PrometheusCheck,
    Requirement,
    Selector,
    Spec,
    Wave,
)
from weightsync_operator.core.spec import (
    SpecError,
    describe,
    matches,
    max_unavailable,
    parse_quantity,
    parse_selector,
    parse_spec,
)
from weightsync_operator.core.strategy import wave_size

MINIMAL: dict[str, Any] = {
    "trainer": {"selector": {"matchLabels": {"app": "trainer"}}},
    "inference": {"selector": {"matchLabels": {"app": "vllm"}}},
}


def test_what_is_missing_gets_the_default_of_the_crd() -> None:
    spec = parse_spec(MINIMAL)
    assert spec == Spec(
        trainer=Selector(labels=(("app", "trainer"),)),
        inference=Selector(labels=(("app", "vllm"),)),
        retained_versions=2,
        initial_weights=InitialWeights.WITHHOLD,
        in_flight=InFlight.KEEP,
        transport=Transport("Gloo", Mode.PACKED, 256 << 20, 3, 0),
        verify=True,
        max_unavailable="25%",
        timeouts=Timeouts(60.0, 300.0, 60.0),
        progress_seconds=900.0,
        paused=False,
        unsupported=(),
    )


def test_every_field_is_read() -> None:
    spec = parse_spec(
        {
            "trainer": {"selector": {"matchLabels": {"app": "t"}}, "retainedVersions": 5},
            "inference": {
                "selector": {"matchExpressions": [{"key": "app", "operator": "In", "values": ["a", "b"]}]},
                "initialWeights": "Serve",
                "inFlightRequests": "Abort",
            },
            "dataPlane": {"type": "Sidecar", "staging": "Host"},
            "transport": {
                "backend": "Gloo",
                "mode": "Packed",
                "bufferSize": "1Gi",
                "numBuffers": 2,
                "port": 29500,
            },
            "strategy": {"maxUnavailable": 3},
            "verification": "None",
            "target": {"policy": "Latest"},
            "timeouts": {"joinSeconds": 1, "transferSeconds": 2, "commitSeconds": 3, "progressSeconds": 6},
            "paused": True,
        }
    )
    assert spec == Spec(
        trainer=Selector(labels=(("app", "t"),)),
        inference=Selector(requirements=(Requirement("app", "In", ("a", "b")),)),
        retained_versions=5,
        initial_weights=InitialWeights.SERVE,
        in_flight=InFlight.ABORT,
        transport=Transport("Gloo", Mode.PACKED, 1 << 30, 2, 29500),
        verify=False,
        max_unavailable="3",
        timeouts=Timeouts(1.0, 2.0, 3.0),
        progress_seconds=6.0,
        paused=True,
    )


@pytest.mark.parametrize(
    ("section", "field"),
    [
        ({"dataPlane": {"type": "Engine"}, "verification": "None"}, "dataPlane.type Engine"),
        (
            {"dataPlane": {"type": "Engine", "staging": "None"}, "verification": "None"},
            "dataPlane.type Engine",
        ),
    ],
)
def test_a_field_of_a_later_release_is_named_with_the_release(section: dict[str, Any], field: str) -> None:
    assert parse_spec(MINIMAL | section).unsupported == (f"{field} (planned for 0.2)",)


@pytest.mark.parametrize(
    ("plane", "transport", "backend", "staging"),
    [
        ({}, {}, "Gloo", Staging.HOST),
        ({"staging": "Host"}, {"backend": "NCCL"}, "NCCL", Staging.HOST),
        ({"staging": "Device"}, {}, "NCCL", Staging.DEVICE),
        ({"staging": "Device"}, {"backend": "NCCL"}, "NCCL", Staging.DEVICE),
    ],
)
def test_the_library_follows_from_where_versions_are_staged_unless_it_is_given(
    plane: dict[str, str], transport: dict[str, str], backend: str, staging: Staging
) -> None:
    spec = parse_spec(MINIMAL | {"dataPlane": plane, "transport": transport})
    assert (spec.transport.backend, spec.transport.staging, spec.unsupported) == (backend, staging, ())


def test_an_empty_list_of_steps_asks_for_nothing() -> None:
    assert parse_spec(MINIMAL | {"strategy": {"steps": []}}).waves == ()


def test_steps_are_read_with_pauses_and_checks() -> None:
    spec = parse_spec(
        MINIMAL
        | {
            "strategy": {
                "onFailure": "Rollback",
                "steps": [
                    {"members": 1, "pause": {}},
                    {
                        "members": "50%",
                        "pause": {"durationSeconds": 60},
                        "check": {
                            "http": {"url": "http://eval/ok", "json": {"path": "a.0", "equals": "yes"}},
                            "intervalSeconds": 5,
                            "deadlineSeconds": 50,
                        },
                    },
                    {
                        "members": "100%",
                        "check": {"prometheus": {"address": "http://prom", "query": "up", "min": 1}},
                    },
                ],
            }
        }
    )
    assert spec.on_failure is OnFailure.ROLLBACK
    assert spec.waves == (
        Wave("1", Pause()),
        Wave(
            "50%",
            Pause(60.0),
            Check(http=HttpCheck("http://eval/ok", 200, "a.0", "yes"), interval=5.0, deadline=50.0),
        ),
        Wave("100%", None, Check(prometheus=PrometheusCheck("http://prom", "up", 1.0, None))),
    )


def test_a_pinned_version_is_read_with_its_run() -> None:
    pinned = {"policy": "Pinned", "version": 7}
    assert parse_spec(MINIMAL | {"target": pinned}).pin == Pin(7, "")
    assert parse_spec(MINIMAL | {"target": {**pinned, "run": "b"}}).pin == Pin(7, "b")
    assert parse_spec(MINIMAL | {"target": {"policy": "Latest"}}).pin is None


@pytest.mark.parametrize(
    "step",
    [
        {"members": 0},
        {"members": "0%"},
        {"members": "many"},
        {},
        {"members": 1, "check": {}},
        {
            "members": 1,
            "check": {
                "http": {"url": "http://a"},
                "prometheus": {"address": "http://b", "query": "up", "min": 1},
            },
        },
        {"members": 1, "check": {"prometheus": {"address": "http://b", "query": "up"}}},
    ],
)
def test_a_step_that_the_crd_would_refuse_is_refused(step: dict[str, Any]) -> None:
    with pytest.raises(SpecError):
        parse_spec(MINIMAL | {"strategy": {"steps": [step]}})


@pytest.mark.parametrize(
    ("text", "members", "expected"),
    [("1", 4, 1), ("9", 4, 4), ("50%", 4, 2), ("50%", 3, 2), ("1%", 3, 1), ("100%", 7, 7), ("3", 0, 0)],
)
def test_a_step_is_of_so_many_members(text: str, members: int, expected: int) -> None:
    assert wave_size(text, members) == expected


@pytest.mark.parametrize(
    ("broken", "named"),
    [
        ({}, "trainer"),
        ({"trainer": {"selector": {"matchLabels": {"a": "b"}}}}, "inference"),
        (MINIMAL | {"trainer": {"selector": {}}}, "empty selector"),
        (MINIMAL | {"transport": {"bufferSize": "lots"}}, "'lots'"),
        (MINIMAL | {"strategy": {"maxUnavailable": "a%"}}, "maxUnavailable"),
        (MINIMAL | {"strategy": {"maxUnavailable": -1}}, "maxUnavailable"),
        (
            MINIMAL | {"inference": {"selector": {"matchLabels": {"a": "b"}}, "initialWeights": "Perhaps"}},
            "Perhaps",
        ),
        (MINIMAL | {"timeouts": {"joinSeconds": "soon"}}, "soon"),
        (MINIMAL | {"trainer": ["selector"]}, "spec"),
    ],
)
def test_what_the_crd_would_refuse_is_refused_by_name(broken: dict[str, Any], named: str) -> None:
    with pytest.raises(SpecError, match=named):
        parse_spec(broken)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("256Mi", 256 << 20),
        ("1Gi", 1 << 30),
        ("1.5Gi", 3 << 29),
        ("1M", 10**6),
        ("64Gi", 64 << 30),
        ("1e9", 10**9),
        ("1E9", 10**9),
        ("1E", 10**18),
        ("1Ei", 1 << 60),
        ("500m", 1),
        (".5k", 500),
        ("1.", 1),
        (1048576, 1 << 20),
    ],
)
def test_quantity(text: str | int, expected: int) -> None:
    assert parse_quantity(text) == expected


@pytest.mark.parametrize("text", ["", "Mi", "1mi", "1 Mi", "-1Mi", "1.2.3", "1ee3", "1MiB", "0x10", "1e"])
def test_what_is_no_quantity(text: str) -> None:
    with pytest.raises(SpecError):
        parse_quantity(text)


@pytest.mark.parametrize(
    ("row", "labels", "holds"),
    [
        ({"key": "a", "operator": "In", "values": ["x", "y"]}, {"a": "x"}, True),
        ({"key": "a", "operator": "In", "values": ["x", "y"]}, {"a": "z"}, False),
        ({"key": "a", "operator": "In", "values": ["x", "y"]}, {}, False),
        ({"key": "a", "operator": "NotIn", "values": ["x"]}, {"a": "z"}, True),
        ({"key": "a", "operator": "NotIn", "values": ["x"]}, {"a": "x"}, False),
        ({"key": "a", "operator": "NotIn", "values": ["x"]}, {}, True),
        ({"key": "a", "operator": "Exists"}, {"a": ""}, True),
        ({"key": "a", "operator": "Exists"}, {"b": ""}, False),
        ({"key": "a", "operator": "DoesNotExist"}, {"b": ""}, True),
        ({"key": "a", "operator": "DoesNotExist"}, {"a": ""}, False),
    ],
)
def test_an_expression_holds_as_in_kubernetes(
    row: dict[str, Any], labels: dict[str, str], holds: bool
) -> None:
    assert matches(parse_selector({"matchExpressions": [row]}), labels) is holds


def test_labels_and_expressions_must_all_hold() -> None:
    selector = parse_selector(
        {
            "matchLabels": {"app": "vllm", "tier": "gpu"},
            "matchExpressions": [{"key": "old", "operator": "DoesNotExist"}],
        }
    )
    assert matches(selector, {"app": "vllm", "tier": "gpu", "more": "1"})
    assert not matches(selector, {"app": "vllm"})
    assert not matches(selector, {"app": "vllm", "tier": "cpu"})
    assert not matches(selector, {"app": "vllm", "tier": "gpu", "old": ""})


def test_an_unknown_operator_selects_nothing_silently() -> None:
    selector = Selector(requirements=(Requirement("a", "Gt", ("1",)),))
    with pytest.raises(SpecError, match="Gt"):
        matches(selector, {"a": "2"})


def test_a_selector_is_described_as_kubectl_takes_it() -> None:
    selector = parse_selector(
        {
            "matchLabels": {"app": "vllm"},
            "matchExpressions": [
                {"key": "tier", "operator": "In", "values": ["a", "b"]},
                {"key": "zone", "operator": "NotIn", "values": ["c"]},
                {"key": "gpu", "operator": "Exists"},
                {"key": "old", "operator": "DoesNotExist"},
            ],
        }
    )
    assert describe(selector) == "app=vllm,tier in (a, b),zone notin (c),gpu,!old"


@pytest.mark.parametrize(
    ("text", "members", "expected"),
    [
        ("25%", 0, 1),
        ("25%", 1, 1),
        ("25%", 4, 1),
        ("25%", 5, 2),
        ("25%", 64, 16),
        ("0%", 10, 1),
        ("100%", 7, 7),
        ("0", 10, 0),
        ("3", 10, 3),
    ],
)
def test_max_unavailable_in_percent_is_rounded_up_and_at_least_one(
    text: str, members: int, expected: int
) -> None:
    assert max_unavailable(text, members) == expected


@given(st.integers(0, 100), st.integers(0, 10_000))
def test_a_percentage_is_never_less_than_exact(percent: int, members: int) -> None:
    allowed = max_unavailable(f"{percent}%", members)
    assert allowed * 100 >= percent * members
    assert allowed == 1 or (allowed - 1) * 100 < percent * members
