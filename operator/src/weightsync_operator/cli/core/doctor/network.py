"""NetworkPolicies: would they let through what a fleet needs? Evaluated as Kubernetes defines them."""

import ipaddress
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from weightsync_contract.names import SESSION_PORT
from weightsync_operator.cli.core.doctor.facts import Document, Facts, labels, name_of
from weightsync_operator.cli.core.doctor.findings import Finding, fine, problem, unknown
from weightsync_operator.cli.core.doctor.pods import alive
from weightsync_operator.core.spec import matches, parse_selector, parse_spec

_DNS: Final = 53


@dataclass(frozen=True, slots=True)
class Peer:
    """A pod as policies see it."""

    namespace: str
    namespace_labels: Mapping[str, str]
    labels: Mapping[str, str]
    ip: str = ""


def blocking(
    policies: Sequence[Document],
    subject: Peer,
    direction: str,
    other: Peer,
    port: int | None,
    protocol: str = "TCP",
) -> list[str]:
    """Names of the policies that isolate ``subject`` while none of them lets ``other`` through; else nothing.

    ``direction`` is Ingress or Egress of ``subject``; ``port`` None means any port, as for ports taken at will.
    """
    chosen = [
        policy
        for policy in policies
        if direction in _types(policy) and _selects(policy["spec"].get("podSelector"), subject.labels)
    ]
    for policy in chosen:
        for rule in policy["spec"].get(direction.lower()) or ():
            peers = rule.get("from" if direction == "Ingress" else "to")
            if _ports_fit(rule.get("ports"), port, protocol) and (
                not peers or any(_is_peer(each, subject.namespace, other) for each in peers)
            ):
                return []
    return [name_of(policy) for policy in chosen]


def check_network(facts: Facts, document: Document) -> Iterator[Finding]:
    """Agents dial the operator; the ranks of a group connect to each other on ports that they take."""
    for got, where in (
        (facts.policies, facts.namespace),
        (facts.operator_policies, facts.operator_namespace),
    ):
        if got.denied:
            yield unknown("network", f"namespace {where}", f"NetworkPolicies can't be listed: {got.denied}")
    spec = parse_spec(document["spec"])
    pods = [pod for pod in facts.pods.items if alive(pod)]
    trainers = [pod for pod in pods if matches(spec.trainer, labels(pod))]
    members = [pod for pod in pods if matches(spec.inference, labels(pod))]
    found = [*_to_operator(facts, [*trainers, *members]), *_within(facts, document, trainers, members)]
    yield from found
    readable = not facts.policies.denied and not facts.operator_policies.denied
    if readable and not found and (facts.policies.items or facts.operator_policies.items):
        yield fine("network", f"NetworkPolicies let the fleet of {name_of(document)} through")


def _to_operator(facts: Facts, pods: Sequence[Document]) -> Iterator[Finding]:
    operator = next((_peer(facts, pod) for pod in facts.operator_pods.items if alive(pod)), None)
    if operator is None:
        return
    where = facts.operator_namespace
    for pod in pods:
        one = _peer(facts, pod)
        if by := blocking(facts.policies.items, one, "Egress", operator, SESSION_PORT):
            yield problem(
                "network",
                f"pod {name_of(pod)}",
                f"NetworkPolicy {', '.join(by)} keeps its agent from the operator in {where}",
                f"allow egress to namespace {where}, TCP port {SESSION_PORT}",
            )
        if by := blocking(facts.operator_policies.items, operator, "Ingress", one, SESSION_PORT):
            yield problem(
                "network",
                f"pod {name_of(pod)}",
                f"NetworkPolicy {where}/{', '.join(by)} lets no agent of namespace {facts.namespace} in",
                f"allow ingress from this namespace, TCP port {SESSION_PORT}: networkPolicy.sessionsFrom of the chart",
            )


def _within(
    facts: Facts, document: Document, trainers: Sequence[Document], members: Sequence[Document]
) -> Iterator[Finding]:
    """One pair a kind is looked at for each pod: its first neighbour speaks for the others."""
    pods = [*trainers, *members]
    for at, pod in enumerate(pods):
        other = pods[0] if at else (pods[1] if len(pods) > 1 else None)
        if other is None:
            return
        one, two = _peer(facts, pod), _peer(facts, other)
        out = blocking(facts.policies.items, one, "Egress", two, None)
        into = blocking(facts.policies.items, one, "Ingress", two, None)
        if out or into:
            ways = " and ".join(word for word, by in (("egress", out), ("ingress", into)) if by)
            yield problem(
                "network",
                f"pod {name_of(pod)}",
                f"NetworkPolicy {', '.join(dict.fromkeys([*out, *into]))} keeps it from {name_of(other)}: the ranks of "
                "a group connect to each other, on ports that the system chooses",
                f"allow {ways} between the pods of {name_of(document)} on all TCP ports: networkPolicy.fleets of "
                "the chart does",
            )


def _peer(facts: Facts, pod: Document) -> Peer:
    namespace = pod["metadata"]["namespace"]
    own = {"kubernetes.io/metadata.name": namespace, **facts.namespaces.get(namespace, {})}
    return Peer(namespace, own, labels(pod), (pod.get("status") or {}).get("podIP", ""))


def _types(policy: Document) -> Sequence[str]:
    spec = policy["spec"]
    return spec.get("policyTypes") or (["Ingress", "Egress"] if spec.get("egress") else ["Ingress"])


def _selects(selector: Mapping[str, Any] | None, of: Mapping[str, str]) -> bool:
    """An empty selector is everything, to a NetworkPolicy."""
    return not selector or not any(selector.values()) or matches(parse_selector(selector), dict(of))


def _is_peer(rule: Mapping[str, Any], own_namespace: str, other: Peer) -> bool:
    if "ipBlock" in rule:
        return bool(other.ip) and _in_block(rule["ipBlock"], other.ip)
    if "namespaceSelector" in rule:
        near = _selects(rule["namespaceSelector"], other.namespace_labels)
    else:
        near = other.namespace == own_namespace
    return near and _selects(rule.get("podSelector"), other.labels)


def _in_block(block: Mapping[str, Any], ip: str) -> bool:
    address = ipaddress.ip_address(ip)
    if address not in ipaddress.ip_network(block["cidr"], strict=False):
        return False
    return not any(address in ipaddress.ip_network(each, strict=False) for each in block.get("except") or ())


def _ports_fit(ports: Sequence[Mapping[str, Any]] | None, port: int | None, protocol: str) -> bool:
    if not ports:
        return True
    for each in ports:
        if each.get("protocol", "TCP") != protocol:
            continue
        if "port" not in each:
            return True
        first = each["port"]
        # A port by name is the pod's affair; ours has the name that the chart gives it.
        if isinstance(first, str):
            if port is not None:
                return True
            continue
        last = each.get("endPort", first)
        if port is None:
            # What the system chooses lies here (net.ipv4.ip_local_port_range).
            if first <= 32768 and last >= 60999:
                return True
        elif first <= port <= last:
            return True
    return False
