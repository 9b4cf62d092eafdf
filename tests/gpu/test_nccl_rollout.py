"""Real agents, real NCCL and a real engine on one GPU, with the two ways of staging; only the operator is scripted."""

import pytest
from agent_fleet import SECONDS, run_pair
from engine_server import EngineServer, tokens_of

from weightsync_contract.messages import Phase, Staging, TransferState, Transport
from weightsync_contract.reasons import FailureCode
from weightsync_engine.reference.model_files import TINY, random_weights, write_checkpoint
from weightsync_engine.worker.arena import VARIABLE

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(240)]

WEIGHTS = {version: random_weights(TINY, 20 + version) for version in (1, 2)}
CUDA = ("--device", "cuda")


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """Tokens of a server that was started from a version's own checkpoint."""
    found = {}
    for version, weights in WEIGHTS.items():
        home = tmp_path_factory.mktemp(f"expected-{version}")
        write_checkpoint(home / "model", TINY, 0, weights)
        found[version] = tokens_of(home / "model", home, *CUDA)
    assert found[1] != found[2]
    return found


@pytest.fixture
def arena():
    return "64MiB"


@pytest.fixture
async def engine(tmp_path, monkeypatch, arena):
    monkeypatch.setenv(VARIABLE, arena)
    write_checkpoint(tmp_path / "model", TINY, seed=7)
    server = EngineServer("reference", tmp_path / "model", tmp_path / "engine", 1, *CUDA)
    server.start()
    yield server
    server.stop()


@pytest.fixture(params=list(Staging))
def staging(request):
    return request.param


@pytest.fixture
def rate():
    return "20MiB"


@pytest.fixture
async def fleet(tmp_path, engine, staging, rate):
    transport = Transport(backend="NCCL", staging=staging)
    async with run_pair(tmp_path, engine, "--limit-rate", rate, transport=transport) as fleet:
        yield fleet


async def test_two_versions_are_brought_and_served(fleet, engine, expected):
    await fleet.group()
    for version in (1, 2):
        published = await fleet.publish(version, tensors=WEIGHTS[version])
        await fleet.bring(published)
        assert engine.complete().tokens == expected[version]


@pytest.mark.parametrize("staging", [Staging.DEVICE])
@pytest.mark.parametrize("rate", ["30KiB"])
async def test_an_engine_that_restarts_while_its_memory_is_received_into_fails_that_transfer_alone(
    fleet, engine, expected
):
    await fleet.group()
    first = await fleet.publish(1, tensors=WEIGHTS[1])
    await fleet.bring(first)
    second = await fleet.publish(2, tensors=WEIGHTS[2])
    await fleet.check(second, ["trainer", "member"])
    await fleet.phase(second, Phase.TRANSFER, ["trainer", "member"])
    await fleet.operator.until(
        "member",
        lambda told: told.transfer.state is TransferState.RECEIVING and told.transfer.bytes,
        "receiving",
        SECONDS,
    )
    engine.process.stop(0)
    engine.start()
    told = await fleet.operator.until("member", lambda told: told.transfer.failure, "failing", SECONDS)
    assert told.transfer.failure.code is FailureCode.STAGING_FAILED
    assert "the engine restarted" in told.transfer.failure.message
    await fleet.group()
    await fleet.bring(second)
    assert engine.complete().tokens == expected[2]


@pytest.mark.parametrize("staging", [Staging.DEVICE])
@pytest.mark.parametrize(
    ("arena", "message"), [("", "WEIGHTSYNC_ARENA=auto"), ("1024", "arena has 1024 bytes")]
)
async def test_an_engine_without_room_says_so_before_a_byte_moves(fleet, engine, arena, message):
    await fleet.group()
    published = await fleet.publish(1, tensors=WEIGHTS[1])
    await fleet.phase(published, Phase.CHECK, ["trainer", "member"])
    told = await fleet.operator.until("member", lambda told: told.transfer.failure, "refusing", SECONDS)
    assert told.transfer.failure.code is FailureCode.STAGING_FAILED
    assert message in told.transfer.failure.message
    assert told.transfer.bytes == 0
