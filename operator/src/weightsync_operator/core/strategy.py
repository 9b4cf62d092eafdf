"""``spec.strategy.steps`` as the API server returns it, and how many members a step is of."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from weightsync_operator.core.model import Check, HttpCheck, Pause, PrometheusCheck, Wave

COUNT: Final = re.compile(r"\d+|(100|[1-9]?[0-9])%")
"""A count or a percentage."""


def parse_waves(steps: Sequence[Mapping[str, Any]]) -> tuple[Wave, ...]:
    """Read ``spec.strategy.steps``. Raises ValueError for what the CRD refuses."""
    return tuple(_wave(number, step) for number, step in enumerate(steps))


def _wave(number: int, step: Mapping[str, Any]) -> Wave:
    members = str(step["members"])
    if not COUNT.fullmatch(members) or members in ("0", "0%"):
        raise ValueError(
            f"spec.strategy.steps[{number}].members: {members!r} is neither a count from 1 nor a percentage"
        )
    pause, check = step.get("pause"), step.get("check")
    return Wave(members, None if pause is None else _pause(pause), None if check is None else _check(check))


def _pause(document: Mapping[str, Any]) -> Pause:
    seconds = document.get("durationSeconds")
    return Pause(None if seconds is None else float(seconds))


def _check(document: Mapping[str, Any]) -> Check:
    http, prometheus = document.get("http"), document.get("prometheus")
    if (http is None) == (prometheus is None):
        raise ValueError("a check asks either http or prometheus")
    return Check(
        http=None if http is None else _http(http),
        prometheus=None if prometheus is None else _prometheus(prometheus),
        interval=float(document.get("intervalSeconds", 10)),
        deadline=float(document.get("deadlineSeconds", 300)),
    )


def _http(document: Mapping[str, Any]) -> HttpCheck:
    json = document.get("json") or {}
    return HttpCheck(
        document["url"], int(document.get("status", 200)), json.get("path", ""), json.get("equals", "")
    )


def _prometheus(document: Mapping[str, Any]) -> PrometheusCheck:
    low, high = document.get("min"), document.get("max")
    if low is None and high is None:
        raise ValueError("a prometheus check needs min or max")
    return PrometheusCheck(
        document["address"],
        document["query"],
        None if low is None else float(low),
        None if high is None else float(high),
    )


def wave_size(text: str, members: int) -> int:
    """How many of ``members`` a step is of: a percentage rounded up, one at least, all at most."""
    count = -(-members * int(text[:-1]) // 100) if text.endswith("%") else int(text)
    return min(max(1, count), members)
