"""Real agents, children, gloo and sockets; the operator is scripted and the engines are fakes (files)."""

import asyncio
import os
import signal

import pytest

from weightsync_contract.messages import Mode as WireMode
from weightsync_contract.messages import Phase, ServingState, TransferState, Transport
from weightsync_contract.reasons import FailureCode
from weightsync_engine.permit import Mode, Permit

if os.environ.get("CI") != "true":
    pytest.importorskip("numpy", reason="the trainer's tensors are numpy arrays here")
    pytest.importorskip("torch", reason="the transfer's children hold torch's gloo group")

from agent_fleet import SECONDS, alive, descendants, eventually, run_fleet


@pytest.fixture
async def fleet(tmp_path):
    async with run_fleet(tmp_path) as fleet:
        yield fleet


@pytest.fixture
async def slow_fleet(tmp_path):
    """The trainer sends 1 MiB a second, so that what is called mid-transfer is one."""
    async with run_fleet(tmp_path, "--limit-rate", "1MiB") as fleet:
        yield fleet


async def receiving(fleet, name, published):
    await fleet.operator.until(
        name,
        lambda told: (
            told.transfer.state is TransferState.RECEIVING and 0 < told.transfer.bytes < published.total_bytes
        ),
        "receiving",
        SECONDS,
    )


async def test_two_versions_over_one_group(fleet):
    first = await fleet.publish(1)
    await fleet.group()
    await fleet.bring(first)
    children = {name: fleet.operator.pod(name).told.transfer.nonce for name in fleet.agents}
    second = await fleet.publish(2)
    await fleet.bring(second)
    assert {name: fleet.operator.pod(name).told.transfer.nonce for name in fleet.agents} == children
    for name in fleet.members:
        calls = fleet.agents[name].engine.read().calls
        assert calls.count("preflight") == 1, "a layout that was checked is not checked again"
        assert calls.count("apply") == 2
    # Memory is given back once it is committed.
    assert fleet.operator.pod("member-1").told.transfer.state is TransferState.JOINED


async def test_a_tensor_at_a_time(fleet):
    for name in fleet.agents:
        await fleet.operator.want(name, transport=Transport(mode=WireMode.PER_TENSOR))
    published = await fleet.publish(1)
    await fleet.group()
    await fleet.bring(published)


async def test_a_refused_manifest_stops_nobody_else(fleet):
    published = await fleet.publish(1)
    fleet.agents["member-1"].engine.change(refuses="tensor 'model.norm.weight': shape [7], expected [8]")
    await fleet.group()
    await fleet.phase(published, Phase.CHECK, list(fleet.agents))
    told = await fleet.operator.until("member-1", lambda told: told.transfer.failure, "refusing", SECONDS)
    assert told.transfer.failure.code is FailureCode.MANIFEST_REFUSED
    assert "model.norm.weight" in told.transfer.failure.message
    await fleet.group(["member-2"])
    await fleet.operator.want("member-1", group=None, wanted=None)
    await fleet.bring(published, ["member-2"])


async def test_a_trainers_agent_that_is_killed_keeps_its_versions(fleet):
    published = await fleet.publish(1)
    await fleet.agents["trainer"].kill()
    fleet.operator.pod("trainer").reports.clear()
    await fleet.agents["trainer"].start()
    await fleet.operator.until("trainer", lambda told: told.source.versions == (published,), "back", SECONDS)
    await fleet.group()
    await fleet.bring(published)


async def test_an_agent_killed_in_a_transfer_costs_the_others_their_epoch_only(slow_fleet):
    fleet = slow_fleet
    published = await fleet.publish(1, 1 << 20)
    await fleet.group()
    await fleet.check(published, list(fleet.agents))
    await fleet.phase(published, Phase.TRANSFER, list(fleet.agents))
    await receiving(fleet, "member-1", published)
    await fleet.agents["member-1"].restart()
    for name in ("trainer", "member-2"):
        told = await fleet.operator.until(name, lambda told: told.transfer.failure, "told of it", 15)
        assert told.transfer.failure.epoch == 1
    told = await fleet.operator.until(
        "member-1", lambda told: told.transfer.failure and told.ranks, "back, and out of the epoch", SECONDS
    )
    assert "restarted" in told.transfer.failure.message
    await fleet.group()
    await fleet.bring(published)


async def test_a_trainers_agent_killed_while_it_sends_begins_again(slow_fleet):
    fleet = slow_fleet
    published = await fleet.publish(1, 1 << 20)
    await fleet.group()
    await fleet.check(published, list(fleet.agents))
    await fleet.phase(published, Phase.TRANSFER, list(fleet.agents))
    await receiving(fleet, "member-1", published)
    await fleet.agents["trainer"].kill()
    for name in fleet.members:
        told = await fleet.operator.until(name, lambda told: told.transfer.failure, "told of it", 15)
        assert told.transfer.failure.version == published.version
    fleet.operator.pod("trainer").reports.clear()
    await fleet.agents["trainer"].start()
    await fleet.operator.until("trainer", lambda told: told.source.versions == (published,), "back", SECONDS)
    await fleet.group()
    await fleet.bring(published)


@pytest.mark.parametrize("when", ["joined", "staged"])
async def test_an_agent_killed_with_nothing_under_way_takes_part_again(fleet, when):
    published = await fleet.publish(1)
    await fleet.group()
    await fleet.check(published, list(fleet.agents))
    if when == "staged":
        await fleet.phase(published, Phase.TRANSFER, list(fleet.agents))
        await fleet.staged("member-1", published)
        await fleet.commit(published, "member-2")
        await fleet.serving("member-2", published)
    await fleet.agents["member-1"].kill()
    fleet.operator.pod("member-1").reports.clear()
    await fleet.agents["member-1"].start()
    told = await fleet.operator.until("member-1", lambda told: told.transfer.failure, "out of it", SECONDS)
    assert told.transfer.version is None, "what was staged went with the agent"
    assert told.serving.state is ServingState.INITIAL
    await fleet.group(["member-1"])
    await fleet.bring(published, ["member-1"])


async def test_an_engine_that_restarts_in_a_transfer_gets_what_was_staged_meanwhile(slow_fleet):
    fleet = slow_fleet
    published = await fleet.publish(1, 1 << 20)
    await fleet.group()
    await fleet.check(published, list(fleet.agents))
    await fleet.phase(published, Phase.TRANSFER, list(fleet.agents))
    await receiving(fleet, "member-1", published)
    engine = fleet.agents["member-1"].engine
    engine.change(alive=False)
    await fleet.staged("member-1", published)
    await fleet.staged("member-2", published)
    await fleet.commit(published, *fleet.members)
    await fleet.serving("member-2", published)
    engine.restart_now()
    await fleet.serving("member-1", published)
    assert engine.read().boot == 2
    assert fleet.operator.pod("member-1").told.transfer.epoch == 1


async def test_an_operator_that_is_gone_in_a_transfer_stops_nothing(slow_fleet):
    fleet = slow_fleet
    published = await fleet.publish(1, 1 << 20)
    await fleet.group()
    await fleet.check(published, list(fleet.agents))
    await fleet.phase(published, Phase.TRANSFER, list(fleet.agents))
    await receiving(fleet, "member-1", published)
    await fleet.operator.stop()
    for name in fleet.agents:
        fleet.operator.pod(name).reports.clear()
    await asyncio.sleep(3)
    assert all("apply" not in fleet.agents[name].engine.read().calls for name in fleet.members)
    await fleet.operator.start()
    for name in fleet.members:
        await fleet.staged(name, published)
    await fleet.commit(published, *fleet.members)
    for name in fleet.members:
        await fleet.serving(name, published)


async def test_an_agent_killed_while_it_serves_interrupts_nobody(fleet):
    published = await fleet.publish(1)
    await fleet.group()
    await fleet.bring(published)
    agent = fleet.agents["member-1"]
    before = agent.engine.read()
    permit = (agent.directory / "permit").stat()
    await agent.kill()
    assert (agent.directory / "permit").exists()
    fleet.operator.pod("member-1").reports.clear()
    await agent.start()
    told = await fleet.operator.until(
        "member-1", lambda told: told.serving.state is ServingState.SERVING, "serving again", SECONDS
    )
    assert (told.serving.version, told.serving.digest) == (published.version, published.digest)
    assert agent.engine.read() == before
    after = (agent.directory / "permit").stat()
    assert (after.st_ino, after.st_mtime_ns) == (permit.st_ino, permit.st_mtime_ns)


async def test_an_agent_killed_while_it_applies_fences_its_engine(fleet):
    published = await fleet.publish(1)
    await fleet.group()
    agent = fleet.agents["member-1"]
    agent.engine.change(hold="apply")
    await fleet.check(published, list(fleet.agents))
    await fleet.phase(published, Phase.TRANSFER, list(fleet.agents))
    await fleet.staged("member-1", published)
    await fleet.commit(published, "member-1")
    await fleet.operator.until(
        "member-1", lambda told: told.serving.state is ServingState.APPLYING, "applying", SECONDS
    )
    await eventually(lambda: "apply" in agent.engine.read().calls, "applying")
    assert agent.permit.mode is Mode.HOLD
    await agent.kill()
    agent.engine.change(hold="", weights="mixed")
    await agent.start()
    await fleet.operator.until(
        "member-1", lambda told: told.serving.fences == 1 and told.serving.boot == "boot-2", "fenced", SECONDS
    )
    assert agent.engine.read().calls[-1] == "restart"
    assert agent.permit is None


async def test_an_agent_killed_between_apply_and_resume_resumes(fleet):
    published = await fleet.publish(1)
    await fleet.group()
    agent = fleet.agents["member-1"]
    agent.engine.change(hold="resume")
    await fleet.check(published, list(fleet.agents))
    await fleet.phase(published, Phase.TRANSFER, list(fleet.agents))
    await fleet.staged("member-1", published)
    await fleet.commit(published, "member-1")
    await eventually(lambda: "resume" in agent.engine.read().calls, "resuming")
    assert agent.engine.read().paused
    await agent.kill()
    agent.engine.change(hold="")
    fleet.operator.pod("member-1").reports.clear()
    await agent.start()
    await fleet.serving("member-1", published)
    assert agent.engine.read().calls.count("apply") == 1


async def test_a_clean_failure_serves_on_and_a_mixed_one_is_fenced(fleet):
    first = await fleet.publish(1)
    await fleet.group()
    await fleet.bring(first)
    second = await fleet.publish(2)
    clean, mixed = (fleet.agents[name].engine for name in fleet.members)
    clean.change(fails="clean")
    mixed.change(fails="mixed")
    await fleet.phase(second, Phase.TRANSFER, list(fleet.agents))
    for name in fleet.members:
        await fleet.staged(name, second)
        await fleet.operator.want(
            name,
            commit=second.version,
            commit_digest=second.digest,
            allowed=(first.version, second.version),
        )
    await fleet.operator.until("member-1", lambda told: told.serving.failure, "refusing it", SECONDS)
    await fleet.serving("member-1", first)
    # Fenced, restarted, and committed again from what is still staged.
    await fleet.serving("member-2", second)
    assert mixed.read().boot == 2
    assert fleet.operator.pod("member-2").told.serving.fences == 1


async def test_a_stale_leader_is_refused_and_told_of_the_newer(fleet):
    fleet.operator.term = 5
    await fleet.operator.want("member-1")
    await fleet.operator.until("member-1", lambda told: told.term == 5, "obeying term 5")
    await fleet.agents["member-1"].restart()
    fleet.operator.pod("member-1").desired = None
    fleet.operator.term = 4
    await fleet.operator.until("member-1", lambda told: told.highest_term == 5 and told.term == 0, "back")
    await fleet.operator.want("member-1")
    await eventually(lambda: fleet.operator.pod("member-1").nacks, "a nack")
    assert fleet.operator.pod("member-1").nacks[-1].term == 5
    assert fleet.operator.pod("member-1").hellos[-1].term == 5


async def test_a_released_member_serves_on(fleet):
    published = await fleet.publish(1)
    await fleet.group()
    await fleet.bring(published)
    await fleet.operator.release("member-1")
    await fleet.operator.until(
        "member-1", lambda told: told.transfer.state is TransferState.IDLE and told.term == 0, "released"
    )
    state = fleet.agents["member-1"].engine.read()
    assert fleet.agents["member-1"].permit == Permit(f"boot-{state.boot}", Mode.SERVE, published.version)


@pytest.mark.parametrize("name", ["trainer", "member-1"])
async def test_sigterm_ends_an_agent_and_its_children_within_seconds(fleet, name):
    await fleet.publish(1)
    await fleet.group()
    children = descendants(fleet.agents[name].process.pid)
    assert children
    assert await fleet.agents[name].kill(signal.SIGTERM) == 0
    await eventually(lambda: not any(alive(pid) for pid in children), "its children gone", 5)
    assert "Traceback" not in fleet.agents[name].log()


async def test_children_do_not_outlive_an_agent_that_was_killed(fleet):
    await fleet.group()
    children = descendants(fleet.agents["member-1"].process.pid)
    assert children
    await fleet.agents["member-1"].kill()
    await eventually(lambda: not any(alive(pid) for pid in children), "its children gone", 10)
