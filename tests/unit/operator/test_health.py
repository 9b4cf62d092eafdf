"""Alive means that work is done, not that a port is open."""

from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from weightsync_operator.health import MAX_SILENCE_SECONDS, MAX_TICK_SECONDS, Health


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def health_at(clock: Clock) -> Health:
    health = Health(ticked_at=lambda: 1000.0, leads=lambda: True, clock=clock)
    health.heard()
    return health


def test_a_queue_that_stands_still_is_a_problem() -> None:
    clock = Clock()
    health = health_at(clock)
    clock.now = 1000.0 + MAX_TICK_SECONDS
    assert health.problems() == []
    clock.now += 1
    assert health.problems() == ["the queue stands still for 61 s"]


def test_a_follower_has_no_queue_to_turn() -> None:
    clock = Clock()
    health = Health(ticked_at=lambda: 1000.0, leads=lambda: False, clock=clock)
    health.heard()
    clock.now = 1000.0 + MAX_TICK_SECONDS + 1
    assert health.problems() == []


def test_an_api_server_that_says_nothing_is_a_problem() -> None:
    clock = Clock()
    health = Health(ticked_at=clock, leads=lambda: True, clock=clock)
    health.heard()
    clock.now = 1000.0 + MAX_SILENCE_SECONDS + 1
    assert health.problems() == ["nothing heard from the API server for 301 s"]
    health.heard()
    assert health.problems() == []


async def test_the_routes_say_it() -> None:
    clock = Clock()
    health = health_at(clock)
    app = web.Application()
    health.add_routes(app)
    async with TestClient(TestServer(app)) as http:
        assert (await http.get("/readyz")).status == 503
        health.listed = True
        assert (await http.get("/readyz")).status == 200
        assert (await http.get("/healthz")).status == 200
        clock.now += 1000
        answer = await http.get("/healthz")
        assert answer.status == 503
        assert "the queue stands still" in await answer.text()
        # Not ready would take an otherwise fine follower out of a Service that agents dial.
        assert (await http.get("/readyz")).status == 200


async def test_without_a_certificate_nobody_is_sent_here() -> None:
    clock = Clock()
    health = health_at(clock)
    health.listed = True
    health.certificate = lambda: "no certificate yet"
    app = web.Application()
    health.add_routes(app)
    async with TestClient(TestServer(app)) as http:
        answer = await http.get("/readyz")
        assert (answer.status, await answer.text()) == (503, "no certificate yet\n")
        # A restart would bring none.
        assert (await http.get("/healthz")).status == 200
