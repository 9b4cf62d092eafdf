"""One suite for every engine: what an agent is promised, on the reference engine and on real vLLM.

A server is started once for all tests with the same engine; each test begins with version 1 served.
"""

import asyncio
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from engine_server import PROMPT, EngineServer, Stream, need_vllm
from staged_images import flat_image, manifest_of, memory, staged

from weightsync_contract.messages import Capability, InFlight
from weightsync_engine.adapter import ApplyError, EngineUnreachableError, HttpEngine, ManifestRefusedError
from weightsync_engine.permit import Mode
from weightsync_engine.reference.model_files import TINY, random_weights, write_checkpoint
from weightsync_engine.worker.client import WorkerRefusedError
from weightsync_engine.worker.protocol import Image

KINDS = [
    pytest.param(("reference", 1), id="reference"),
    pytest.param(("reference", 2), id="reference-tp2"),
    pytest.param(("vllm", 1), id="vllm", marks=pytest.mark.vllm),
    pytest.param(("vllm", 2), id="vllm-tp2", marks=pytest.mark.vllm),
]
SECONDS = 60.0
# Two servers may start in one test.
pytestmark = pytest.mark.timeout(600)
SHAPE = replace(TINY, layers=8)
"""Small, and slow enough a token that a commit falls into the middle of a request."""

LONG = 440
WEIGHTS = {version: random_weights(SHAPE, seed) for version, seed in ((1, 11), (2, 12))}


@dataclass(frozen=True)
class Served:
    """What a server that was started from a version's weights answers."""

    tokens: list[int]
    logprobs: list[float]


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> "Expected":
    return Expected(tmp_path_factory)


class Expected:
    """Starts a server from a version's own checkpoint, once for each kind and version, and keeps its answer."""

    def __init__(self, factory: pytest.TempPathFactory) -> None:
        self._factory = factory
        self._known: dict[tuple[str, int], Served] = {}

    def __call__(self, kind: str, version: int) -> Served:
        if version == 1:
            # Both engines answer alike, which is held for version 2: one start of vLLM less.
            kind = "reference"
        if (kind, version) not in self._known:
            home = self._factory.mktemp(f"{kind}-{version}")
            write_checkpoint(home / "model", SHAPE, 0, WEIGHTS[version])
            server = EngineServer(kind, home / "model", home)
            try:
                server.start()
                server.permit(Mode.SERVE)
                answer = server.complete()
                assert answer.status == 200, answer
                self._known[kind, version] = Served(answer.tokens, answer.logprobs)
            finally:
                server.stop()
        return self._known[kind, version]


@pytest.fixture(scope="module", params=KINDS)
def running(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[EngineServer]:
    kind, ranks = request.param
    if kind == "vllm":
        need_vllm()
    home = tmp_path_factory.mktemp(f"{kind}-{ranks}")
    write_checkpoint(home / "model", SHAPE, seed=7)
    server = EngineServer(kind, home / "model", home, ranks)
    try:
        server.start()
        yield server
    finally:
        server.stop()


@pytest.fixture
async def engine(running: EngineServer):
    """The adapter, on an engine that serves version 1."""
    async with HttpEngine(running.url, running.directory) as engine:
        if not running.process.alive:
            running.permit(None)
            running.start()
        await commit(running, engine, 1)
        yield engine


async def commit(
    server: EngineServer, engine: HttpEngine, version: int, how: InFlight = InFlight.KEEP
) -> None:
    """What an agent does for a commit."""
    with staged(WEIGHTS[version], version) as image:
        await engine.preflight(image.manifest)
        server.permit(Mode.HOLD, version)
        await engine.apply(image, how, SECONDS)
    server.permit(Mode.SERVE, version)
    await engine.resume()


def answers_as(server: EngineServer, served: Served) -> None:
    answer = server.complete()
    assert answer.status == 200, answer.body
    assert answer.tokens == served.tokens
    assert max(abs(a - b) for a, b in zip(answer.logprobs, served.logprobs, strict=True)) < 1e-4


async def test_probe_says_boot_ranks_and_what_it_can(running, engine):
    info = await engine.probe()
    assert info.boot == running.boot == running.worker(running.ranks - 1).hello().boot
    assert info.world_size == running.ranks
    assert set(info.capabilities) == set(Capability)
    status = running.control("GET", "/weightsync/v1/status").body
    assert (status["boot"], status["permit"]) == (info.boot, {"mode": "Serve", "run": "run-a", "version": 1})


async def test_a_commit_answers_as_a_server_that_was_started_from_those_weights(running, engine, expected):
    one, two = expected(running.kind, 1), expected(running.kind, 2)
    assert one.tokens != two.tokens
    answers_as(running, one)
    await commit(running, engine, 2)
    answers_as(running, two)
    await commit(running, engine, 1)
    answers_as(running, one)
    assert running.control("GET", "/weight_info").body == {"weight_version": "run-a/1"}


@pytest.mark.vllm
async def test_both_engines_answer_alike(expected):
    need_vllm()
    ours, vllms = expected("reference", 2), expected("vllm", 2)
    assert ours.tokens == vllms.tokens
    assert max(abs(a - b) for a, b in zip(ours.logprobs, vllms.logprobs, strict=True)) < 1e-4


async def test_the_same_version_can_be_applied_again(running, engine, expected):
    await commit(running, engine, 2)
    await commit(running, engine, 2)
    answers_as(running, expected(running.kind, 2))


async def test_answers_say_which_version_they_are_from(running, engine):
    headers = running.complete(1).headers
    assert headers["x-weightsync-version"] == headers["x-weightsync-admitted"] == "1"
    assert headers["x-weightsync-run"] == "run-a"


# ------------------------------------------------------------------------------------------------------ refusals


def without_half(weights):
    return dict(list(weights.items())[::2])


def renamed(weights):
    changed = dict(weights)
    changed["model.layers.0.mlp.wrong_proj.weight"] = changed.pop("model.layers.0.mlp.up_proj.weight")
    return changed


def twice_as_wide(weights):
    name = "model.layers.1.self_attn.o_proj.weight"
    return {**weights, name: torch.cat((weights[name], weights[name]), dim=1)}


def transposed(weights):
    return {**weights, "lm_head.weight": weights["lm_head.weight"].T.contiguous()}


def halves(weights):
    return {**weights, "model.norm.weight": weights["model.norm.weight"].to(torch.float16)}


def one_more(weights):
    return {**weights, "model.layers.8.mlp.up_proj.weight": weights["model.layers.1.mlp.up_proj.weight"]}


BAD = [
    (without_half, ["model.layers.0.self_attn.q_proj.weight", "the manifest does not have it"]),
    (
        renamed,
        ["model.layers.0.mlp.wrong_proj.weight: the model has no such tensor", "model.layers.0.mlp.up_proj"],
    ),
    (
        twice_as_wide,
        ["model.layers.1.self_attn.o_proj.weight: has shape [64, 256], the model wants [64, 128]"],
    ),
    (transposed, ["lm_head.weight: has shape [64, 320], the model wants [320, 64]"]),
    (
        halves,
        ["model.norm.weight: has dtype float16, the model keeps it as float32", "publish it as float32"],
    ),
    (one_more, ["model.layers.8.mlp.up_proj.weight: the model has no such tensor"]),
]


@pytest.mark.parametrize(("change", "words"), BAD, ids=[change.__name__ for change, _ in BAD])
async def test_a_manifest_that_does_not_fit_is_refused_before_a_byte_moves(
    running, engine, expected, change, words
):
    with pytest.raises(ManifestRefusedError) as refused:
        await engine.preflight(manifest_of(change(WEIGHTS[2])))
    for word in words:
        assert word in str(refused.value)
    answers_as(running, expected(running.kind, 1))


async def test_a_refused_manifest_is_not_applied_whoever_asks(running, engine, expected):
    with staged(halves(WEIGHTS[2]), 2) as image:
        with pytest.raises(ManifestRefusedError):
            await engine.preflight(image.manifest)
        with pytest.raises(ApplyError, match="the manifest was refused") as failed:
            await engine.apply(image, InFlight.KEEP, SECONDS)
    assert failed.value.clean
    await engine.resume()
    answers_as(running, expected(running.kind, 1))


async def test_every_problem_is_named_at_once(engine):
    with pytest.raises(ManifestRefusedError, match="can't take 3 tensors"):
        await engine.preflight(manifest_of(halves(transposed(twice_as_wide(WEIGHTS[2])))))


async def test_preflight_leaves_the_model_as_it_is_and_can_be_repeated(running, engine, expected):
    for _ in range(3):
        await engine.preflight(manifest_of(WEIGHTS[2]))
        with pytest.raises(ManifestRefusedError):
            await engine.preflight(manifest_of(renamed(WEIGHTS[2])))
    answers_as(running, expected(running.kind, 1))
    await commit(running, engine, 2)
    answers_as(running, expected(running.kind, 2))


# ------------------------------------------------------------------------------------------- updates that fail


async def paused(running: EngineServer, engine: HttpEngine) -> None:
    assert running.control("POST", "/pause?mode=keep").status == 200


def update_info(image: Image) -> dict[str, object]:
    version = image.version
    return {"run": version.run, "version": version.version, "layout": image.layout, "digest": image.digest}


async def test_unless_every_rank_has_the_image_nothing_is_applied_anywhere(running, engine, expected):
    """The last rank has none: over vLLM's routes alone the first one would be on other weights now."""
    with staged(WEIGHTS[2], 2) as given:
        await engine.preflight(given.manifest)
        image = Image(given.version, given.layout, given.digest)
        for rank in range(running.ranks - 1):
            running.worker(rank).attach(image, given.nbytes, given.fd)
        await paused(running, engine)
        for route, body in (
            ("/start_weight_update", None),
            ("/update_weights", {"update_info": update_info(image)}),
            ("/finish_weight_update", None),
        ):
            assert running.control("POST", route, body).status == 200
    statuses = [running.worker(rank).status() for rank in range(running.ranks)]
    assert [s.clean for s in statuses] == [True] * running.ranks
    assert {s.applied.version.version for s in statuses if s.applied} == {1}
    assert "no image is attached" in statuses[-1].error
    for status in statuses[:-1]:
        assert status.error == "another rank refused the update"
    await engine.resume()
    answers_as(running, expected(running.kind, 1))


async def test_another_digest_than_the_attached_one_is_not_applied(running, engine, expected):
    with staged(WEIGHTS[2], 2) as given:
        await engine.preflight(given.manifest)
        image = Image(given.version, given.layout, given.digest)
        for rank in range(running.ranks):
            running.worker(rank).attach(image, given.nbytes, given.fd)
        await paused(running, engine)
        running.control("POST", "/start_weight_update")
        info = {**update_info(image), "digest": "xxh3-128:another"}
        running.control("POST", "/update_weights", {"update_info": info})
        running.control("POST", "/finish_weight_update")
    assert "attached is run-a/2" in running.worker(0).status().error
    await engine.resume()
    answers_as(running, expected(running.kind, 1))


async def test_a_session_that_was_left_open_does_not_stop_the_next_update(running, engine, expected):
    assert running.control("POST", "/start_weight_update").status == 200
    if running.kind == "vllm" and running.ranks > 1:
        # An error of several ranks shifts vLLM's later answers: there the agent restarts the engine instead.
        assert running.control("POST", "/finish_weight_update").status == 200
    await commit(running, engine, 2)
    answers_as(running, expected(running.kind, 2))


async def test_no_time_left_is_a_clean_failure(running, engine, expected):
    with staged(WEIGHTS[2], 2) as image:
        await engine.preflight(image.manifest)
        with pytest.raises(ApplyError) as failed:
            await engine.apply(image, InFlight.KEEP, 0.0)
    assert failed.value.clean
    assert running.worker(0).status().attached is None
    await engine.resume()
    answers_as(running, expected(running.kind, 1))


async def test_memory_that_could_still_change_is_refused(running, engine):
    manifest = manifest_of(WEIGHTS[2])
    await engine.preflight(manifest)
    fd = memory(flat_image(WEIGHTS[2]), seals=0)
    try:
        with staged(WEIGHTS[2], 2) as good:
            image = Image(good.version, good.layout, good.digest)
        with pytest.raises(WorkerRefusedError, match="not sealed"):
            running.worker(0).attach(image, manifest.nbytes, fd)
    finally:
        os.close(fd)


# --------------------------------------------------------------------------------------------- requests under way


async def test_a_stream_goes_on_across_a_commit_and_ends_in_the_new_weights(running, engine, expected):
    await engine.preflight(manifest_of(WEIGHTS[2]))
    stream = Stream(running, LONG)
    await asyncio.to_thread(stream.wait_for, 20)
    await commit(running, engine, 2, InFlight.KEEP)
    await asyncio.to_thread(stream.join)
    assert (stream.error, stream.finish, len(stream.got)) == ("", "length", LONG)
    assert stream.headers["x-weightsync-version"] == "1"
    ((before, mark),) = stream.marks
    assert mark == ": x-weightsync-version=2 x-weightsync-run=run-a"
    assert 20 <= before < LONG
    assert stream.got[:12] == expected(running.kind, 1).tokens
    # What follows is what the new weights make of all that was said before: nothing of the old ones is left.
    said = list(stream.got)
    again = running.complete(5, prompt=(*PROMPT, *said[:-5]))
    assert again.tokens == said[-5:]


async def test_wait_lets_requests_end_on_the_old_weights_first(running, engine, expected):
    await engine.preflight(manifest_of(WEIGHTS[2]))
    stream = Stream(running, LONG)
    await asyncio.to_thread(stream.wait_for, 5)
    await commit(running, engine, 2, InFlight.WAIT)
    await asyncio.to_thread(stream.join)
    await commit(running, engine, 1)
    assert stream.got == running.complete(LONG).tokens


async def test_abort_ends_requests_at_once(running, engine):
    await engine.preflight(manifest_of(WEIGHTS[2]))
    stream = Stream(running, LONG)
    await asyncio.to_thread(stream.wait_for, 5)
    await commit(running, engine, 2, InFlight.ABORT)
    await asyncio.to_thread(stream.join)
    assert stream.finish == "abort"
    assert len(stream.got) < LONG


async def test_a_request_that_comes_in_mid_commit_waits_and_is_answered_by_the_new_version(
    running, engine, expected
):
    two = expected(running.kind, 2)
    running.permit(Mode.HOLD, 1)
    answers = []
    asking = threading.Thread(target=lambda: answers.append(running.complete()), daemon=True)
    asking.start()
    await commit(running, engine, 2)
    await asyncio.to_thread(asking.join, 60)
    (answer,) = answers
    assert (answer.status, answer.tokens) == (200, two.tokens)
    assert answer.headers["x-weightsync-admitted"] == "2"


async def test_a_pause_that_somebody_left_behind_ends_with_the_next_commit(running, engine, expected):
    """A caller that gave up waiting does not undo its pause."""
    await paused(running, engine)
    await commit(running, engine, 2)
    assert running.control("GET", "/is_paused").body == {"is_paused": False}
    answers_as(running, expected(running.kind, 2))


async def test_what_was_cached_of_a_prompt_does_not_outlive_a_commit(running, engine):
    """A prompt of several blocks, which a server keeps the attention of; salted, it is computed anew."""
    prompt = tuple(PROMPT[n % len(PROMPT)] + n % 7 for n in range(400))
    before = running.complete(prompt=prompt)
    await commit(running, engine, 2)
    after = running.complete(prompt=prompt)
    anew = running.complete(prompt=prompt, cache_salt="another")
    assert after.tokens == anew.tokens
    assert max(abs(a - b) for a, b in zip(after.logprobs, anew.logprobs, strict=True)) < 1e-4
    assert before.logprobs != after.logprobs


async def test_a_request_between_start_and_finish_meets_the_old_weights(running, engine, expected):
    assert running.control("POST", "/start_weight_update").status == 200
    answers_as(running, expected(running.kind, 1))
    assert running.control("POST", "/finish_weight_update").status == 200
    answers_as(running, expected(running.kind, 1))


async def test_without_a_permit_nobody_is_answered_and_with_it_again(running, engine):
    running.permit(None)
    refused = running.complete()
    assert refused.status == 503
    assert "no permit" in refused.body["error"]["message"]
    running.permit(Mode.SERVE, 1, boot="another-boot")
    assert running.complete().status == 503
    running.permit(Mode.SERVE, 1)
    assert running.complete().status == 200


GUARDED = [
    ("POST", "/pause"),
    ("POST", "/resume"),
    ("POST", "/start_weight_update"),
    ("POST", "/update_weights"),
    ("POST", "/finish_weight_update"),
    ("POST", "/init_weight_transfer_engine"),
    ("POST", "/collective_rpc"),
    ("POST", "/v1/load_lora_adapter"),
    ("GET", "/get_world_size"),
    ("GET", "/is_paused"),
    ("GET", "/docs"),
    ("GET", "/openapi.json"),
    ("GET", "/weightsync/v1/status"),
    ("POST", "/weightsync/v1/restart"),
    ("POST", "//pause"),
    ("POST", "/pause/"),
    ("POST", "/%70ause"),
    ("POST", "/health/../pause"),
    ("POST", "/v1/../pause"),
    ("POST", "/PAUSE"),
    ("HEAD", "/get_world_size"),
    ("OPTIONS", "/pause"),
    ("POST", "/v1/completions/../../pause"),
]


@pytest.mark.parametrize(("method", "path"), GUARDED)
def test_control_routes_are_the_agents(running, method, path):
    assert running.request(method, path, {} if method == "POST" else None).status == 401


def test_what_tells_of_its_health_is_open(running):
    for path in ("/health", "/metrics", "/ping", "/version"):
        assert running.request("GET", path).status == 200


@pytest.mark.parametrize("path", ["/v1/models", "/v1/completions", "/tokenize", "/detokenize"])
def test_inference_needs_a_permit(running, path):
    running.permit(None)
    assert running.request("GET" if path == "/v1/models" else "POST", path, {}).status == 503


# --------------------------------------------------------------------------------------------------- ends, last


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


async def test_an_engine_that_is_killed_comes_back_without_a_permit_and_can_be_committed_to(
    running, engine, expected
):
    before = running.boot
    running.process.kill()
    with pytest.raises(EngineUnreachableError):
        await engine.probe()
    with staged(WEIGHTS[2], 2) as image, pytest.raises(ApplyError) as failed:
        await engine.apply(image, InFlight.KEEP, 5)
    assert failed.value.clean, "nobody was there to apply anything"
    running.start()
    assert running.boot != before
    assert running.complete().status == 503, "the permit is for the boot before"
    assert (await engine.probe()).boot == running.boot
    await commit(running, engine, 2)
    answers_as(running, expected(running.kind, 2))


async def test_an_engine_whose_core_dies_answers_nobody_and_is_healed(running, engine, expected):
    """vLLM's first process may end with 0 then, or go on listening; none of it may be answered from."""
    if running.kind == "reference" or running.ranks > 1:
        pytest.skip("the core is a process of its own in vLLM, and the rank's with one rank only")
    await engine.probe()
    os.kill(running.worker(running.ranks - 1).hello().pid, signal.SIGKILL)
    with pytest.raises(EngineUnreachableError):
        await engine.probe()
    await engine.restart("test")
    assert running.ended()
    running.start()
    assert running.complete().status == 503, "the permit is for the boot before"
    await commit(running, engine, 2)
    answers_as(running, expected(running.kind, 2))


async def test_an_engine_that_hangs_in_mid_commit_is_not_clean_and_can_be_ended(running, engine, monkeypatch):
    pids = [running.worker(rank).hello().pid for rank in range(running.ranks)]
    attach = engine._attach

    async def attach_and_stop(*arguments):
        await attach(*arguments)
        os.kill(pids[-1], signal.SIGSTOP)

    monkeypatch.setattr(engine, "_attach", attach_and_stop)
    with staged(WEIGHTS[2], 2) as image:
        await engine.preflight(image.manifest)
        with pytest.raises(ApplyError) as failed:
            await engine.apply(image, InFlight.KEEP, 3)
    assert not failed.value.clean, "nobody knows what it does when it goes on"
    with pytest.raises(EngineUnreachableError):
        await engine.probe()
    if running.kind == "reference":
        # All of it stands still, so nobody takes the order; where ranks are processes the others do.
        with pytest.raises(EngineUnreachableError, match="it listens and does not answer"):
            await engine.restart("test")
        os.kill(pids[-1], signal.SIGCONT)
    await engine.restart("test")
    assert running.ended()
    assert [pid for pid in pids if alive(pid)] == []
