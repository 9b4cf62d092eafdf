"""Kubernetes documents to the model's dataclasses and back."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

from weightsync_contract.codec import camel, from_document, to_document
from weightsync_contract.messages import ObjectRef
from weightsync_contract.names import ANNOTATION_ACTION
from weightsync_operator.core.model import PodView, Spec, Status
from weightsync_operator.core.spec import parse_spec


@dataclass(frozen=True, slots=True)
class Stored:
    """A WeightSync as the API server has it. ``document`` is kept whole: a status write sends it back."""

    ref: ObjectRef
    resource_version: str
    created: str
    generation: int
    spec: Spec
    status: Status
    document: Mapping[str, Any] = field(repr=False)
    action: str = ""
    """The annotation weightsync.dev/action."""

    @property
    def key(self) -> tuple[str, str]:
        """What a queue calls it."""
        return self.ref.namespace, self.ref.name


def parse_weightsync(document: Mapping[str, Any]) -> Stored:
    """Read a WeightSync. Raises ValueError for what the CRD's schema would have refused."""
    metadata = document["metadata"]
    return Stored(
        ref=ObjectRef(metadata["namespace"], metadata["name"], metadata["uid"]),
        resource_version=metadata["resourceVersion"],
        created=metadata.get("creationTimestamp", ""),
        generation=metadata.get("generation", 0),
        spec=parse_spec(document["spec"]),
        status=from_document(Status, document.get("status") or {}, "status"),
        document=document,
        action=(metadata.get("annotations") or {}).get(ANNOTATION_ACTION, ""),
    )


def status_document(status: Status) -> dict[str, Any]:
    """A status as JSON. Optional texts that say nothing are left out: "" is no time that the schema takes."""
    document: dict[str, Any] = to_document(status)
    _leave_out_empty_texts(status, document)
    return document


def parse_pod(document: Mapping[str, Any]) -> PodView:
    """Read what decisions need of a pod."""
    metadata, status = document["metadata"], document.get("status") or {}
    phase = status.get("phase", "")
    return PodView(
        uid=metadata["uid"],
        namespace=metadata["namespace"],
        name=metadata["name"],
        labels=tuple(sorted((metadata.get("labels") or {}).items())),
        ip=status.get("podIP", ""),
        terminating=bool(metadata.get("deletionTimestamp")),
        finished=phase in ("Succeeded", "Failed"),
        succeeded=phase == "Succeeded",
    )


def _leave_out_empty_texts(value: Any, document: Any) -> None:
    if isinstance(value, tuple):
        for each, part in zip(value, document, strict=True):
            _leave_out_empty_texts(each, part)
    elif is_dataclass(value):
        for row in fields(value):
            inner = getattr(value, row.name)
            if inner == "" and row.default == "":
                del document[camel(row.name)]
            elif inner is not None:
                _leave_out_empty_texts(inner, document[camel(row.name)])
