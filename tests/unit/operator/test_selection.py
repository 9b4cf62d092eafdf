"""Selectors mean what Kubernetes means by them, and a pod has one owner."""

import itertools
from typing import Any

import pytest

from weightsync_operator.core.model import PodView
from weightsync_operator.core.spec import matches, parse_selector
from weightsync_operator.documents import Stored, parse_weightsync
from weightsync_operator.selection import claims, owner

CASES = [
    ({"matchLabels": {"app": "a"}}, {"app": "a", "x": "y"}, True),
    ({"matchLabels": {"app": "a"}}, {"app": "b"}, False),
    ({"matchLabels": {"app": "a"}}, {}, False),
    ({"matchLabels": {"app": ""}}, {}, False),
    ({"matchExpressions": [{"key": "app", "operator": "In", "values": ["a", "b"]}]}, {"app": "b"}, True),
    ({"matchExpressions": [{"key": "app", "operator": "In", "values": ["a", "b"]}]}, {"app": "c"}, False),
    ({"matchExpressions": [{"key": "app", "operator": "In", "values": ["a"]}]}, {}, False),
    ({"matchExpressions": [{"key": "app", "operator": "NotIn", "values": ["a"]}]}, {"app": "a"}, False),
    ({"matchExpressions": [{"key": "app", "operator": "NotIn", "values": ["a"]}]}, {}, True),
    ({"matchExpressions": [{"key": "app", "operator": "Exists"}]}, {"app": ""}, True),
    ({"matchExpressions": [{"key": "app", "operator": "Exists"}]}, {}, False),
    ({"matchExpressions": [{"key": "app", "operator": "DoesNotExist"}]}, {}, True),
    ({"matchExpressions": [{"key": "app", "operator": "DoesNotExist"}]}, {"app": "a"}, False),
    (
        {"matchLabels": {"app": "a"}, "matchExpressions": [{"key": "x", "operator": "Exists"}]},
        {"app": "a"},
        False,
    ),
]


@pytest.mark.parametrize(("selector", "labels", "selected"), CASES)
def test_selectors(selector: dict[str, Any], labels: dict[str, str], selected: bool) -> None:
    assert matches(parse_selector(selector), labels) is selected


def weightsync(uid: str, created: str, *roster: str, namespace: str = "default") -> Stored:
    return parse_weightsync(
        {
            "metadata": {
                "uid": uid,
                "name": uid,
                "namespace": namespace,
                "resourceVersion": "1",
                "creationTimestamp": created,
            },
            "spec": {
                "trainer": {"selector": {"matchLabels": {"app": "trainer"}}},
                "inference": {"selector": {"matchLabels": {"app": "vllm"}}},
            },
            "status": {"group": {"epoch": 1, "members": list(roster)}},
        }
    )


POD = PodView(uid="pod-1", namespace="default", name="vllm-0", labels=(("app", "vllm"),))
OLD = weightsync("old", "2026-01-01T00:00:00Z")
NEW = weightsync("new", "2026-01-02T00:00:00Z")
HOLDER = weightsync("holder", "2026-01-03T00:00:00Z", "0:1:trainer-0:t", "1:1:vllm-0:pod-1")
ELSEWHERE = weightsync("elsewhere", "2025-01-01T00:00:00Z", namespace="other")


@pytest.mark.parametrize("order", list(itertools.permutations([OLD, NEW, ELSEWHERE])))
def test_the_oldest_owns_a_pod(order: list[Stored]) -> None:
    assert owner(POD, order) == OLD


@pytest.mark.parametrize("order", list(itertools.permutations([OLD, NEW, HOLDER])))
def test_an_older_one_does_not_take_a_pod_out_of_an_epoch(order: list[Stored]) -> None:
    assert owner(POD, order) == HOLDER


def test_only_the_loser_sees_a_claim() -> None:
    assert claims(NEW, [POD], [OLD, NEW]) == {"pod-1": OLD.ref}
    assert claims(OLD, [POD], [OLD, NEW]) == {}


def test_a_pod_that_nobody_selects_has_no_owner() -> None:
    assert owner(PodView(uid="x", namespace="default", name="x"), [OLD, NEW]) is None
