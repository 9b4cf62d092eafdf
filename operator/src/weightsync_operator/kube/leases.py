"""The coordination Lease that says which replica leads."""

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from weightsync_contract.names import GROUP
from weightsync_operator.kube.api import Api

ADDRESS_ANNOTATION: Final = f"{GROUP}/session-address"


@dataclass(frozen=True, slots=True)
class LeaseRecord:
    """A Lease as it was read. ``holder`` is empty when nobody has it."""

    resource_version: str
    holder: str
    address: str
    """Where the holder's session server listens, ``host:port``."""
    duration_seconds: int
    renew_time: str
    transitions: int
    acquire_time: str


async def get_lease(api: Api, namespace: str, name: str, timeout: float) -> LeaseRecord:
    """Read it. Raises NotFoundError."""
    return _record(await api.request("GET", f"{_path(namespace)}/{name}", timeout=timeout))


async def create_lease(
    api: Api, namespace: str, name: str, holder: str, address: str, seconds: int, timeout: float
) -> LeaseRecord:
    """Make it, held by ``holder``. Raises ConflictError if another was faster."""
    now = lease_time()
    body = _body(namespace, name, LeaseRecord("", holder, address, seconds, now, 0, now))
    return _record(await api.request("POST", _path(namespace), body=body, timeout=timeout))


async def put_lease(api: Api, namespace: str, name: str, record: LeaseRecord, timeout: float) -> LeaseRecord:
    """Write it over the one that was read. Raises ConflictError if anybody changed that."""
    body = _body(namespace, name, record)
    return _record(await api.request("PUT", f"{_path(namespace)}/{name}", body=body, timeout=timeout))


def lease_time() -> str:
    """The wall clock as a Lease has it; for people, nobody compares it."""
    return datetime.now(UTC).isoformat(timespec="microseconds")[:-6] + "Z"


def _path(namespace: str) -> str:
    return f"/apis/coordination.k8s.io/v1/namespaces/{namespace}/leases"


def _body(namespace: str, name: str, record: LeaseRecord) -> dict[str, Any]:
    metadata: dict[str, Any] = {"name": name, "namespace": namespace}
    if record.resource_version:
        metadata["resourceVersion"] = record.resource_version
    metadata["annotations"] = {ADDRESS_ANNOTATION: record.address}
    return {
        "apiVersion": "coordination.k8s.io/v1",
        "kind": "Lease",
        "metadata": metadata,
        "spec": {
            "holderIdentity": record.holder,
            "leaseDurationSeconds": record.duration_seconds,
            "acquireTime": record.acquire_time,
            "renewTime": record.renew_time,
            "leaseTransitions": record.transitions,
        },
    }


def _record(document: dict[str, Any]) -> LeaseRecord:
    metadata, spec = document["metadata"], document.get("spec", {})
    return LeaseRecord(
        resource_version=metadata["resourceVersion"],
        holder=spec.get("holderIdentity") or "",
        address=(metadata.get("annotations") or {}).get(ADDRESS_ANNOTATION, ""),
        duration_seconds=spec.get("leaseDurationSeconds") or 0,
        renew_time=spec.get("renewTime") or "",
        transitions=spec.get("leaseTransitions") or 0,
        acquire_time=spec.get("acquireTime") or "",
    )
