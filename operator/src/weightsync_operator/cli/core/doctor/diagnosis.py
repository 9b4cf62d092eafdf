"""All checks, one after the other."""

from weightsync_operator.cli.core.doctor.cluster_checks import (
    check_bundle,
    check_crd,
    check_injection,
    check_operator,
    check_server,
)
from weightsync_operator.cli.core.doctor.facts import Facts
from weightsync_operator.cli.core.doctor.findings import Finding, fine, in_order
from weightsync_operator.cli.core.doctor.fleet_checks import (
    check_conditions,
    check_live,
    check_pods,
    check_selectors,
)
from weightsync_operator.cli.core.doctor.network import check_network


def diagnose(facts: Facts) -> list[Finding]:
    """Everything that was found, gravest first. Never empty: what is fine is said, too."""
    found: list[Finding] = []
    for check in (check_server, check_crd, check_operator):
        found += check(facts)
    if not facts.weightsyncs:
        found.append(fine("weightsyncs", f"there is no WeightSync in namespace {facts.namespace} to look at"))
        return in_order(found)
    for check in (check_bundle, check_injection):
        found += check(facts)
    for document in facts.weightsyncs:
        found += check_conditions(document)
        for each in (check_selectors, check_pods, check_live, check_network):
            found += each(facts, document)
    return in_order(found)
