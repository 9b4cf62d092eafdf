"""The guard in front of an application that records what reaches it."""

import asyncio
import json
import os
import time
from dataclasses import dataclass, field
from typing import Any

import pytest

from weightsync_contract.messages import VersionId
from weightsync_engine.boot import BootError, boot_id
from weightsync_engine.guard import Guard, middleware
from weightsync_engine.permit import Mode, Permit, write_permit
from weightsync_engine.worker.client import WorkerClient

TOKEN = "the-agents-token-0123456789"
V1, V2 = VersionId("run-a", 1), VersionId("run b/ü", 2)


@dataclass
class Application:
    """Answers 200 when allowed to; a test may hold it back."""

    seen: list[str] = field(default_factory=list)
    go: asyncio.Event = field(default_factory=asyncio.Event)

    async def __call__(self, scope, receive, send) -> None:
        self.seen.append(scope.get("path", scope["type"]))
        if scope["type"] == "http":
            await self.go.wait()
            await send({"type": "http.response.start", "status": 200, "headers": [(b"x-own", b"1")]})
            await send({"type": "http.response.body", "body": b"ok"})
        elif scope["type"] == "websocket":
            await send({"type": "websocket.accept"})


@dataclass
class Response:
    messages: list[Any]

    @property
    def status(self) -> int:
        return self.messages[0]["status"]

    @property
    def headers(self) -> dict[str, str]:
        return {name.decode(): value.decode() for name, value in self.messages[0]["headers"]}

    @property
    def message(self) -> str:
        return json.loads(self.messages[1]["body"])["error"]["message"]


class World:
    def __init__(self, directory, monkeypatch, hold="0.2") -> None:
        monkeypatch.setenv("WEIGHTSYNC_HOLD_SECONDS", hold)
        self.directory = directory
        self.app = Application()
        self.app.go.set()
        self.ended: list[float] = []
        (directory / "control-token").write_text(TOKEN + "\n")
        self.guard = Guard(self.app, directory=directory, end=lambda: self.ended.append(time.monotonic()))

    def permit(self, mode, version=V1, boot=None) -> None:
        permit = Permit(boot or boot_id(), mode, version) if mode else None
        write_permit(self.directory / "permit", permit)

    async def ask(self, path, method="POST", token=None, headers=(), kind="http", **scope) -> Response:
        sent: list[Any] = []

        async def send(message) -> None:
            sent.append(message)

        async def receive() -> Any:
            return {"type": "http.request"}

        fields = list(headers)
        if token is not None:
            fields.append((b"authorization", f"Bearer {token}".encode()))
        scope = {"type": kind, "path": path, "method": method, "headers": fields, **scope}
        await self.guard(scope, receive, send)
        return Response(sent)


@pytest.fixture
def make_world(tmp_path, monkeypatch):
    made = []

    def make(hold="0.2"):
        made.append(World(tmp_path, monkeypatch, hold))
        return made[-1]

    yield make
    for world in made:
        world.guard.close()


@pytest.fixture
def world(make_world):
    return make_world()


async def test_what_is_open_needs_nothing(world):
    assert (await world.ask("/health", "GET")).status == 200


async def test_lifespan_passes(world):
    await world.ask("", kind="lifespan")
    assert world.app.seen == [""]


async def test_inference_needs_a_permit_for_this_boot(world):
    refused = await world.ask("/v1/completions")
    assert (refused.status, refused.headers["retry-after"]) == (503, "5")
    assert f"no permit for its boot {boot_id()}" in refused.message
    world.permit(Mode.SERVE, boot="another")
    assert (await world.ask("/v1/completions")).status == 503
    assert world.app.seen == []
    world.permit(Mode.SERVE)
    assert (await world.ask("/v1/completions")).status == 200
    world.permit(None)
    assert (await world.ask("/v1/completions")).status == 503


async def test_a_malformed_permit_is_none(world):
    world.permit(Mode.SERVE)
    assert (await world.ask("/v1/completions")).status == 200
    (world.directory / "permit").write_text("{")
    assert (await world.ask("/v1/completions")).status == 503


async def test_the_token_is_no_permit(world):
    assert (await world.ask("/v1/completions", token=TOKEN)).status == 503


async def test_answers_say_their_version(world):
    world.permit(Mode.SERVE, V2)
    headers = (await world.ask("/v1/completions")).headers
    assert headers["x-weightsync-version"] == headers["x-weightsync-admitted"] == "2"
    assert headers["x-weightsync-run"] == "run%20b%2F%C3%BC"
    assert headers["x-own"] == "1"


async def test_initial_weights_have_no_version(world):
    world.permit(Mode.SERVE, None)
    response = await world.ask("/v1/completions")
    assert response.status == 200
    assert not [name for name in response.headers if name.startswith("x-weightsync")]


async def test_an_answer_across_a_commit_says_both_versions(world):
    world.permit(Mode.SERVE, V1)
    world.app.go.clear()
    asking = asyncio.create_task(world.ask("/v1/completions"))
    await asyncio.sleep(0)
    assert world.app.seen == ["/v1/completions"]
    world.permit(Mode.SERVE, VersionId("run-a", 2))
    world.app.go.set()
    headers = (await asking).headers
    assert (headers["x-weightsync-admitted"], headers["x-weightsync-version"]) == ("1", "2")


async def test_a_held_request_goes_on_when_serving_does(make_world):
    world = make_world(hold="20")
    world.permit(Mode.HOLD, V1)
    asking = [asyncio.create_task(world.ask("/v1/completions")) for _ in range(20)]
    await asyncio.sleep(0.1)
    assert world.app.seen == []
    world.permit(Mode.SERVE, V2)
    answers = await asyncio.gather(*asking)
    assert [answer.status for answer in answers] == [200] * 20
    assert {answer.headers["x-weightsync-admitted"] for answer in answers} == {"2"}


async def test_a_held_request_is_refused_when_the_permit_goes(make_world):
    world = make_world(hold="20")
    world.permit(Mode.HOLD)
    asking = asyncio.create_task(world.ask("/v1/completions"))
    await asyncio.sleep(0.05)
    world.permit(None)
    answer = await asking
    assert (answer.status, world.app.seen) == (503, [])
    assert "no permit" in answer.message


async def test_a_held_request_waits_no_longer_than_it_may(world):
    world.permit(Mode.HOLD)
    began = time.monotonic()
    answer = await world.ask("/v1/completions")
    assert (answer.status, world.app.seen) == (503, [])
    assert "for longer than 0.2 s" in answer.message
    assert 0.2 <= time.monotonic() - began < 2


async def test_those_who_wait_share_their_looks_at_the_file(make_world, monkeypatch):
    world = make_world(hold="20")
    world.permit(Mode.HOLD)
    looks = 0
    read = world.guard._permit._file.read

    def counted():
        nonlocal looks
        looks += 1
        return read()

    monkeypatch.setattr(world.guard._permit._file, "read", counted)
    asking = [asyncio.create_task(world.ask("/v1/completions")) for _ in range(200)]
    await asyncio.sleep(0.3)
    world.permit(Mode.SERVE)
    await asyncio.gather(*asking)
    # One when each comes in, one at each answer's start, and a few in between for all of them.
    assert looks < 400 + 40


BAD_TOKENS = [
    [],
    [(b"authorization", b"")],
    [(b"authorization", TOKEN.encode())],
    [(b"authorization", f"Basic {TOKEN}".encode())],
    [(b"authorization", f"Bearer {TOKEN}x".encode())],
    [(b"authorization", f"Bearer {TOKEN[:-1]}".encode())],
    [(b"authorization", b"Bearer ")],
    [(b"authorization", b"Bearer \xff\xfe")],
    [(b"authorization", f"Bearer {TOKEN}".encode()), (b"authorization", b"Bearer other")],
]


@pytest.mark.parametrize("headers", BAD_TOKENS)
async def test_control_routes_need_the_token(world, headers):
    refused = await world.ask("/pause", headers=headers)
    assert (refused.status, world.app.seen) == (401, [])
    assert "'/pause' is for the pod's weightsync agent only" in refused.message


async def test_with_the_token_they_pass(world):
    assert (await world.ask("/pause", token=TOKEN)).status == 200
    assert (await world.ask("/pause", headers=[(b"Authorization", f"bearer {TOKEN}".encode())])).status == 200


@pytest.mark.parametrize("content", [None, "", "\n", "short"])
async def test_without_a_token_nobody_has_it(world, content):
    path = world.directory / "control-token"
    path.unlink()
    if content is not None:
        path.write_text(content)
    for token in ("", "short", TOKEN):
        assert (await world.ask("/pause", token=token)).status == 401


async def test_a_new_token_counts_at_once(world):
    fresh = world.directory / "fresh"
    fresh.write_text("b" * 32)
    fresh.replace(world.directory / "control-token")
    assert (await world.ask("/pause", token=TOKEN)).status == 401
    assert (await world.ask("/pause", token="b" * 32)).status == 200


async def test_every_websocket_needs_the_token(world):
    world.permit(Mode.SERVE)
    closed = await world.ask("/v1/realtime", kind="websocket")
    assert closed.messages[0]["type"] == "websocket.close"
    assert closed.messages[0]["code"] == 1008
    opened = await world.ask("/v1/realtime", kind="websocket", token=TOKEN)
    assert opened.messages[0]["type"] == "websocket.accept"


async def test_a_connection_that_it_does_not_know_is_not_let_through(world):
    with pytest.raises(RuntimeError, match="can't judge"):
        await world.ask("/health", kind="quic")
    assert world.app.seen == []


async def test_a_prefix_of_the_proxy_changes_nothing(world):
    assert (await world.ask("/api/pause", root_path="/api")).status == 401
    assert (await world.ask("/api/v1/completions", root_path="/api")).status == 503
    assert (await world.ask("/api/health", root_path="/api")).status == 200


async def test_status_and_unknown_routes_of_its_own(world):
    world.permit(Mode.HOLD, V2)
    response = await world.ask("/weightsync/v1/status", "GET", token=TOKEN)
    body = json.loads(response.messages[1]["body"])
    assert body["permit"] == {"mode": "Hold", "run": "run b/ü", "version": 2}
    assert (body["boot"], body["pid"], body["trouble"]) == (boot_id(), os.getpid(), "")
    assert (await world.ask("/weightsync/v1/status", "POST", token=TOKEN)).status == 404
    assert (await world.ask("/weightsync/v1/other", "GET", token=TOKEN)).status == 404
    assert (await world.ask("/weightsync/v1/restart", "GET", token=TOKEN)).status == 404
    assert (world.app.seen, world.ended) == ([], [])


async def test_restart_answers_and_ends(world):
    assert (await world.ask("/weightsync/v1/restart")).status == 401
    assert world.ended == []
    assert (await world.ask("/weightsync/v1/restart", token=TOKEN)).status == 200
    assert len(world.ended) == 1


async def test_it_can_be_ended_at_its_socket_too(world):
    socket = WorkerClient(world.directory / "workers" / f"api-{os.getpid()}.sock", 5)
    hello = socket.hello()
    assert (hello.boot, hello.rank) == (boot_id(), -1)
    socket.exit("test")
    until = time.monotonic() + 5
    while not world.ended:
        assert time.monotonic() < until
        await asyncio.sleep(0.01)


async def test_sockets_of_api_processes_that_ended_go(tmp_path, make_world):
    stale = tmp_path / "workers" / "api-999999999.sock"
    stale.parent.mkdir()
    stale.touch()
    make_world()
    assert not stale.exists()


async def test_without_a_boot_it_serves_nobody_and_says_why(tmp_path, make_world, monkeypatch):
    def none():
        raise BootError("the engine's first process is gone")

    monkeypatch.setattr(middleware, "boot_id", none)
    world = make_world()
    for boot in ("", "x"):
        document = {"boot": boot, "mode": "Serve", "run": "r", "version": 1}
        (tmp_path / "permit").write_text(json.dumps(document))
        refused = await world.ask("/v1/completions")
        assert (refused.status, world.app.seen) == (503, [])
        assert "the engine's first process is gone" in refused.message
    assert (await world.ask("/health")).status == 200


async def test_without_its_directory_it_refuses_and_does_not_fail(tmp_path, world, capsys):
    (tmp_path / "file").touch()
    guard = Guard(Application(), directory=tmp_path / "file" / "below")
    assert "no socket for the agent" in capsys.readouterr().err
    world.guard.close()
    world.guard = guard
    assert (await world.ask("/pause", token=TOKEN)).status == 401
    assert (await world.ask("/v1/completions")).status == 503


def test_it_needs_nothing_that_has_to_be_installed():
    import subprocess
    import sys

    code = (
        "import sys; before = set(sys.modules); import weightsync_engine.guard;"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before};"
        "print(*sorted(new - set(sys.stdlib_module_names)))"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["weightsync_contract", "weightsync_engine"]
