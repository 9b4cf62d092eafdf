"""Asks what a step of a rollout waits for: one GET a probe, its answer a Verdict. Decides nothing.

Whoever may write a WeightSync makes the operator send a GET. So it goes to http and https only, follows no
redirect, sends no credentials, reads little, and never goes to a link-local address, where clouds keep theirs.
"""

import asyncio
import errno
import json
import math
import socket
from collections.abc import Callable
from ipaddress import ip_address
from typing import Any, Final
from urllib.parse import urlsplit

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.resolver import ThreadedResolver

from weightsync_contract import logs
from weightsync_operator.core.model import Check, HttpCheck, Probe, PrometheusCheck, Verdict
from weightsync_operator.store import Key

log = logs.get(__name__)

MAX_BYTES: Final = 1 << 20
"""Of an answer; one that is longer does not pass."""
MAX_SECONDS: Final = 10.0
_SHOWN: Final = 80
"""Characters of what was answered that a message shows."""


class RefusedAddressError(OSError):
    """The operator does not talk to this address."""


class Checks:
    """Asks in the background; each probe's key once. ``answered`` gets what came of it.

    ``run`` must be running for anything to be asked. Belongs to one event loop.
    """

    def __init__(self, answered: Callable[[Key, Verdict], None]) -> None:
        self._answered = answered
        self._asked: dict[Key, str] = {}
        self._probes: asyncio.Queue[tuple[Key, Probe]] = asyncio.Queue()

    def ask(self, key: Key, probe: Probe) -> None:
        """Ask it soon, unless it was asked."""
        if self._asked.get(key) != probe.key:
            self._asked[key] = probe.key
            self._probes.put_nowait((key, probe))

    async def run(self) -> None:
        """Ask for ever."""
        connector = aiohttp.TCPConnector(resolver=_Resolver(), force_close=True)
        async with (
            aiohttp.ClientSession(connector=connector, trust_env=False) as session,
            asyncio.TaskGroup() as group,
        ):
            while True:
                key, probe = await self._probes.get()
                group.create_task(self._answer(session, key, probe))

    async def _answer(self, session: aiohttp.ClientSession, key: Key, probe: Probe) -> None:
        try:
            passed, message = await look(session, probe.check)
        except Exception as error:
            # It must end neither the operator nor the rollout's wait: the check's own deadline does that.
            log.exception("check not asked", weightsync="/".join(key))
            passed, message = False, f"not asked: {_reason(error)}"
        log.info("check answered", weightsync="/".join(key), passed=passed, message=message)
        self._answered(key, Verdict(probe.key, passed, message))


async def look(session: aiohttp.ClientSession, check: Check) -> tuple[bool, str]:
    """Ask once: whether it passes, and what was seen. Raises nothing that the network or the answer causes."""
    if check.http is not None:
        url, params = check.http.url, {}
    else:
        assert check.prometheus is not None
        url = check.prometheus.address.rstrip("/") + "/api/v1/query"
        params = {"query": check.prometheus.query}
    seconds = min(MAX_SECONDS, max(1.0, check.interval))
    try:
        async with asyncio.timeout(seconds):
            status, body = await _get(session, url, params)
    except TimeoutError:
        return False, f"no answer within {seconds:.0f} s"
    except (aiohttp.ClientError, OSError, ValueError) as error:
        return False, f"not reachable: {_reason(error)}"
    if check.http is not None:
        return judge_http(check.http, status, body)
    assert check.prometheus is not None
    return judge_prometheus(check.prometheus, status, body)


async def _get(session: aiohttp.ClientSession, url: str, params: dict[str, str]) -> tuple[int, bytes]:
    refuse(urlsplit(url).hostname or "")
    async with session.get(url, params=params, allow_redirects=False) as answer:
        body = bytearray()
        async for chunk in answer.content.iter_chunked(1 << 16):
            body += chunk
            if len(body) > MAX_BYTES:
                raise ValueError(f"the answer has more than {MAX_BYTES} bytes")
        return answer.status, bytes(body)


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:200]


# ---------------------------------------------------------------------------- what an answer means


def judge_http(check: HttpCheck, status: int, body: bytes) -> tuple[bool, str]:
    """Whether an answer is as expected, and what was seen."""
    if status != check.status:
        return False, f"HTTP {status}, expected {check.status}"
    if not check.path:
        return True, f"HTTP {status}"
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        return False, f"HTTP {status}, but the answer is no JSON"
    found, value = _at(document, check.path)
    if not found:
        return False, f"the answer has nothing at {check.path}"
    text = value if isinstance(value, str) else json.dumps(value)
    return text == check.equals, f"{check.path} is {text[:_SHOWN]}, expected {check.equals}"


def _at(document: Any, path: str) -> tuple[bool, Any]:
    for part in path.split("."):
        if isinstance(document, dict) and part in document:
            document = document[part]
        elif isinstance(document, list) and part.isdecimal() and int(part) < len(document):
            document = document[int(part)]
        else:
            return False, None
    return True, document


def judge_prometheus(check: PrometheusCheck, status: int, body: bytes) -> tuple[bool, str]:
    """Whether every sample of the query is within the bounds, and which one is not."""
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        return False, f"HTTP {status}, and the answer is no JSON: is this a Prometheus server?"
    if not isinstance(document, dict) or document.get("status") != "success" or status != 200:
        error = document.get("error", "") if isinstance(document, dict) else ""
        return False, f"the query failed with HTTP {status}: {str(error)[:_SHOWN]}"
    try:
        samples = _samples(document["data"])
    except (KeyError, TypeError, ValueError, IndexError):
        return False, "the answer is none of an instant query"
    if not samples:
        return False, "the query has no sample"
    for value in samples:
        if check.minimum is not None and not value >= check.minimum:
            return False, f"{value:g} is not at least {check.minimum:g}"
        if check.maximum is not None and not value <= check.maximum:
            return False, f"{value:g} is not at most {check.maximum:g}"
    return True, f"{', '.join(f'{each:g}' for each in samples[:3])} within bounds"


def _samples(data: dict[str, Any]) -> list[float]:
    if data["resultType"] == "scalar":
        return [_number(data["result"])]
    if data["resultType"] != "vector":
        raise ValueError(data["resultType"])
    return [_number(row["value"]) for row in data["result"]]


def _number(pair: Any) -> float:
    value = float(pair[1])
    # Not a number is within no bounds: a quotient without requests proves nothing.
    return value if not math.isnan(value) else math.nan


# ---------------------------------------------------------------------------- where it may go


def refuse(host: str) -> None:
    """Raises RefusedAddressError for a link-local address; a name is looked at once it is resolved."""
    try:
        address = ip_address(host)
    except ValueError:
        return
    mapped = getattr(address, "ipv4_mapped", None)
    if address.is_link_local or (mapped is not None and mapped.is_link_local):
        raise RefusedAddressError(errno.EACCES, f"{host} is link-local: the operator asks nothing there")


class _Resolver(AbstractResolver):
    """The system's, without addresses that are refused."""

    def __init__(self) -> None:
        self._inner = ThreadedResolver()

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        found = await self._inner.resolve(host, port, family)
        for each in found:
            refuse(each["host"])
        return found

    async def close(self) -> None:
        await self._inner.close()
