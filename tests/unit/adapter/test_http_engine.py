"""The adapter against a fake engine that fails on demand: what no real one does when asked to.

What goes well is held on real engines (tests/integration/test_engine_commit.py).
"""

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp import web
from staged_images import manifest_of, staged

from weightsync_contract.messages import Capability, InFlight
from weightsync_engine.adapter import ApplyError, EngineUnreachableError, HttpEngine, ManifestRefusedError
from weightsync_engine.adapter import http as http_module
from weightsync_engine.reference.model_files import TINY, random_weights
from weightsync_engine.worker.protocol import Hello, Problem
from weightsync_engine.worker.server import WorkerServer
from weightsync_engine.worker.session import UpdateSession, image_of
from weightsync_engine.worker.state import WorkerState

TOKEN = "the-agents-token-0123456789"
WEIGHTS = random_weights(TINY, 3)


class FakeEngine:
    """vLLM's routes over real worker sockets. ``script`` replaces what a route does."""

    def __init__(self, directory: Path, ranks: int = 2) -> None:
        self.directory = directory
        self.boot = "boot-1"
        self.ranks = ranks
        self.calls: list[str] = []
        self.script: dict[str, object] = {}
        self.paused = False
        self.active = False
        self.guarded = True
        self.problems: list[tuple[Problem, ...]] = [()] * ranks
        self.dies_in_load: set[int] = set()
        self.ended = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._servers: list[WorkerServer] = []
        (directory / "control-token").write_text(TOKEN)

    async def start(self) -> None:
        self.open_sockets()
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._answer)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def stop(self) -> None:
        self.close_sockets()
        await self._runner.cleanup()

    def open_sockets(self, boots: list[str] | None = None, size: int | None = None) -> None:
        names = boots or [self.boot] * self.ranks
        self.states = [
            WorkerState(Hello(boot, rank, size or self.ranks, "fake", os.getpid()))
            for rank, boot in enumerate(names)
        ]
        self.sessions = [
            UpdateSession(state, lambda manifest, rank=rank: self.problems[rank], self._load(rank))
            for rank, state in enumerate(self.states)
        ]
        self._servers = [
            WorkerServer(self.directory, str(rank), state, self._end)
            for rank, state in enumerate(self.states)
        ]
        for server in self._servers:
            server.start()

    def close_sockets(self) -> None:
        for server in self._servers:
            server.close()

    def _load(self, rank: int):
        def load(tensors) -> None:
            for _ in tensors:
                if rank in self.dies_in_load:
                    raise RuntimeError("the device is gone")

        return load

    def _end(self) -> None:
        self._loop.call_soon_threadsafe(self.ended.set)
        self.boot = "boot-2"
        self.script.clear()
        self.close_sockets()

    async def _answer(self, request: web.Request) -> web.Response:
        if request.headers.get("authorization") != f"Bearer {TOKEN}":
            return web.json_response({"error": {"message": "for the agent only"}}, status=401)
        self.calls.append(request.path)
        body = await request.json() if request.can_read_body else {}
        scripted = self.script.get(request.path)
        if scripted == "hang":
            await asyncio.sleep(60)
        if isinstance(scripted, list):
            scripted = scripted.pop(0) if scripted else None
        if isinstance(scripted, int):
            if scripted == 599:
                # The work is done all the same; only the answer is another call's.
                self._do(request.path, body)
            return web.json_response(
                {"error": {"message": f"scripted {scripted}"}}, status=min(scripted, 500)
            )
        if isinstance(scripted, dict):
            return web.json_response(scripted)
        return self._do(request.path, body)

    def _do(self, path: str, body) -> web.Response:
        match path:
            case "/weightsync/v1/status" if self.guarded:
                return web.json_response({"boot": self.boot, "trouble": ""})
            case "/weightsync/v1/restart" if self.guarded:
                self._end()
            case "/get_world_size":
                return web.json_response({"world_size": self.ranks})
            case "/pause":
                self.paused = True
            case "/resume":
                self.paused = False
            case "/is_paused":
                return web.json_response({"is_paused": self.paused})
            case "/init_weight_transfer_engine":
                for session in self.sessions:
                    session.preflight(body["init_info"]["layout"])
            case "/start_weight_update":
                if self.active:
                    return web.json_response({"error": {"message": "already active"}}, status=500)
                self.active = True
                for session in self.sessions:
                    session.start()
            case "/update_weights":
                for session in self.sessions:
                    session.receive(image_of(body["update_info"]))
            case "/finish_weight_update":
                begun = [session.begin() for session in self.sessions]
                for session in self.sessions:
                    session.complete(all(begun))
                self.active = False
            case "/health" | "/update_weight_version":
                pass
            case _:
                return web.json_response({"detail": "Not Found"}, status=404)
        return web.json_response({})


@pytest.fixture
async def fake(tmp_path) -> AsyncIterator[FakeEngine]:
    fake = FakeEngine(tmp_path)
    await fake.start()
    yield fake
    await fake.stop()


@pytest.fixture
async def engine(fake) -> AsyncIterator[HttpEngine]:
    async with HttpEngine(fake.url, fake.directory) as engine:
        yield engine


async def apply(engine: HttpEngine, seconds: float = 5.0, how: InFlight = InFlight.KEEP) -> None:
    with staged(WEIGHTS, 4) as image:
        await engine.preflight(image.manifest)
        await engine.apply(image, how, seconds)


# --------------------------------------------------------------------------------------------------------- probe


async def test_an_engine_with_all_that_is_needed(engine):
    info = await engine.probe()
    assert (info.boot, info.world_size, set(info.capabilities)) == ("boot-1", 2, set(Capability))


async def test_without_the_guard_it_does_not_guard(fake, engine):
    fake.guarded = False
    info = await engine.probe()
    assert Capability.GUARDS not in info.capabilities
    assert (info.boot, Capability.STAGES in info.capabilities) == ("boot-1", True)


async def test_without_the_backend_it_does_not_stage(fake, engine):
    fake.close_sockets()
    assert (await engine.probe()).capabilities == (Capability.GUARDS,)


async def test_with_neither_it_is_told_what_to_start_it_with(fake, engine):
    fake.guarded = False
    fake.close_sockets()
    with pytest.raises(EngineUnreachableError, match=r"--middleware weightsync_engine\.guard\.Guard"):
        await engine.probe()


async def test_workers_that_no_longer_answer_are_no_engine_without_workers(fake, engine):
    await engine.probe()
    fake.close_sockets()
    with pytest.raises(EngineUnreachableError, match="rank 0 does not answer"):
        await engine.probe()


async def test_processes_of_two_boots_are_no_engine(fake, engine):
    fake.close_sockets()
    fake.open_sockets(["boot-1", "boot-0"])
    with pytest.raises(EngineUnreachableError, match="several boots answer"):
        await engine.probe()


async def test_a_socket_of_another_world_is_no_rank(fake, engine):
    fake.close_sockets()
    fake.open_sockets(size=4)
    with pytest.raises(EngineUnreachableError, match="the socket of rank 0 of 2 is that of 0 of 4"):
        await engine.probe()


PROBES = [
    ("/health", 500, "/health answered 500"),
    ("/get_world_size", 404, "VLLM_SERVER_DEV_MODE=1"),
    ("/get_world_size", {"world_size": 0}, "answered 0"),
    ("/get_world_size", {"world_size": "2"}, "answered '2'"),
    ("/weightsync/v1/status", 500, "scripted 500"),
    ("/weightsync/v1/status", {"boot": "", "trouble": "no leader"}, "no leader"),
    ("/weightsync/v1/status", "hang", "no answer in|did not answer within"),
]


@pytest.mark.parametrize(("route", "does", "words"), PROBES)
async def test_a_probe_says_what_is_wrong(fake, engine, monkeypatch, route, does, words):
    monkeypatch.setattr(http_module, "PROBE_SECONDS", 0.5)
    fake.script[route] = does
    with pytest.raises(EngineUnreachableError, match=words):
        await engine.probe()


async def test_another_token_is_told(fake, engine):
    (fake.directory / "control-token").write_text("another-token-0123456789")
    with pytest.raises(EngineUnreachableError, match="401: for the agent only"):
        await engine.probe()


async def test_nobody_there(tmp_path):
    async with HttpEngine("http://127.0.0.1:9", tmp_path) as engine:
        with pytest.raises(EngineUnreachableError):
            await engine.probe()


# ----------------------------------------------------------------------------------------------------- preflight


async def test_problems_of_all_ranks_are_told_once(fake, engine):
    common = Problem("a.weight", "is wrong", "mend it")
    fake.problems = [(common,), (common, Problem("b.weight", "is odd", "even it"))]
    with pytest.raises(ManifestRefusedError) as refused:
        await engine.preflight(manifest_of(WEIGHTS))
    assert str(refused.value) == (
        "the engine's model can't take 2 tensors: a.weight: is wrong; mend it; b.weight: is odd; even it (rank 1)"
    )


async def test_many_problems_are_counted(fake, engine):
    fake.problems = [tuple(Problem(f"t{n}", "is wrong", "mend it") for n in range(50)), ()]
    with pytest.raises(ManifestRefusedError, match=r"50 tensors: t0.*t7: is wrong; mend it; and 42 more$"):
        await engine.preflight(manifest_of(WEIGHTS))


async def test_a_check_that_did_not_happen_is_no_consent(fake, engine):
    fake.script["/init_weight_transfer_engine"] = {"message": "ok"}
    with pytest.raises(EngineUnreachableError, match="has not checked"):
        await engine.preflight(manifest_of(WEIGHTS))


async def test_an_engine_that_fails_to_check_is_told(fake, engine):
    fake.script["/init_weight_transfer_engine"] = 500
    with pytest.raises(EngineUnreachableError, match="scripted 500"):
        await engine.preflight(manifest_of(WEIGHTS))


# --------------------------------------------------------------------------------------------------------- apply


@pytest.mark.parametrize(
    ("how", "mode"), [(InFlight.KEEP, "keep"), (InFlight.WAIT, "wait"), (InFlight.ABORT, "abort")]
)
async def test_the_order_of_an_apply(fake, engine, how, mode):
    queries = []
    do = fake._do
    fake._do = lambda path, body: (queries.append(path), do(path, body))[1]
    await apply(engine, how=how)
    steps = [call for call in fake.calls if call not in ("/get_world_size", "/init_weight_transfer_engine")]
    assert steps == [
        "/pause",
        "/start_weight_update",
        "/update_weights",
        "/finish_weight_update",
        "/update_weight_version",
    ]
    assert fake.paused, "to resume is another decision"
    assert mode == how.value.lower()
    assert [state.status().applied.version.version for state in fake.states] == [4, 4]


CLEAN = [
    ("/pause", 500),
    ("/pause", "hang"),
    ("/start_weight_update", 500),
    ("/start_weight_update", "hang"),
    ("/update_weights", 500),
    ("/update_weights", "hang"),
    ("/finish_weight_update", [500]),
    ("/finish_weight_update", "hang"),
]


@pytest.mark.parametrize(("route", "does"), CLEAN)
async def test_what_fails_before_anything_was_touched_is_clean_and_leaves_nothing_behind(
    fake, engine, route, does
):
    fake.script[route] = does
    with pytest.raises(ApplyError) as failed:
        await apply(engine, seconds=1.0)
    assert failed.value.clean
    assert route in str(failed.value)
    assert all(state.status().attached is None for state in fake.states)
    # A call that only comes now finds nothing to apply.
    fake.script.clear()
    if route == "/finish_weight_update":
        fake._do("/finish_weight_update", {})
    assert all(state.status().applied is None for state in fake.states)
    # And the next attempt is not in its way.
    fake.active = False
    await apply(engine)


async def test_a_pause_that_answers_with_an_error_and_has_paused_is_a_pause(fake, engine):
    fake.script["/pause"] = 599
    await apply(engine)


async def test_a_session_left_open_is_ended_first(fake, engine):
    fake.active = True
    await apply(engine)
    assert fake.calls.count("/start_weight_update") == 2


async def test_an_answer_that_is_another_calls_does_not_hide_a_success(fake, engine):
    """vLLM's replies with several ranks are shifted by one after an error: the ranks themselves know better."""
    fake.script["/finish_weight_update"] = 599
    await apply(engine)


async def test_a_rank_that_fails_in_the_middle_is_not_clean(fake, engine):
    fake.dies_in_load = {1}
    with pytest.raises(ApplyError, match=r"rank 1: failed when parameters.*the device is gone") as failed:
        await apply(engine)
    assert not failed.value.clean


async def test_a_rank_that_no_longer_answers_is_not_clean(fake, engine, monkeypatch):
    do = fake._do

    def die_at_finish(path, body):
        answer = do(path, body)
        if path == "/finish_weight_update":
            fake.close_sockets()
        return answer

    fake._do = die_at_finish
    with pytest.raises(ApplyError) as failed:
        await apply(engine)
    assert not failed.value.clean


async def test_an_apply_that_is_still_going_on_is_not_clean(fake, engine):
    """No answer in time, and the image can't be dropped: it is being applied at this moment."""
    do = fake._do

    def begin_only(path, body):
        if path == "/finish_weight_update":
            for session in fake.sessions:
                session.begin()
            return web.json_response({"error": {"message": "lost"}}, status=500)
        return do(path, body)

    fake._do = begin_only
    with pytest.raises(ApplyError) as failed:
        await apply(engine)
    assert not failed.value.clean


async def test_memory_that_one_rank_refuses_is_dropped_by_all(fake, engine):
    with staged(WEIGHTS, 4) as image:
        await engine.preflight(image.manifest)
        other = manifest_of({"a": WEIGHTS["model.norm.weight"]})
        fake.states[1].keep_manifest(other.layout, other.encode().decode())
        with pytest.raises(ApplyError, match="rank 1: the kept manifest is") as failed:
            await engine.apply(image, InFlight.KEEP, 5)
    assert failed.value.clean
    assert fake.states[0].status().attached is None
    assert "/pause" not in fake.calls, "nobody waits for what can't come"


# ------------------------------------------------------------------------------------------------ resume, restart


async def test_resume(fake, engine):
    fake.paused = True
    await engine.resume()
    assert not fake.paused
    fake.script["/resume"] = 599
    fake.paused = True
    await engine.resume()
    fake.script["/resume"] = 500
    fake.paused = True
    with pytest.raises(EngineUnreachableError):
        await engine.resume()


async def test_restart_over_http(fake, engine):
    await engine.restart("test")
    assert fake.ended.is_set()


async def test_restart_over_a_socket_when_http_hangs(fake, engine):
    fake.script["/weightsync/v1/restart"] = "hang"
    fake.script["/weightsync/v1/status"] = "hang"
    await engine.restart("test")
    assert fake.ended.is_set()


async def test_restart_of_an_engine_that_does_not_end_is_no_restart(fake, engine, monkeypatch):
    monkeypatch.setattr(http_module, "RESTART_SECONDS", 0.5)
    monkeypatch.setattr(fake, "_end", lambda: None)
    for server in fake._servers:
        monkeypatch.setattr(server, "_end", lambda: None)
    with pytest.raises(EngineUnreachableError, match="boot-1 still answers: restart the container"):
        await engine.restart("test")


async def test_an_engine_that_was_stopped_is_not_taken_for_ended(fake, engine, monkeypatch):
    monkeypatch.setattr(http_module, "RESTART_SECONDS", 0.5)
    fake.close_sockets()
    fake.script["/weightsync/v1/restart"] = fake.script["/weightsync/v1/status"] = "hang"
    with pytest.raises(EngineUnreachableError, match="it listens and does not answer"):
        await engine.restart("test")


async def test_restart_of_nobody_is_done(tmp_path):
    async with HttpEngine("http://127.0.0.1:9", tmp_path) as engine:
        await engine.restart("test")
