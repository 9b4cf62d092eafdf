"""Collects what the doctor looks at. What can't be had is no error: the doctor says so."""

import argparse
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final

from weightsync_contract.fleetview import FleetView
from weightsync_contract.names import CA_NAME, GROUP, LEASE_NAME, PLURAL
from weightsync_operator.cli.cluster import Cluster
from weightsync_operator.cli.core.doctor.diagnosis import diagnose
from weightsync_operator.cli.core.doctor.facts import Facts, Got, name_of
from weightsync_operator.cli.core.doctor.findings import Finding
from weightsync_operator.cli.live import Live, NoViewError, find_operator
from weightsync_operator.kube.errors import ForbiddenError, KubeError, NotFoundError
from weightsync_operator.release import own_version

_OPERATOR: Final = {"labelSelector": "app.kubernetes.io/name=weightsync-operator"}
_PART_OF: Final = {"labelSelector": "app.kubernetes.io/part-of=weightsync"}


async def examine(cluster: Cluster, given: argparse.Namespace) -> list[Finding]:
    """Look at one WeightSync, or at all of the namespace. Raises NotFoundError for one that is not there."""
    return diagnose(await collect(cluster, given))


async def collect(cluster: Cluster, given: argparse.Namespace) -> Facts:
    """Everything that the checks need."""
    version = (await cluster.api.request("GET", "/version")).get("gitVersion", "")
    crd = await _one(cluster, f"/apis/apiextensions.k8s.io/v1/customresourcedefinitions/{PLURAL}.{GROUP}")
    every = list((await _list(cluster, _weightsyncs(cluster))).items)
    chosen = [await cluster.weightsync(given.name)] if given.name else every
    operator = await find_operator(cluster, given.operator, given.operator_url)
    own, theirs = cluster.namespace, operator.namespace
    views, no_view = await _views(cluster, Live(cluster, operator, given.service_account), chosen)
    networking = "/apis/networking.k8s.io/v1/namespaces/{}/networkpolicies"
    return Facts(
        namespace=own,
        now=datetime.now(UTC),
        cli_version=own_version(),
        server_version=version,
        operator_namespace=theirs,
        operator_service=operator.service,
        weightsyncs=tuple(chosen),
        neighbours=tuple(every),
        pods=await _list(cluster, f"/api/v1/namespaces/{own}/pods"),
        crd=crd,
        deployments=await _list(cluster, f"/apis/apps/v1/namespaces/{theirs}/deployments", _OPERATOR),
        operator_pods=await _list(cluster, f"/api/v1/namespaces/{theirs}/pods", _OPERATOR),
        lease=await _one(cluster, f"/apis/coordination.k8s.io/v1/namespaces/{theirs}/leases/{LEASE_NAME}"),
        bundle=await _one(cluster, f"/api/v1/namespaces/{own}/configmaps/{CA_NAME}"),
        mutating=await _mutating(cluster),
        policies=await _list(cluster, networking.format(own)),
        operator_policies=await _list(cluster, networking.format(theirs)),
        namespaces={each: await _labels_of(cluster, each) for each in {own, theirs}},
        views=views,
        no_view=no_view,
    )


async def _views(
    cluster: Cluster, live: Live, documents: Sequence[Mapping[str, Any]]
) -> tuple[dict[str, FleetView], str]:
    views: dict[str, FleetView] = {}
    trouble = ""
    for each in documents:
        try:
            views[name_of(each)] = await live.view(name_of(each))
        except NoViewError as error:
            trouble = str(error)
    return views, trouble


async def _mutating(cluster: Cluster) -> Got:
    """Of the newest version that the cluster has."""
    for version in ("v1", "v1beta1", "v1alpha1"):
        path = f"/apis/admissionregistration.k8s.io/{version}/mutatingadmissionpolicies"
        got = await _list(cluster, path, _PART_OF)
        if not got.absent:
            return got
    return Got(absent=True)


async def _list(cluster: Cluster, path: str, query: dict[str, str] | None = None) -> Got:
    try:
        document = await cluster.api.request("GET", path, query=query)
        return Got(tuple(document["items"]))
    except NotFoundError:
        return Got(absent=True)
    except ForbiddenError as error:
        return Got(denied=str(error))


async def _one(cluster: Cluster, path: str) -> Got:
    try:
        return Got((await cluster.api.request("GET", path),))
    except NotFoundError:
        return Got()
    except ForbiddenError as error:
        return Got(denied=str(error))


async def _labels_of(cluster: Cluster, namespace: str) -> dict[str, str]:
    try:
        found = await cluster.api.request("GET", f"/api/v1/namespaces/{namespace}")
    except KubeError:
        return {}
    return dict(found["metadata"].get("labels") or {})


def _weightsyncs(cluster: Cluster) -> str:
    return f"/apis/{GROUP}/v1alpha1/namespaces/{cluster.namespace}/{PLURAL}"
