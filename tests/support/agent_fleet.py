"""Real agent processes, and a fleet of them that a scripted operator takes through rollouts, phase by phase."""

import asyncio
import contextlib
import signal
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path

import numpy
from engine_server import EngineServer
from file_engine import FileEngine, new_engine
from scripted_operator import ScriptedOperator, scripted_operator

from weightsync_contract.messages import (
    Group,
    Phase,
    Published,
    ServingState,
    TransferState,
    VersionId,
    Wanted,
)
from weightsync_engine.client import publish
from weightsync_engine.permit import Mode, Permit, read_permit

SUPPORT = Path(__file__).parent
SECONDS = 60.0
MEMBERS = ("member-1", "member-2")
JOINED = (TransferState.JOINED, TransferState.STAGED, TransferState.SENT)


class AgentProcess:
    """One agent's process and directories, which outlive it.

    A member drives a fake engine, unless ``directory`` is that of a real one (its URL among the arguments).
    """

    def __init__(
        self,
        name: str,
        root: Path,
        operator: ScriptedOperator,
        *arguments: str,
        directory: Path | None = None,
    ) -> None:
        self.name, self.root = name, root / name
        self.root.mkdir()
        self.directory, self.state = directory or self.root / "shared", self.root / "state"
        token = self.root / "token"
        token.write_text("token")
        self.engine: FileEngine | None = None
        if name == "trainer" or directory:
            program = ["-m", "weightsync_engine.agent"]
        else:
            self.engine = new_engine(self.root / "engine")
            program = [str(SUPPORT / "file_engine.py"), str(self.root / "engine")]
        role = "trainer" if name == "trainer" else "inference"
        self.command = [
            *(sys.executable, *program, "--role", role, "--operator", operator.url),
            *("--token-file", str(token), "--namespace", "default", "--pod-name", name),
            *("--pod-uid", f"uid-{name}", "--pod-ip", "127.0.0.1"),
            *("--directory", str(self.directory), "--state-directory", str(self.state), *arguments),
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

    async def publish(
        self, version: int, size: int = 1 << 18, tensors: Mapping[str, object] | None = None
    ) -> Published:
        """Publish as a trainer does; ``tensors`` unless they are to be made, ``size`` numbers of them."""
        given = tensors or {
            "model.embed.weight": numpy.random.default_rng(version).standard_normal(size).astype("float32"),
            "model.norm.weight": numpy.full(7, version, dtype="float32"),
        }
        socket = str(self.agents["trainer"].directory / "publish.sock")
        await asyncio.to_thread(publish, given, version, run="run", socket=socket)
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
        """Order the cut-over. As an operator does it, what is served until then may be served on."""
        for name in names:
            before = self.operator.pod(name).told.serving.version
            await self.operator.want(
                name,
                commit=published.version,
                commit_digest=published.digest,
                allowed=(*((before,) if before else ()), published.version),
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
        if agent.engine is None:
            return
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
            await self.operator.want(name, allowed=(published.version,))


@asynccontextmanager
async def _running(
    make: Callable[[ScriptedOperator], dict[str, AgentProcess]], **wants: object
) -> AsyncIterator[Fleet]:
    """Agents that are up, told ``wants``; killed at the end, their logs shown if that was an error."""
    async with AsyncExitStack() as stack:
        operator = await stack.enter_async_context(scripted_operator())
        agents = make(operator)
        try:
            for agent in agents.values():
                await agent.start()
                stack.push_async_callback(agent.kill)
            for name in agents:
                await operator.until(name, lambda told: told.ranks == 1, "up", SECONDS)
                if wants:
                    await operator.want(name, **wants)
            yield Fleet(operator, agents)
        except BaseException:
            for agent in agents.values():
                print(f"---- {agent.name}\n{agent.log()}")
            raise


@asynccontextmanager
async def run_fleet(root: Path, *trainer_arguments: str) -> AsyncIterator[Fleet]:
    """A trainer's agent and two members with fake engines."""

    def make(operator: ScriptedOperator) -> dict[str, AgentProcess]:
        return {
            "trainer": AgentProcess("trainer", root, operator, *trainer_arguments),
            **{name: AgentProcess(name, root, operator) for name in MEMBERS},
        }

    async with _running(make) as fleet:
        yield fleet


@asynccontextmanager
async def run_pair(
    root: Path, engine: EngineServer, *trainer_arguments: str, **wants: object
) -> AsyncIterator[Fleet]:
    """A trainer's agent and the agent of one real engine; both are told ``wants`` as soon as they are up."""

    def make(operator: ScriptedOperator) -> dict[str, AgentProcess]:
        return {
            "trainer": AgentProcess("trainer", root, operator, *trainer_arguments),
            "member": AgentProcess(
                "member", root, operator, "--engine-url", engine.url, directory=engine.directory
            ),
        }

    try:
        async with _running(make, **wants) as fleet:
            yield fleet
    except BaseException:
        print(engine.process.tail(60))
        raise


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
