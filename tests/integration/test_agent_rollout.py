"""Real agents, children, gloo and sockets; the operator is scripted and the engines are fakes (files)."""

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from weightsync_contract.messages import (
    Group,
    Phase,
    Published,
    ServingState,
    TransferState,
    VersionId,
    Wanted,
)
from weightsync_contract.reasons import FailureCode
from weightsync_engine.permit import Mode, Permit, read_permit

if os.environ.get("CI") != "true":
    pytest.importorskip("numpy", reason="the trainer's tensors are numpy arrays here")
    pytest.importorskip("torch", reason="the transfer's children hold torch's gloo group")

import numpy
from file_engine import FileEngine, new_engine
from scripted_operator import ScriptedOperator, scripted_operator

SUPPORT = Path(__file__).parent.parent / "support"
SECONDS = 60.0
MEMBERS = ("member-1", "member-2")


class AgentProcess:
    """One agent's process and directories, which outlive it."""

    def __init__(self, name: str, root: Path, operator: ScriptedOperator, *extra: str) -> None:
        self.name, self.root = name, root / name
        self.root.mkdir()
        self.directory, self.state = self.root / "shared", self.root / "state"
        token = self.root / "token"
        token.write_text("token")
        self.engine: FileEngine | None = None
        if name == "trainer":
            program = ["-m", "weightsync_engine.agent"]
        else:
            self.engine = new_engine(self.root / "engine")
            program = [str(SUPPORT / "file_engine.py"), str(self.root / "engine")]
        role = "trainer" if name == "trainer" else "inference"
        self.command = [
            *(sys.executable, *program, "--role", role, "--operator", operator.url),
            *("--token-file", str(token), "--namespace", "default", "--pod-name", name),
            *("--pod-uid", f"uid-{name}", "--pod-ip", "127.0.0.1"),
            *("--directory", str(self.directory), "--state-directory", str(self.state), *extra),
        ]
        self.process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        with (self.root / "log").open("ab") as log:
            self.process = await asyncio.create_subprocess_exec(*self.command, stdout=log, stderr=log)

    async def kill(self, number: signal.Signals = signal.SIGKILL) -> int:
        assert self.process
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)
        return await asyncio.wait_for(self.process.wait(), 15)

    async def restart(self) -> None:
        await self.kill()
        await self.start()

    @property
    def permit(self) -> Permit | None:
        return read_permit(self.directory / "permit")

    def log(self) -> str:
        return (self.root / "log").read_text()[-6000:]


class Fleet:
    """A trainer and its members, and what an operator does with them, phase by phase."""

    def __init__(self, operator: ScriptedOperator, agents: dict[str, AgentProcess]) -> None:
        self.operator, self.agents = operator, agents
        self.epoch = 0

    @property
    def members(self) -> list[str]:
        return [name for name in self.agents if name != "trainer"]

    async def publish(self, version: int, size: int = 1 << 18) -> Published:
        """Publish from a process of its own, as a trainer would."""
        from weightsync_engine.client import publish

        tensors = {
            "model.embed.weight": numpy.random.default_rng(version).standard_normal(size).astype("float32"),
            "model.norm.weight": numpy.full(7, version, dtype="float32"),
        }
        socket = str(self.agents["trainer"].directory / "publish.sock")
        await asyncio.to_thread(publish, tensors.items(), version, run="run", socket=socket)
        told = await self.operator.until(
            "trainer",
            lambda told: any(each.version == VersionId("run", version) for each in told.source.versions),
            f"holding version {version}",
        )
        return next(each for each in told.source.versions if each.version.version == version)

    async def group(self, members: list[str] | None = None) -> dict[str, Group]:
        """A new epoch; all have joined."""
        self.epoch += 1
        members = self.members if members is None else members
        world = len(members) + 1
        first = Group(self.epoch, f"nonce-{self.epoch}", 0, 1, world)
        await self.operator.want("trainer", group=first, wanted=None)
        told = await self.operator.until(
            "trainer",
            lambda told: told.transfer.endpoint and told.transfer.nonce == first.nonce,
            "listening",
            SECONDS,
        )
        groups = {"trainer": replace(first, endpoint=told.transfer.endpoint)}
        for rank, name in enumerate(members, 1):
            groups[name] = replace(groups["trainer"], rank=rank)
            await self.operator.want(name, group=groups[name], wanted=None, commit=None)
        await self.operator.want("trainer", group=groups["trainer"])
        for name in groups:
            await self.operator.until(
                name,
                lambda told: told.transfer.epoch == self.epoch and told.transfer.state in JOINED,
                f"in epoch {self.epoch}",
                SECONDS,
            )
        return groups

    async def phase(self, published: Published, phase: Phase, names: list[str], **wants: object) -> None:
        wanted = Wanted(published.version, published.layout, published.digest, published.total_bytes, phase)
        for name in names:
            await self.operator.want(name, wanted=wanted, **wants)

    async def check(self, published: Published, names: list[str]) -> None:
        await self.phase(published, Phase.CHECK, names)
        for name in names:
            await self.operator.until(
                name, lambda told: told.transfer.checked == published.layout, "checked", SECONDS
            )

    async def staged(self, name: str, published: Published) -> None:
        await self.operator.until(
            name,
            lambda told: (
                (told.transfer.state, told.transfer.version, told.transfer.digest)
                == (TransferState.STAGED, published.version, published.digest)
            ),
            f"{published.version} staged",
            SECONDS,
        )

    async def commit(self, published: Published, *names: str) -> None:
        for name in names:
            await self.operator.want(
                name,
                commit=published.version,
                commit_digest=published.digest,
                allowed=(published.version,),
            )

    async def serving(self, name: str, published: Published) -> None:
        await self.operator.until(
            name,
            lambda told: (
                (told.serving.state, told.serving.version) == (ServingState.SERVING, published.version)
            ),
            f"serving {published.version}",
            SECONDS,
        )
        agent = self.agents[name]
        state = agent.engine.read()
        assert state.weights == f"{published.version} {published.digest}"
        assert not state.paused
        assert agent.permit == Permit(f"boot-{state.boot}", Mode.SERVE, published.version)

    async def bring(self, published: Published, names: list[str] | None = None) -> None:
        """A whole rollout to ``names``, which are in the group."""
        names = self.members if names is None else names
        everybody = ["trainer", *names]
        if any(self.operator.pod(name).told.transfer.checked != published.layout for name in everybody):
            await self.check(published, everybody)
        await self.phase(published, Phase.TRANSFER, everybody)
        for name in names:
            await self.staged(name, published)
        await self.commit(published, *names)
        for name in names:
            await self.serving(name, published)


JOINED = (TransferState.JOINED, TransferState.STAGED, TransferState.SENT)


@asynccontextmanager
async def run_fleet(root: Path, *trainer_arguments: str) -> AsyncIterator[Fleet]:
    async with AsyncExitStack() as stack:
        operator = await stack.enter_async_context(scripted_operator())
        agents = {
            "trainer": AgentProcess("trainer", root, operator, *trainer_arguments),
            **{name: AgentProcess(name, root, operator) for name in MEMBERS},
        }
        for agent in agents.values():
            await agent.start()
            stack.push_async_callback(agent.kill)
        for name in agents:
            await operator.until(name, lambda told: told.ranks == 1, "up", SECONDS)
        try:
            yield Fleet(operator, agents)
        except BaseException:
            for agent in agents.values():
                print(f"---- {agent.name}\n{agent.log()}")
            raise


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


async def eventually(condition: Callable[[], object], what: str, seconds: float = SECONDS) -> None:
    """Look again and again: for what no event tells of, as another process's file."""
    until = asyncio.get_running_loop().time() + seconds
    while not condition():
        assert asyncio.get_running_loop().time() < until, f"not {what} within {seconds:g} s"
        await asyncio.sleep(0.02)


def descendants(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            found += [int(child), *descendants(int(child))]
    return found


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"
