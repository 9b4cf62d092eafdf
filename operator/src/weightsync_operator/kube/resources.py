"""The objects that the operator reads and writes, and how."""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Final

from weightsync_contract.messages import ObjectRef
from weightsync_contract.names import API_VERSION, GROUP, KIND, LABEL_ROLE, PLURAL
from weightsync_operator.core.model import Note
from weightsync_operator.kube.api import Api

_MAX_NOTE: Final = 1024


async def list_weightsyncs(api: Api, namespace: str = "") -> tuple[list[dict[str, Any]], str]:
    """All WeightSyncs (of a namespace, if given) and the list's resourceVersion; never from a cache."""
    answer = await api.request("GET", _weightsyncs(namespace))
    return answer["items"], answer["metadata"]["resourceVersion"]


async def get_weightsync(api: Api, namespace: str, name: str) -> dict[str, Any]:
    """One WeightSync. Raises NotFoundError."""
    return await api.request("GET", f"{_weightsyncs(namespace)}/{name}")


async def put_status(api: Api, document: Mapping[str, Any], status: Mapping[str, Any]) -> dict[str, Any]:
    """Write the status of the object as it was read; answers the object after it.

    Raises ConflictError if anybody changed it since (its resourceVersion and uid go along).
    """
    metadata = document["metadata"]
    path = f"{_weightsyncs(metadata['namespace'])}/{metadata['name']}/status"
    return await api.request("PUT", path, body={**document, "status": status})


async def list_pods(api: Api, namespace: str = "") -> tuple[list[dict[str, Any]], str]:
    """All pods with a role (of a namespace, if given) and the list's resourceVersion; never from a cache."""
    path = f"/api/v1/namespaces/{namespace}/pods" if namespace else "/api/v1/pods"
    answer = await api.request("GET", path, query={"labelSelector": LABEL_ROLE})
    return answer["items"], answer["metadata"]["resourceVersion"]


async def create_event(api: Api, ref: ObjectRef, note: Note, reporter: str, suffix: str) -> None:
    """Record an Event about a WeightSync.

    ``reporter`` is this replica's identity, ``suffix`` makes the Event's name unique.
    """
    message = note.message if len(note.message) <= _MAX_NOTE else note.message[: _MAX_NOTE - 3] + "..."
    await api.request(
        "POST",
        f"/apis/events.k8s.io/v1/namespaces/{ref.namespace}/events",
        body={
            "apiVersion": "events.k8s.io/v1",
            "kind": "Event",
            "metadata": {"name": f"{ref.name}.{suffix}", "namespace": ref.namespace},
            "eventTime": datetime.now(UTC).isoformat(timespec="microseconds")[:-6] + "Z",
            "type": "Warning" if note.warning else "Normal",
            "reason": note.reason,
            "action": "Rollout",
            "note": message,
            "reportingController": f"{GROUP}/operator",
            "reportingInstance": reporter[:128],
            "regarding": {
                "apiVersion": f"{GROUP}/{API_VERSION}",
                "kind": KIND,
                "namespace": ref.namespace,
                "name": ref.name,
                "uid": ref.uid,
            },
        },
    )


def _weightsyncs(namespace: str) -> str:
    scope = f"/namespaces/{namespace}" if namespace else ""
    return f"/apis/{GROUP}/{API_VERSION}{scope}/{PLURAL}"
