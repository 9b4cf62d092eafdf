"""What was collected for the doctor: documents of the API server as they are, and why some could not be had."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from weightsync_contract.fleetview import FleetView

Document = Mapping[str, Any]
Documents = tuple[Document, ...]


@dataclass(frozen=True, slots=True)
class Got:
    """Something that was asked for: ``items`` if it was answered, else why not."""

    items: Documents = ()
    denied: str = ""
    absent: bool = False
    """The API server does not know such objects."""


@dataclass(frozen=True, slots=True)
class Facts:
    """A namespace, and what belongs to it elsewhere."""

    namespace: str
    now: datetime
    cli_version: str
    server_version: str
    operator_namespace: str
    operator_service: str
    weightsyncs: Documents
    """Those that are to be looked at."""
    neighbours: Documents
    """All of the namespace."""
    pods: Got
    """All of the namespace, with a role or without."""
    crd: Got
    deployments: Got
    """Of the operator's namespace, with the operator's label."""
    operator_pods: Got
    lease: Got
    bundle: Got
    """The ConfigMap with the operator's certificates."""
    mutating: Got
    """MutatingAdmissionPolicies that inject agents."""
    policies: Got
    """NetworkPolicies of the namespace."""
    operator_policies: Got
    """NetworkPolicies of the operator's namespace."""
    namespaces: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Labels of the two namespaces."""
    views: Mapping[str, FleetView] = field(default_factory=dict)
    """The live fleets, by WeightSync, that could be had."""
    no_view: str = ""
    """Why some could not."""


def labels(document: Document) -> dict[str, str]:
    """An object's labels."""
    return dict(document["metadata"].get("labels") or {})


def annotations(document: Document) -> dict[str, str]:
    """An object's annotations."""
    return dict(document["metadata"].get("annotations") or {})


def name_of(document: Document) -> str:
    """An object's name."""
    return str(document["metadata"]["name"])
