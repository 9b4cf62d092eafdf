"""A real vLLM on a GPU, brought to versions over NCCL, with the two ways of staging; only the operator is scripted."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from agent_fleet import run_pair
from engine_server import EngineServer, need_vllm

from weightsync_contract.messages import Staging, Transport
from weightsync_engine.permit import Mode
from weightsync_engine.reference.model_files import TINY, random_weights, write_checkpoint
from weightsync_engine.worker.arena import VARIABLE

pytestmark = [pytest.mark.gpu, pytest.mark.vllm, pytest.mark.timeout(540)]

WEIGHTS = {
    version: {name: each.to(torch.bfloat16) for name, each in random_weights(TINY, 20 + version).items()}
    for version in (1, 2)
}
# Three servers share the GPU. Triton's attention is the one that takes any head size here, and needs no other package.
ON_GPU = (
    *("--dtype", "bfloat16", "--gpu-memory-utilization", "0.2"),
    *("--attention-backend", "TRITON_ATTN"),
)


@pytest.fixture(scope="module", autouse=True)
def vllm():
    need_vllm()
    with pytest.MonkeyPatch.context() as patch:
        # FlashInfer compiles its sampler at the first start.
        patch.setenv("VLLM_USE_FLASHINFER_SAMPLER", "0")
        yield


@pytest.fixture(scope="module")
def expected(vllm, tmp_path_factory):
    """What servers answer that were started from a version's own checkpoint: tokens, log probabilities."""
    servers = {}
    for version, weights in WEIGHTS.items():
        home = tmp_path_factory.mktemp(f"expected-{version}")
        write_checkpoint(home / "model", TINY, 0, weights)
        servers[version] = EngineServer("vllm", home / "model", home, 1, *ON_GPU)
    # A server ends with the thread that has started it, so the pool is there until all are asked.
    with ThreadPoolExecutor() as pool:
        try:
            list(pool.map(EngineServer.start, servers.values()))
            for server in servers.values():
                server.permit(Mode.SERVE)
            answers = {version: server.complete() for version, server in servers.items()}
        finally:
            for server in servers.values():
                server.stop()
    assert answers[1].tokens != answers[2].tokens
    return {version: (each.tokens, each.logprobs) for version, each in answers.items()}


@pytest.fixture(params=list(Staging))
def staging(request):
    return request.param


@pytest.fixture
async def engine(tmp_path, monkeypatch, staging):
    if staging is Staging.DEVICE:
        monkeypatch.setenv(VARIABLE, "auto")
    write_checkpoint(tmp_path / "model", TINY, seed=7)
    server = EngineServer("vllm", tmp_path / "model", tmp_path / "engine", 1, *ON_GPU)
    try:
        server.start()
        yield server
    finally:
        server.stop()


@pytest.fixture
async def fleet(tmp_path, engine, staging):
    transport = Transport(backend="NCCL", staging=staging)
    async with run_pair(tmp_path, engine, transport=transport) as fleet:
        yield fleet


async def test_versions_are_brought_over_nccl_and_answered_as_by_a_fresh_vllm(fleet, engine, expected):
    await fleet.group()
    for version in (1, 2):
        await fleet.bring(await fleet.publish(version, tensors=WEIGHTS[version]))
        answer = engine.complete()
        tokens, logprobs = expected[version]
        assert answer.tokens == tokens
        assert answer.logprobs == pytest.approx(logprobs, abs=1e-2)
        assert answer.headers["x-weightsync-version"] == str(version)
    first, second = [
        line for line in engine.process.log.read_text().splitlines() if "loaded by vLLM in" in line
    ]
    assert "the first version of a layout" in first
    assert " copies, " in second
