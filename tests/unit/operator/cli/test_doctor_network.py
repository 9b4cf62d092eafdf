"""NetworkPolicies, evaluated as Kubernetes defines them, and what the doctor makes of them."""

from dataclasses import replace
from typing import Any

import pytest
from doctor_facts import SOUND_FLEET

from weightsync_operator.cli.core.doctor.diagnosis import diagnose
from weightsync_operator.cli.core.doctor.facts import Got
from weightsync_operator.cli.core.doctor.findings import Level
from weightsync_operator.cli.core.doctor.network import Peer, blocking

ONE = Peer("team", {"kubernetes.io/metadata.name": "team"}, {"app": "vllm"}, "10.0.0.5")
OPERATOR = Peer(
    "system", {"kubernetes.io/metadata.name": "system", "tier": "infra"}, {"app": "operator"}, "10.0.1.9"
)

Object = dict[str, Any]


def policy(name: str = "p", **spec: Any) -> Object:
    return {"metadata": {"name": name}, "spec": {"podSelector": {}, **spec}}


def egress(*rules: Object) -> Object:
    return policy(policyTypes=["Egress"], egress=list(rules))


@pytest.mark.parametrize(
    ("policies", "blocks"),
    [
        ([], False),
        ([egress()], True),
        ([egress({})], False),
        # Of another pod, or of the other direction: none of ours.
        ([policy(podSelector={"matchLabels": {"app": "db"}}, policyTypes=["Egress"])], False),
        ([policy(policyTypes=["Ingress"])], False),
        # Without policyTypes it is about egress only where it has such rules.
        ([policy()], False),
        ([policy(egress=[{"ports": [{"port": 53}]}])], True),
        # One that lets through is enough: policies add up.
        ([egress(), egress({"to": [{"namespaceSelector": {}}]})], False),
        ([egress({"to": [{"namespaceSelector": {"matchLabels": {"tier": "infra"}}}]})], False),
        ([egress({"to": [{"namespaceSelector": {"matchLabels": {"tier": "apps"}}}]})], True),
        # A podSelector alone means the policy's own namespace.
        ([egress({"to": [{"podSelector": {}}]})], True),
        (
            [
                egress(
                    {"to": [{"namespaceSelector": {}, "podSelector": {"matchLabels": {"app": "operator"}}}]}
                )
            ],
            False,
        ),
        ([egress({"to": [{"namespaceSelector": {}, "podSelector": {"matchLabels": {"app": "x"}}}]})], True),
        ([egress({"to": [{"ipBlock": {"cidr": "10.0.0.0/8"}}]})], False),
        ([egress({"to": [{"ipBlock": {"cidr": "10.0.0.0/8", "except": ["10.0.1.0/24"]}}]})], True),
        ([egress({"ports": [{"port": 8443}]})], False),
        ([egress({"ports": [{"port": 8443, "protocol": "UDP"}]})], True),
        ([egress({"ports": [{"port": 8000, "endPort": 9000}]})], False),
        ([egress({"ports": [{"port": 443}]})], True),
        ([egress({"ports": [{"port": "session"}]})], False),
        ([egress({"ports": [{"protocol": "TCP"}]})], False),
    ],
)
def test_who_may_send(policies: list[Object], blocks: bool) -> None:
    assert bool(blocking(policies, ONE, "Egress", OPERATOR, 8443)) is blocks


@pytest.mark.parametrize(
    ("ports", "blocks"),
    [
        ([{"port": 29500}], True),
        ([{"port": 1024, "endPort": 65535}], False),
        ([{"port": 32768, "endPort": 60999}], False),
        ([{"port": 40000, "endPort": 65535}], True),
        ([{"port": "http"}], True),
        (None, False),
    ],
)
def test_ports_that_the_system_chooses_need_a_range(ports: list[Object] | None, blocks: bool) -> None:
    rule: Object = {"from": [{"podSelector": {}}], **({"ports": ports} if ports else {})}
    neighbour = replace(ONE, labels={"app": "trainer"})
    policies = [policy(policyTypes=["Ingress"], ingress=[rule])]
    assert bool(blocking(policies, ONE, "Ingress", neighbour, None)) is blocks


def told(**more: Any) -> list[tuple[str, str]]:
    found = diagnose(replace(SOUND_FLEET, **more))
    return [(each.subject, each.message) for each in found if each.level is Level.PROBLEM]


def test_a_namespace_that_lets_nothing_out() -> None:
    found = told(policies=Got((egress(),)))
    assert [subject for subject, _ in found] == ["pod trainer-0", "pod vllm-0"] * 2
    assert "keeps its agent from the operator in system" in found[0][1]
    assert "the ranks of a group connect to each other" in found[2][1]


def test_an_operator_that_lets_nobody_in() -> None:
    found = told(operator_policies=Got((policy("closed", policyTypes=["Ingress"], ingress=[]),)))
    assert {message for _, message in found} == {
        "NetworkPolicy system/closed lets no agent of namespace team in"
    }


def test_policies_that_let_the_fleet_through_are_fine() -> None:
    inside: Object = {"podSelector": {}}
    outside: Object = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "system"}}}
    mine = policy(
        policyTypes=["Ingress", "Egress"],
        ingress=[{"from": [inside]}],
        egress=[{"to": [inside]}, {"to": [outside], "ports": [{"port": 8443}]}],
    )
    assert told(policies=Got((mine,))) == []
    found = diagnose(replace(SOUND_FLEET, policies=Got((mine,))))
    assert any(each.message == "NetworkPolicies let the fleet of policy through" for each in found)


def test_who_may_not_list_them_is_told() -> None:
    found = diagnose(replace(SOUND_FLEET, policies=Got(denied="403")))
    assert [each.check for each in found if each.level is Level.UNKNOWN] == ["network"]
