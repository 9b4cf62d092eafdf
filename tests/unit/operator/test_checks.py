"""What a step waits for is asked as it was written, and whatever comes back is a sentence."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.resolver import ThreadedResolver
from aiohttp.test_utils import TestServer

from weightsync_operator.checks import (
    MAX_BYTES,
    Checks,
    RefusedAddressError,
    judge_http,
    judge_prometheus,
    look,
    refuse,
)
from weightsync_operator.core.model import Check, HttpCheck, Probe, PrometheusCheck, Verdict

HTTP = HttpCheck("http://eval/ok")


# ---------------------------------------------------------------------------- what an answer means


@pytest.mark.parametrize(
    ("check", "status", "body", "passed", "says"),
    [
        (HTTP, 200, b"", True, "HTTP 200"),
        (HTTP, 503, b"", False, "HTTP 503, expected 200"),
        (HttpCheck("", 204), 204, b"", True, "HTTP 204"),
        (HttpCheck("", path="a.b", equals="ok"), 200, b'{"a": {"b": "ok"}}', True, "a.b is ok"),
        (HttpCheck("", path="a.b", equals="ok"), 200, b'{"a": {"b": "no"}}', False, "a.b is no, expected ok"),
        (HttpCheck("", path="a.1", equals="3"), 200, b'{"a": [1, 3]}', True, "a.1 is 3"),
        (HttpCheck("", path="a", equals="true"), 200, b'{"a": true}', True, "a is true"),
        (HttpCheck("", path="a", equals="true"), 200, b'{"a": "True"}', False, "a is True, expected true"),
        (HttpCheck("", path="a.2", equals="3"), 200, b'{"a": [1, 3]}', False, "nothing at a.2"),
        (HttpCheck("", path="a.b", equals=""), 200, b'{"a": {}}', False, "nothing at a.b"),
        (HttpCheck("", path="a", equals="1"), 200, b"<html>", False, "no JSON"),
        (HttpCheck("", path="a", equals="1"), 500, b'{"a": 1}', False, "HTTP 500, expected 200"),
    ],
)
def test_an_http_answer(check: HttpCheck, status: int, body: bytes, passed: bool, says: str) -> None:
    found, message = judge_http(check, status, body)
    assert found is passed
    assert says in message


def vector(*values: str) -> bytes:
    rows = [{"metric": {}, "value": [1700000000, value]} for value in values]
    return json.dumps({"status": "success", "data": {"resultType": "vector", "result": rows}}).encode()


AT_MOST = PrometheusCheck("", "q", maximum=0.1)
AT_LEAST = PrometheusCheck("", "q", minimum=5.0)


@pytest.mark.parametrize(
    ("check", "status", "body", "passed", "says"),
    [
        (AT_MOST, 200, vector("0.05"), True, "0.05 within bounds"),
        (AT_MOST, 200, vector("0.1"), True, "0.1"),
        (AT_MOST, 200, vector("0.05", "0.2"), False, "0.2 is not at most 0.1"),
        (AT_LEAST, 200, vector("5"), True, "5 within bounds"),
        (AT_LEAST, 200, vector("4.9"), False, "4.9 is not at least 5"),
        (AT_LEAST, 200, vector("+Inf"), True, "inf"),
        (AT_MOST, 200, vector("NaN"), False, "nan is not at most"),
        (AT_LEAST, 200, vector("NaN"), False, "nan is not at least"),
        (AT_MOST, 200, vector(), False, "no sample"),
        (AT_MOST, 200, b'{"status":"success","data":{"resultType":"scalar","result":[1,"0"]}}', True, "0"),
        (AT_MOST, 200, b'{"status":"success","data":{"resultType":"matrix","result":[]}}', False, "instant"),
        (AT_MOST, 200, b'{"status":"success"}', False, "instant"),
        (AT_MOST, 400, b'{"status":"error","error":"parse error at 1"}', False, "parse error at 1"),
        (AT_MOST, 200, b'["x"]', False, "failed"),
        (AT_MOST, 404, b"not found", False, "is this a Prometheus server?"),
        (AT_MOST, 500, vector("0"), False, "HTTP 500"),
    ],
)
def test_a_prometheus_answer(
    check: PrometheusCheck, status: int, body: bytes, passed: bool, says: str
) -> None:
    found, message = judge_prometheus(check, status, body)
    assert found is passed
    assert says in message


def test_little_of_what_was_answered_is_shown() -> None:
    """A condition can be read by more people than what the operator can reach."""
    body = json.dumps({"a": "secret" * 1000}).encode()
    assert len(judge_http(HttpCheck("", path="a", equals="x"), 200, body)[1]) < 200


# ---------------------------------------------------------------------------- asking


class Peer:
    """Answers as it is told to, and remembers what it was asked."""

    def __init__(self) -> None:
        self.status, self.body, self.seconds = 200, b"{}", 0.0
        self.headers: dict[str, str] = {}
        self.asked: list[web.Request] = []
        app = web.Application()
        app.router.add_get("/{path:.*}", self._handle)
        self.server = TestServer(app)

    async def _handle(self, request: web.Request) -> web.Response:
        self.asked.append(request)
        await asyncio.sleep(self.seconds)
        return web.Response(status=self.status, body=self.body, headers=self.headers)

    def url(self, path: str) -> str:
        return str(self.server.make_url(path))


@pytest.fixture
async def peer() -> AsyncIterator[Peer]:
    peer = Peer()
    await peer.server.start_server()
    yield peer
    await peer.server.close()


async def ask(check: Check) -> tuple[bool, str]:
    async with aiohttp.ClientSession() as session:
        return await look(session, check)


async def test_a_get_is_sent_as_written(peer: Peer) -> None:
    assert await ask(Check(http=HttpCheck(peer.url("/v1/eval?model=a&x=1")))) == (True, "HTTP 200")
    (request,) = peer.asked
    assert request.path_qs == "/v1/eval?model=a&x=1"
    assert "Authorization" not in request.headers


async def test_a_query_is_sent_as_written(peer: Peer) -> None:
    peer.body = vector("0.01")
    query = 'sum(rate(errors{job="a b"}[5m])) / 2 > +1 & x'
    check = Check(prometheus=PrometheusCheck(peer.url("/prom/"), query, maximum=0.1))
    assert (await ask(check))[0]
    (request,) = peer.asked
    assert request.path == "/prom/api/v1/query"
    assert request.query["query"] == query


async def test_a_redirect_is_not_followed(peer: Peer) -> None:
    peer.status, peer.headers = 302, {"Location": "/elsewhere"}
    assert await ask(Check(http=HttpCheck(peer.url("/")))) == (False, "HTTP 302, expected 200")
    assert len(peer.asked) == 1


async def test_a_server_that_does_not_answer_is_given_up_within_the_interval(peer: Peer) -> None:
    peer.seconds = 30.0
    passed, message = await ask(Check(http=HttpCheck(peer.url("/")), interval=1.0))
    assert (passed, message) == (False, "no answer within 1 s")


async def test_a_server_that_is_not_there_is_told_of(peer: Peer) -> None:
    url = peer.url("/")
    await peer.server.close()
    passed, message = await ask(Check(http=HttpCheck(url)))
    assert not passed
    assert message.startswith("not reachable: ")


async def test_an_answer_without_end_is_no_pass(peer: Peer) -> None:
    peer.body = b"x" * (MAX_BYTES + 1)
    passed, message = await ask(Check(http=HttpCheck(peer.url("/"))))
    assert not passed
    assert str(MAX_BYTES) in message


@pytest.mark.parametrize("host", ["169.254.169.254", "fe80::1", "::ffff:169.254.169.254"])
def test_a_link_local_address_is_refused(host: str) -> None:
    with pytest.raises(RefusedAddressError, match="link-local"):
        refuse(host)


@pytest.mark.parametrize("host", ["127.0.0.1", "10.0.0.1", "eval.ns.svc", "::1", ""])
def test_other_addresses_are_not(host: str) -> None:
    refuse(host)


async def test_an_address_that_is_refused_is_never_dialled() -> None:
    for url in ("http://169.254.169.254/latest/meta-data", "http://[fe80::1]/"):
        passed, message = await ask(Check(http=HttpCheck(url)))
        assert not passed
        assert "link-local" in message


async def test_a_name_that_stands_for_a_refused_address_is_refused_when_it_is_resolved(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def resolve(self: Any, host: str, port: int = 0, family: Any = 0) -> list[dict[str, Any]]:
        row = {"hostname": host, "host": "169.254.169.254", "port": port, "family": 2, "proto": 6, "flags": 0}
        return [row]

    monkeypatch.setattr(ThreadedResolver, "resolve", resolve)
    seen: list[Verdict] = []
    await _run(Check(http=HttpCheck("http://harmless.example/")), seen)
    assert not seen[0].passed
    assert "link-local" in seen[0].message


async def _run(check: Check, seen: list[Verdict], times: int = 1, count: int = 1) -> None:
    arrived = asyncio.Event()

    def answered(key: Any, verdict: Verdict) -> None:
        seen.append(verdict)
        if len(seen) == count:
            arrived.set()

    checks = Checks(answered)
    running = asyncio.create_task(checks.run())
    for number in range(count):
        for _ in range(times):
            checks.ask(("ns", "a"), Probe(f"key-{number}", check))
    await asyncio.wait_for(arrived.wait(), 10)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def test_each_probe_is_asked_once_however_often_it_is_decided(peer: Peer) -> None:
    seen: list[Verdict] = []
    await _run(Check(http=HttpCheck(peer.url("/"))), seen, times=5, count=2)
    assert len(peer.asked) == 2
    assert sorted(each.key for each in seen) == ["key-0", "key-1"]
    assert all(each.passed for each in seen)


async def test_whatever_goes_wrong_in_asking_is_no_pass_and_asking_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def burst(*_: Any) -> tuple[bool, str]:
        raise RuntimeError("a mistake of ours")

    monkeypatch.setattr("weightsync_operator.checks.refuse", burst)
    seen: list[Verdict] = []
    await _run(Check(http=HttpCheck("http://127.0.0.1:9/")), seen, count=2)
    assert [each.passed for each in seen] == [False, False]
    assert "a mistake of ours" in seen[0].message
