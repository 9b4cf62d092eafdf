"""A namespace with an operator's process and fake agents, for tests and benchmarks of whole rollouts."""

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

from cluster_objects import ClusterObjects
from fake_agents import FakeAgent, FakeNetwork
from operator_process import START_SECONDS, OperatorProcess

from weightsync_contract.reasons import Role

SOON = ("--lease-duration", "2.5", "--lease-renew", "1.8", "--lease-retry", "0.2")
"""Election times for tests that wait for a takeover."""


class Operated:
    """One namespace. Agents dial all operators that were started, in turn."""

    def __init__(self, objects: ClusterObjects, kubeconfig: Path, directory: Path) -> None:
        self.objects = objects
        self.network = FakeNetwork()
        self.operators: list[OperatorProcess] = []
        self._kubeconfig, self._directory = kubeconfig, directory
        self._numbers = itertools.count()
        self._stack = AsyncExitStack()

    async def start(
        self,
        *arguments: str,
        kubeconfig: Path | None = None,
        lease: str = "",
        ready_seconds: float = START_SECONDS,
        program: tuple[str, ...] = ("-m", "weightsync_operator"),
    ) -> OperatorProcess:
        """One more replica."""
        namespace = self.objects.namespace
        operator = OperatorProcess(
            self._directory,
            kubeconfig or self._kubeconfig,
            f"operator-{next(self._numbers)}",
            *(() if "--all-namespaces" in arguments else ("--namespace", namespace)),
            *("--lease-namespace", lease or namespace, *arguments),
            program=program,
        )
        self._stack.callback(end, operator)
        await asyncio.to_thread(operator.start, ready_seconds)
        self.operators.append(operator)
        return operator

    def urls(self) -> list[str]:
        return [each.url for each in self.operators]

    async def agent(self, name: str, role: Role, app: str, ranks: int = 1) -> FakeAgent:
        """A pod and its agent."""
        pod = await asyncio.to_thread(self.objects.pod, name, role.value, app)
        token = await asyncio.to_thread(self.objects.token_of, pod)
        return await self._stack.enter_async_context(
            FakeAgent(self.network, self.urls, pod, role, token, ranks=ranks).running()
        )

    async def trainer(self, name: str = "trainer-0", app: str = "trainer") -> FakeAgent:
        return await self.agent(name, Role.TRAINER, app)

    async def members(self, count: int, first: int = 0, app: str = "vllm") -> list[FakeAgent]:
        return [await self.agent(f"vllm-{first + number}", Role.INFERENCE, app) for number in range(count)]

    async def status(self, name: str = "policy") -> dict[str, Any]:
        document = await asyncio.to_thread(self.objects.read, name)
        status: dict[str, Any] = document.get("status", {})
        return status

    async def until_status(self, condition: Any, seconds: float = 20, name: str = "policy") -> dict[str, Any]:
        """The status, once it is as wanted: ``condition`` takes it and may fail on what is not there yet."""
        status: dict[str, Any] = {}
        try:
            async with asyncio.timeout(seconds):
                while True:
                    status = await self.status(name)
                    try:
                        if condition(status):
                            return status
                    except (KeyError, StopIteration):
                        pass
                    await asyncio.sleep(0.05)
        except TimeoutError:
            raise AssertionError(f"the status never became as wanted: {status}") from None

    async def until_condition(self, kind: str, reason: str, seconds: float = 20, name: str = "policy") -> str:
        """The message of a condition, once it has this reason."""
        status = await self.until_status(lambda s: row(s, kind)["reason"] == reason, seconds, name)
        message: str = row(status, kind)["message"]
        return message

    async def close(self) -> None:
        await self._stack.aclose()


def row(status: dict[str, Any], kind: str) -> dict[str, Any]:
    """A condition."""
    found: dict[str, Any] = next(each for each in status.get("conditions", []) if each["type"] == kind)
    return found


def end(operator: OperatorProcess) -> None:
    """End it in any case."""
    if operator.running:
        operator.kill()


@asynccontextmanager
async def operated(objects: ClusterObjects, kubeconfig: Path, directory: Path) -> AsyncIterator[Operated]:
    """A namespace that is cleared of processes and agents afterwards."""
    made = Operated(objects, kubeconfig, directory)
    try:
        yield made
    finally:
        await made.close()
