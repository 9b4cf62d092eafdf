"""What the doctor says of cluster, operator, certificates and injection: a sound one, and each thing spoilt."""

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest

from weightsync_operator.cli.core.doctor.cluster_checks import (
    check_bundle,
    check_crd,
    check_injection,
    check_operator,
    check_server,
)
from weightsync_operator.cli.core.doctor.diagnosis import diagnose
from weightsync_operator.cli.core.doctor.facts import Facts, Got
from weightsync_operator.cli.core.doctor.findings import Level

NOW = datetime(2026, 1, 1, 12, 0, tzinfo=UTC)
NO = Got(denied="403 forbidden")


def named(name: str, labels: dict[str, str] | None = None, **more: Any) -> dict[str, Any]:
    return {"metadata": {"name": name, "labels": labels or {}}, **more}


def crd(served: bool = True, release: str = "0.1.0") -> Got:
    versions = [{"name": "v1alpha1", "served": served}]
    return Got((named("weightsyncs", {"app.kubernetes.io/version": release}, spec={"versions": versions}),))


def deployment(available: int, release: str = "0.1.0") -> Got:
    labels = {"app.kubernetes.io/version": release}
    return Got((named("operator", labels, spec={"replicas": 2}, status={"availableReplicas": available}),))


def lease(holder: str = "a", renewed: str = "2026-01-01T11:59:57.000000Z") -> Got:
    return Got((named("lease", spec={"holderIdentity": holder, "renewTime": renewed}),))


def bundle(owner: str = "system", key: str = "ca.crt") -> Got:
    return Got((named("weightsync-ca", {"weightsync.dev/ca-of": owner}, data={key: "PEM"}),))


def asking(agent: bool) -> dict[str, Any]:
    agents = [{"name": "weightsync-agent"}] if agent else []
    labels = {"weightsync.dev/inject": "true", "weightsync.dev/role": "inference"}
    return named("vllm-0", labels, spec={"initContainers": agents, "containers": [{"name": "vllm"}]})


SOUND = Facts(
    namespace="team",
    now=NOW,
    cli_version="0.1.0",
    server_version="v1.36.3",
    operator_namespace="system",
    operator_service="weightsync-operator",
    weightsyncs=(),
    neighbours=(),
    pods=Got((asking(agent=True),)),
    crd=crd(),
    deployments=deployment(2),
    operator_pods=Got(),
    lease=lease(),
    bundle=bundle(),
    mutating=Got((named("weightsync-operator-inject"),)),
    policies=Got(),
    operator_policies=Got(),
)
CHECKS = (check_server, check_crd, check_operator, check_bundle, check_injection)


def told(facts: Facts) -> list[tuple[Level, str]]:
    found = [each for check in CHECKS for each in check(facts)]
    assert all(each.do for each in found if each.level in (Level.PROBLEM, Level.WARNING))
    return [(each.level, each.message) for each in found if each.level is not Level.FINE]


def test_a_sound_cluster_has_nothing_to_object_to() -> None:
    assert told(SOUND) == []


@pytest.mark.parametrize(
    ("spoilt", "level", "said"),
    [
        ({"server_version": "v1.28.4"}, Level.PROBLEM, "native sidecar"),
        ({"crd": Got()}, Level.PROBLEM, "does not know WeightSyncs"),
        ({"crd": crd(served=False)}, Level.PROBLEM, "it serves nothing, and this release needs v1alpha1"),
        ({"crd": crd(release="0.0.9")}, Level.WARNING, "it is of release 0.0.9 and the operator of 0.1.0"),
        ({"crd": NO}, Level.UNKNOWN, "403 forbidden"),
        ({"deployments": deployment(0)}, Level.PROBLEM, "none of 2 replicas is available"),
        ({"deployments": deployment(1)}, Level.WARNING, "1 of 2 replicas are available"),
        ({"deployments": NO}, Level.UNKNOWN, "its Deployment can't be read"),
        ({"cli_version": "0.2.0"}, Level.WARNING, "this command is of release 0.2.0, the operator of 0.1.0"),
        ({"lease": Got()}, Level.PROBLEM, "no operator has run there"),
        ({"lease": lease(holder="")}, Level.PROBLEM, "nobody leads"),
        ({"lease": lease(renewed="2026-01-01T11:50:00Z")}, Level.PROBLEM, "is silent for 600 s"),
        ({"lease": NO}, Level.UNKNOWN, "its Lease can't be read"),
        ({"bundle": Got()}, Level.PROBLEM, "no agent of this namespace can check"),
        ({"bundle": bundle(key="tls.crt")}, Level.PROBLEM, "it has no key ca.crt"),
        ({"bundle": bundle(owner="elsewhere")}, Level.WARNING, "belongs to the operator in elsewhere"),
        ({"bundle": NO}, Level.UNKNOWN, "403"),
        ({"mutating": Got(absent=True)}, Level.WARNING, "this cluster has no MutatingAdmissionPolicy"),
        ({"mutating": Got()}, Level.WARNING, "there is no MutatingAdmissionPolicy of weightsync's"),
        ({"mutating": NO}, Level.UNKNOWN, "admission policies can't be listed"),
        ({"mutating": Got(), "pods": Got((asking(agent=False),))}, Level.PROBLEM, "get no agent"),
    ],
)
def test_each_thing_that_is_wrong_is_told(spoilt: dict[str, Any], level: Level, said: str) -> None:
    ((found, message),) = told(replace(SOUND, **spoilt))
    assert (found, said in message) == (level, True), message


def test_who_injects_nothing_needs_no_policy() -> None:
    assert told(replace(SOUND, pods=Got(), mutating=Got(absent=True))) == []


def test_without_a_weightsync_the_operator_is_looked_at_all_the_same() -> None:
    found = diagnose(replace(SOUND, lease=Got()))
    assert [each.check for each in found if each.level is Level.PROBLEM] == ["leader"]
    assert found[0].level is Level.PROBLEM, "the gravest comes first"
    assert any("there is no WeightSync in namespace team" in each.message for each in found)
