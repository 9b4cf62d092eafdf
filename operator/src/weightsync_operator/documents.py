"""Kubernetes documents to the model's dataclasses and back."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Final

from weightsync_contract.codec import camel, from_document, to_document
from weightsync_contract.messages import InFlight, Mode, ObjectRef, Timeouts, Transport
from weightsync_operator.core.model import InitialWeights, PodView, Requirement, Selector, Spec, Status

_UNITS: Final[dict[str, float]] = {
    "": 1,
    "m": 1e-3,
    "k": 1e3,
    "M": 1e6,
    "G": 1e9,
    "T": 1e12,
    "P": 1e15,
    "E": 1e18,
    "Ki": 1 << 10,
    "Mi": 1 << 20,
    "Gi": 1 << 30,
    "Ti": 1 << 40,
    "Pi": 1 << 50,
    "Ei": 1 << 60,
}
_QUANTITY: Final = re.compile(r"([+-]?[0-9.]+(?:[eE][+-]?[0-9]+)?)([a-zA-Z]*)")


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
    )


def status_document(status: Status) -> dict[str, Any]:
    """A status as JSON. Optional texts that say nothing are left out: "" is no time that the schema takes."""
    document: dict[str, Any] = to_document(status)
    _leave_out_empty_texts(status, document)
    return document


def parse_spec(spec: Mapping[str, Any]) -> Spec:
    """Read a spec that has its defaults."""
    transport, timeouts = spec.get("transport", {}), spec.get("timeouts", {})
    return Spec(
        trainer=parse_selector(spec["trainer"]["selector"]),
        inference=parse_selector(spec["inference"]["selector"]),
        retained_versions=spec["trainer"].get("retainedVersions", 2),
        initial_weights=InitialWeights(spec["inference"].get("initialWeights", "Withhold")),
        in_flight=InFlight(spec["inference"].get("inFlightRequests", "Keep")),
        transport=Transport(
            backend=transport.get("backend", "Gloo"),
            mode=Mode(transport.get("mode", "Packed")),
            buffer_bytes=parse_quantity(transport.get("bufferSize", "256Mi")),
            num_buffers=transport.get("numBuffers", 3),
            port=transport.get("port", 0),
        ),
        verify=spec.get("verification", "Digest") == "Digest",
        max_unavailable=str(spec.get("strategy", {}).get("maxUnavailable", "25%")),
        timeouts=Timeouts(
            join=float(timeouts.get("joinSeconds", 60)),
            transfer=float(timeouts.get("transferSeconds", 300)),
            commit=float(timeouts.get("commitSeconds", 60)),
        ),
        progress_seconds=float(timeouts.get("progressSeconds", 900)),
        paused=spec.get("paused", False),
        unsupported=_unsupported(spec),
    )


def parse_selector(selector: Mapping[str, Any]) -> Selector:
    """Read a label selector."""
    return Selector(
        labels=tuple(sorted((selector.get("matchLabels") or {}).items())),
        requirements=tuple(
            Requirement(row["key"], row["operator"], tuple(row.get("values") or ()))
            for row in selector.get("matchExpressions") or ()
        ),
    )


def parse_quantity(text: str) -> int:
    """Bytes of a Kubernetes quantity, such as ``256Mi`` or ``1e9``. Raises ValueError."""
    match = _QUANTITY.fullmatch(text)
    if match is None or match[2] not in _UNITS:
        raise ValueError(f"{text!r} is no quantity such as 256Mi")
    return int(float(match[1]) * _UNITS[match[2]])


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


def _unsupported(spec: Mapping[str, Any]) -> tuple[str, ...]:
    plane, transport = spec.get("dataPlane", {}), spec.get("transport", {})
    engine = plane.get("type") == "Engine"
    asked = {
        "strategy.steps": "steps" in spec.get("strategy", {}),
        "target.policy Pinned": spec.get("target", {}).get("policy") == "Pinned",
        "dataPlane.type Engine": engine,
        "dataPlane.staging Device": plane.get("staging") == "Device",
        "transport.backend NCCL": transport.get("backend") == "NCCL",
        "transport.mode PerTensor": transport.get("mode") == "PerTensor",
    }
    return tuple(f"{name} (planned for 0.2)" for name, is_asked in asked.items() if is_asked)


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
