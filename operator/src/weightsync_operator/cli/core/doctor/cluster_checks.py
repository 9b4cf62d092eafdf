"""Checks of what is there once: API server, CRD, operator, certificates, injection."""

import re
from collections.abc import Iterator
from datetime import datetime
from typing import Final

from weightsync_contract.names import (
    API_VERSION,
    CA_FILE,
    CA_NAME,
    LABEL_CA_OF,
    LABEL_INJECT,
    LABEL_ROLE,
    LEASE_NAME,
)
from weightsync_operator.cli.core.doctor.facts import Facts, labels, name_of
from weightsync_operator.cli.core.doctor.findings import Finding, fine, problem, unknown, warning
from weightsync_operator.cli.core.doctor.pods import alive, read_pod

OLDEST_SERVER: Final = (1, 29)
LABEL_VERSION: Final = "app.kubernetes.io/version"
_STALE_SECONDS: Final = 120.0
"""A Lease is renewed each few seconds; this allows for clocks that differ."""


def check_server(facts: Facts) -> Iterator[Finding]:
    """Native sidecars need 1.29."""
    found = re.match(r"v?(\d+)\.(\d+)", facts.server_version)
    if found and (int(found[1]), int(found[2])) < OLDEST_SERVER:
        yield problem(
            "server",
            f"Kubernetes {facts.server_version}",
            "the agent is a native sidecar, which is on by default from 1.29",
            "upgrade the cluster",
        )
    else:
        yield fine("server", f"Kubernetes {facts.server_version or 'of an unknown version'}")


def check_crd(facts: Facts) -> Iterator[Finding]:
    """Served, and of the operator's release."""
    if facts.crd.denied:
        yield unknown("crd", "CRD", f"it can't be read: {facts.crd.denied}")
        return
    if not facts.crd.items:
        yield problem(
            "crd",
            "CRD",
            "the cluster does not know WeightSyncs",
            "install the chart, or kubectl apply -f crds/",
        )
        return
    (crd,) = facts.crd.items
    served = [each["name"] for each in crd["spec"]["versions"] if each["served"]]
    if API_VERSION not in served:
        yield problem(
            "crd",
            "CRD",
            f"it serves {', '.join(served) or 'nothing'}, and this release needs {API_VERSION}",
            "bring it up to date: helm upgrade, or kubectl apply -f crds/",
        )
        return
    release, running = labels(crd).get(LABEL_VERSION, ""), _operator_version(facts)
    if release and running and release != running:
        yield warning(
            "crd",
            "CRD",
            f"it is of release {release} and the operator of {running}",
            "bring both to one release: helm upgrade with crds.enabled, or kubectl apply -f crds/",
        )
    else:
        yield fine("crd", f"the CRD serves {API_VERSION}")


def check_operator(facts: Facts) -> Iterator[Finding]:
    """Somebody leads, and replicas are available."""
    where = facts.operator_namespace
    yield from _leader(facts)
    if facts.deployments.denied:
        yield unknown(
            "operator", f"operator in {where}", f"its Deployment can't be read: {facts.deployments.denied}"
        )
    for each in facts.deployments.items:
        wanted = each["spec"].get("replicas", 1)
        available = (each.get("status") or {}).get("availableReplicas", 0)
        subject = f"Deployment {where}/{name_of(each)}"
        if not available:
            yield problem(
                "operator",
                subject,
                f"none of {wanted} replicas is available: no rollout moves, engines serve on",
                f"kubectl -n {where} describe pods -l app.kubernetes.io/name=weightsync-operator",
            )
        elif available < wanted:
            yield warning(
                "operator",
                subject,
                f"{available} of {wanted} replicas are available",
                f"kubectl -n {where} describe pods -l app.kubernetes.io/name=weightsync-operator",
            )
    running = _operator_version(facts)
    if running and running != facts.cli_version:
        yield warning(
            "versions",
            "weightsync",
            f"this command is of release {facts.cli_version}, the operator of {running}",
            "take the command of the operator's release",
        )


def check_bundle(facts: Facts) -> Iterator[Finding]:
    """Agents trust the operator by a ConfigMap that it brings."""
    subject = f"ConfigMap {facts.namespace}/{CA_NAME}"
    if facts.bundle.denied:
        yield unknown("bundle", subject, f"it can't be read: {facts.bundle.denied}")
    elif not facts.bundle.items:
        yield problem(
            "bundle",
            subject,
            "it is not there, so no agent of this namespace can check the operator's certificate",
            "with the operator's own authority it comes with the first WeightSync: does the operator run and "
            f"look after this namespace (watchNamespace)? With session.certificateSecret bring its CA, as {CA_FILE}",
        )
    elif not (facts.bundle.items[0].get("data") or {}).get(CA_FILE):
        yield problem("bundle", subject, f"it has no key {CA_FILE}", "put the CA's certificate (PEM) there")
    elif labels(facts.bundle.items[0]).get(LABEL_CA_OF, facts.operator_namespace) != facts.operator_namespace:
        owner = labels(facts.bundle.items[0])[LABEL_CA_OF]
        yield warning(
            "bundle",
            subject,
            f"it belongs to the operator in {owner}, not to that in {facts.operator_namespace}",
            "let one operator look after a namespace: watchNamespace",
        )
    else:
        yield fine("bundle", f"{subject} is there")


def check_injection(facts: Facts) -> Iterator[Finding]:
    """Pods that ask for an agent need the policy that gives one, until they have it."""
    asking = [
        pod
        for pod in facts.pods.items
        if labels(pod).get(LABEL_INJECT) == "true" and labels(pod).get(LABEL_ROLE) and alive(pod)
    ]
    if not asking:
        return
    bare = [name_of(pod) for pod in asking if read_pod(pod).agent is None]
    if facts.mutating.denied:
        yield unknown(
            "injection", "injection", f"admission policies can't be listed: {facts.mutating.denied}"
        )
    elif facts.mutating.absent or not facts.mutating.items:
        why = (
            "this cluster has no MutatingAdmissionPolicy (1.36 has it)"
            if facts.mutating.absent
            else "there is no MutatingAdmissionPolicy of weightsync's"
        )
        level = problem if bare else warning
        yield level(
            "injection",
            "injection",
            f"{why}: new pods labelled {LABEL_INJECT}=true get no agent",
            "install the chart with injection.enabled, or put the agent into the template: "
            "examples/on-a-cluster/sidecar",
        )
    else:
        yield fine("injection", f"agents are injected by {name_of(facts.mutating.items[0])}")


def _leader(facts: Facts) -> Iterator[Finding]:
    subject = f"operator in {facts.operator_namespace}"
    if facts.lease.denied:
        yield unknown("leader", subject, f"its Lease can't be read: {facts.lease.denied}")
        return
    do = (
        "is it installed there? helm list -A; name another place with --operator NAMESPACE/SERVICE. If it is: "
        f"kubectl -n {facts.operator_namespace} logs deployment/{facts.operator_service}"
    )
    if not facts.lease.items:
        yield problem("leader", subject, f"there is no Lease {LEASE_NAME}: no operator has run there", do)
        return
    spec = facts.lease.items[0].get("spec") or {}
    holder, renewed = spec.get("holderIdentity"), spec.get("renewTime")
    if not holder or not renewed:
        yield problem("leader", subject, "nobody leads: no rollout moves, engines serve on", do)
        return
    age = (facts.now - datetime.fromisoformat(renewed.replace("Z", "+00:00"))).total_seconds()
    if age > _STALE_SECONDS:
        yield problem("leader", subject, f"{holder} was the last to lead and is silent for {age:.0f} s", do)
    else:
        yield fine("leader", f"{holder} leads")


def _operator_version(facts: Facts) -> str:
    return next((labels(each).get(LABEL_VERSION, "") for each in facts.deployments.items), "")
