"""A WeightSync's spec as the API server returns it: defaults filled, units resolved, selectors matched."""

import re
from collections.abc import Mapping
from decimal import Decimal, InvalidOperation
from typing import Any, Final

from weightsync_contract.messages import InFlight, Mode, Staging, Timeouts, Transport
from weightsync_operator.core.model import InitialWeights, OnFailure, Pin, Requirement, Selector, Spec
from weightsync_operator.core.strategy import COUNT, parse_waves

PLANNED: Final = "planned for 0.2"

_UNITS: Final[dict[str, Decimal]] = {
    "": Decimal(1),
    "m": Decimal("0.001"),
    **{unit: Decimal(1000) ** power for power, unit in enumerate("kMGTPE", 1)},
    **{f"{unit}i": Decimal(1024) ** power for power, unit in enumerate("KMGTPE", 1)},
}
_QUANTITY: Final = re.compile(r"(\d+\.?\d*|\.\d+)([eE][+-]?\d+|[a-zA-Z]*)")


class SpecError(ValueError):
    """A spec that the CRD's schema would have refused; the message names the field."""


def parse_spec(document: Mapping[str, Any]) -> Spec:
    """Read ``.spec``; what is missing gets the CRD's default. Raises SpecError for what the CRD refuses."""
    try:
        return _parse(document)
    except SpecError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise SpecError(f"spec: {type(error).__name__}: {error}") from error


def _parse(document: Mapping[str, Any]) -> Spec:
    trainer, inference = document["trainer"], document["inference"]
    strategy, transport, timeouts = (_section(document, key) for key in ("strategy", "transport", "timeouts"))
    return Spec(
        trainer=parse_selector(trainer["selector"]),
        inference=parse_selector(inference["selector"]),
        retained_versions=int(trainer.get("retainedVersions", 2)),
        initial_weights=InitialWeights(inference.get("initialWeights", InitialWeights.WITHHOLD)),
        in_flight=InFlight(inference.get("inFlightRequests", InFlight.KEEP)),
        transport=Transport(
            backend=_backend(document),
            mode=Mode(transport.get("mode", Mode.PACKED)),
            buffer_bytes=parse_quantity(transport.get("bufferSize", "256Mi")),
            num_buffers=int(transport.get("numBuffers", 3)),
            port=int(transport.get("port", 0)),
            staging=_staging(document),
        ),
        verify=document.get("verification", "Digest") == "Digest",
        max_unavailable=_max_unavailable(strategy.get("maxUnavailable", "25%")),
        timeouts=Timeouts(
            join=float(timeouts.get("joinSeconds", 60)),
            transfer=float(timeouts.get("transferSeconds", 300)),
            commit=float(timeouts.get("commitSeconds", 60)),
        ),
        progress_seconds=float(timeouts.get("progressSeconds", 900)),
        paused=bool(document.get("paused", False)),
        waves=parse_waves(strategy.get("steps") or ()),
        on_failure=OnFailure(strategy.get("onFailure", OnFailure.HOLD)),
        pin=_pin(_section(document, "target")),
        unsupported=unsupported(document),
    )


def unsupported(document: Mapping[str, Any]) -> tuple[str, ...]:
    """Fields whose work comes with a later release, each with what it asks for."""
    plane = _section(document, "dataPlane")
    found = []
    if plane.get("type", "Sidecar") != "Sidecar":
        found.append(f"dataPlane.type {plane['type']} ({PLANNED})")
    return tuple(found)


def _staging(document: Mapping[str, Any]) -> Staging:
    """With type Engine there is none; it moves nothing in this release."""
    given = _section(document, "dataPlane").get("staging", Staging.HOST)
    return Staging.HOST if given == "None" else Staging(given)


def _backend(document: Mapping[str, Any]) -> str:
    """Gloo reaches the host's memory only; where NCCL is a choice, it is one that somebody made."""
    usual = "NCCL" if _staging(document) is Staging.DEVICE else "Gloo"
    return str(_section(document, "transport").get("backend", usual))


def _section(document: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    return document.get(key) or {}


def _pin(target: Mapping[str, Any]) -> Pin | None:
    if target.get("policy", "Latest") != "Pinned":
        return None
    return Pin(int(target["version"]), str(target.get("run", "")))


def _max_unavailable(value: Any) -> str:
    text = str(value)
    if not COUNT.fullmatch(text):
        raise SpecError(
            f"spec.strategy.maxUnavailable: {value!r} is neither a count nor a percentage such as 25%"
        )
    return text


def max_unavailable(text: str, members: int) -> int:
    """How many of ``members`` may be missing; a percentage is rounded up, and is at least one."""
    if text.endswith("%"):
        return max(1, -(-members * int(text[:-1]) // 100))
    return int(text)


# ---------------------------------------------------------------------------- selectors


def parse_selector(document: Mapping[str, Any]) -> Selector:
    """Read a label selector. Raises SpecError for an empty one: it would match every pod."""
    rows = document.get("matchExpressions") or ()
    selector = Selector(
        labels=tuple(sorted((document.get("matchLabels") or {}).items())),
        requirements=tuple(
            Requirement(row["key"], row["operator"], tuple(row.get("values") or ())) for row in rows
        ),
    )
    if not selector.labels and not selector.requirements:
        raise SpecError("spec: an empty selector would match every pod")
    return selector


def matches(selector: Selector, labels: Mapping[str, str]) -> bool:
    """Whether a pod with ``labels`` is selected. As in Kubernetes, NotIn holds where the key is missing."""
    return all(labels.get(key) == value for key, value in selector.labels) and all(
        _holds(row, labels) for row in selector.requirements
    )


def _holds(row: Requirement, labels: Mapping[str, str]) -> bool:
    match row.operator:
        case "In":
            return row.key in labels and labels[row.key] in row.values
        case "NotIn":
            return row.key not in labels or labels[row.key] not in row.values
        case "Exists":
            return row.key in labels
        case "DoesNotExist":
            return row.key not in labels
    raise SpecError(f"spec: selector operator {row.operator!r} is none of In, NotIn, Exists, DoesNotExist")


def parse_quantity(value: str | int) -> int:
    """Bytes of a Kubernetes quantity such as ``256Mi``, ``1.5G`` or ``1e9``, rounded up. Raises SpecError."""
    match = _QUANTITY.fullmatch(str(value).strip())
    if match is None:
        raise SpecError(f"spec: {value!r} is no quantity such as 256Mi")
    number, unit = match.groups()
    try:
        exact = Decimal(number + unit) if unit[1:].lstrip("+-").isdigit() else Decimal(number) * _UNITS[unit]
    except (KeyError, InvalidOperation):
        raise SpecError(f"spec: {value!r} is no quantity such as 256Mi") from None
    return int(exact.to_integral_value(rounding="ROUND_CEILING"))


def describe(selector: Selector) -> str:
    """The selector as people write it for ``kubectl get pods -l``."""
    terms = [f"{key}={value}" for key, value in selector.labels]
    for row in selector.requirements:
        values = f" ({', '.join(row.values)})"
        terms.append(
            {
                "In": f"{row.key} in{values}",
                "NotIn": f"{row.key} notin{values}",
                "Exists": row.key,
                "DoesNotExist": f"!{row.key}",
            }.get(row.operator, row.key)
        )
    return ",".join(terms)
