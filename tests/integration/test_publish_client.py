"""Publishing as a trainer does: real sockets, and trainers in processes of their own where that matters."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from weightsync_contract.manifest import Manifest
from weightsync_contract.messages import Fleet, VersionId
from weightsync_contract.reasons import PublishCode
from weightsync_demo.waiting import wait_for
from weightsync_engine.client import (
    AgentUnavailableError,
    PublishOutcome,
    PublishRefusedError,
    PublishTimeoutError,
    publish,
    publish_file,
)
from weightsync_engine.digest import digest_image
from weightsync_engine.publish.server import PublishServer
from weightsync_engine.publish.store import VersionStore

T = TypeVar("T")


class Agent:
    """The publishing side of an agent, in the test's event loop."""

    def __init__(self, directory: Path) -> None:
        self.socket = directory / "publish.sock"
        self.store = VersionStore(directory / "versions")
        self.server = PublishServer(self.socket, self.store)
        self.changes = 0
        self.server.on_change = self._changed

    def _changed(self) -> None:
        self.changes += 1

    def image(self, version: VersionId) -> bytes:
        with self.store.open(version) as stored:
            return os.pread(stored.fd, stored.manifest.nbytes, 0)


@pytest.fixture
async def agent(tmp_path: Path) -> AsyncIterator[Agent]:
    made = Agent(tmp_path)
    await made.server.start()
    yield made
    await made.server.close()


async def call(function: Callable[..., T], *arguments: Any, **named: Any) -> T:
    """A blocking call of the client, as from a training loop."""
    return await asyncio.to_thread(function, *arguments, **named)


def flat(tensors: dict[str, torch.Tensor]) -> tuple[Manifest, bytes]:
    """The image as it should be, made another way."""
    manifest = Manifest.from_lists(
        list(tensors),
        [str(t.dtype).removeprefix("torch.") for t in tensors.values()],
        [list(t.shape) for t in tensors.values()],
    )
    image = bytearray(manifest.nbytes)
    for tensor, offset in zip(tensors.values(), manifest.offsets, strict=True):
        if tensor.numel():
            data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            image[offset : offset + len(data)] = data
    return manifest, bytes(image)


TENSORS = {
    "embedding": torch.randn(64, 33),
    "norm": torch.randn(64).to(torch.bfloat16),
    "scalar": torch.tensor(3.5),
    "nothing": torch.empty(0, 7),
    "mask": torch.tensor([True, False, True]),
    "small": torch.randn(5).to(torch.float8_e4m3fn),
    "transposed": torch.randn(300, 50).t(),
    "strided": torch.arange(20)[::3],
    "parameter": torch.nn.Parameter(torch.randn(3, 3)),
}


async def test_every_kind_of_tensor_arrives_as_it_is(agent: Agent) -> None:
    result = await call(publish, TENSORS, 1, run="run", socket=agent.socket)
    manifest, image = flat({name: tensor.detach() for name, tensor in TENSORS.items()})
    assert agent.image(result.version) == image
    assert result.digest == digest_image(manifest.layout, image)
    assert result.outcome is PublishOutcome.PUBLISHED


async def test_pairs_and_modules_and_numpy_are_taken_too(agent: Agent) -> None:
    model = torch.nn.Linear(4, 3)
    named = await call(publish, model.named_parameters(), 1, run="a", socket=agent.socket)
    state = await call(publish, model.state_dict(), 1, run="b", socket=agent.socket)
    arrays = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    arrays["weight"] = np.asfortranarray(arrays["weight"])
    numpy = await call(publish, arrays, 1, run="c", socket=agent.socket)
    assert named.digest == state.digest == numpy.digest


async def test_more_than_all_slots_hold(agent: Agent) -> None:
    tensors = {"big": torch.arange(7_000_000, dtype=torch.int32), "end": torch.ones(3)}
    seen: list[tuple[int, int]] = []
    result = await call(
        publish,
        tensors,
        1,
        run="run",
        socket=agent.socket,
        progress=lambda done, total: seen.append((done, total)),
    )
    manifest, image = flat(tensors)
    assert agent.image(result.version) == image
    assert seen[-1] == (manifest.nbytes, manifest.nbytes)


async def test_the_trainer_may_change_its_tensors_once_publish_is_back(agent: Agent) -> None:
    tensor = torch.ones(1000)
    result = await call(publish, {"x": tensor}, 1, run="run", socket=agent.socket)
    before = agent.image(result.version)
    tensor.fill_(7)
    assert agent.image(result.version) == before


async def test_a_safetensors_file_is_published(agent: Agent, tmp_path: Path) -> None:
    tensors = {"a": torch.randn(10, 3), "b": torch.randn(7).to(torch.bfloat16)}
    save_file(tensors, tmp_path / "x.safetensors")
    result = await call(publish_file, tmp_path / "x.safetensors", 1, run="run", socket=agent.socket)
    with agent.store.open(result.version) as stored:
        assert {spec.name for spec in stored.manifest.tensors} == {"a", "b"}
        names = [spec.name for spec in stored.manifest.tensors]
    assert agent.image(result.version) == flat({name: tensors[name] for name in names})[1]


@pytest.mark.parametrize(
    ("tensors", "version", "run", "code"),
    [
        pytest.param({}, 1, "run", PublishCode.EMPTY, id="nothing"),
        pytest.param({"x": torch.ones(1)}, -1, "run", PublishCode.BAD_VERSION, id="negative version"),
        pytest.param({"x": torch.ones(1)}, True, "run", PublishCode.BAD_VERSION, id="no number"),
        pytest.param({"x": torch.ones(1)}, 1, "a/b", PublishCode.BAD_RUN, id="run with a slash"),
        pytest.param({"x": torch.ones(1)}, 1, "", PublishCode.BAD_RUN, id="empty run"),
        pytest.param({"": torch.ones(1)}, 1, "run", PublishCode.BAD_NAME, id="no name"),
        pytest.param(
            {"x": torch.ones(1, dtype=torch.complex64)}, 1, "run", PublishCode.UNKNOWN_DTYPE, id="dtype"
        ),
        pytest.param(
            [("x", torch.ones(1)), ("x", torch.ones(2))], 1, "run", PublishCode.DUPLICATE_NAME, id="twice"
        ),
    ],
)
async def test_what_cannot_be_published_is_refused_by_code_and_changes_nothing(
    agent: Agent, tensors: Any, version: Any, run: str, code: PublishCode
) -> None:
    await call(publish, {"x": torch.ones(1)}, 7, run="good", socket=agent.socket)
    with pytest.raises(PublishRefusedError) as refused:
        await call(publish, tensors, version, run=run, socket=agent.socket)
    assert refused.value.code is code
    assert [each.version for each in agent.store.versions()] == [VersionId("good", 7)]


async def test_a_version_has_to_grow_within_its_run_only(agent: Agent) -> None:
    await call(publish, {"x": torch.ones(1)}, 7, run="one", socket=agent.socket)
    with pytest.raises(PublishRefusedError, match="at version 7 already") as refused:
        await call(publish, {"x": torch.ones(1)}, 6, run="one", socket=agent.socket)
    assert refused.value.code is PublishCode.VERSION_NOT_GROWING
    await call(publish, {"x": torch.zeros(1)}, 1, run="two", socket=agent.socket)


async def test_the_same_version_again_is_fine_with_its_bytes_and_a_conflict_with_others(agent: Agent) -> None:
    first = await call(publish, {"x": torch.ones(1)}, 7, run="run", socket=agent.socket)
    again = await call(publish, {"x": torch.ones(1)}, 7, run="run", socket=agent.socket)
    assert first == again
    with pytest.raises(PublishRefusedError) as refused:
        await call(publish, {"x": torch.zeros(1)}, 7, run="run", socket=agent.socket)
    assert refused.value.code is PublishCode.VERSION_CONFLICT
    assert agent.server.source().versions[0].digest == first.digest


async def test_waiting_is_answered_when_the_fleet_serves_it(agent: Agent) -> None:
    waiting = asyncio.create_task(
        call(publish, {"x": torch.ones(1)}, 1, run="run", wait=True, timeout=20, socket=agent.socket)
    )
    await call(wait_for, agent.store.versions, 10, "the copy")
    agent.server.tell(Fleet(None, None, 2, 0))
    assert not waiting.done()
    agent.server.tell(Fleet(VersionId("run", 1), None, 2, 2))
    assert (await waiting).outcome is PublishOutcome.SERVING


async def test_waiting_ends_at_its_deadline_without_an_error(agent: Agent) -> None:
    agent.server.tell(Fleet(None, None, 2, 0))
    began = time.monotonic()
    result = await call(
        publish, {"x": torch.ones(1)}, 1, run="run", wait=True, timeout=1.0, socket=agent.socket
    )
    assert result.outcome is PublishOutcome.PENDING
    assert time.monotonic() - began < 4


async def test_an_agent_that_ends_while_somebody_waits_is_pending(agent: Agent) -> None:
    waiting = asyncio.create_task(
        call(publish, {"x": torch.ones(1)}, 1, run="run", wait=True, timeout=3, socket=agent.socket)
    )
    await call(wait_for, agent.store.versions, 10, "the copy")
    await agent.server.close()
    assert (await waiting).outcome is PublishOutcome.PENDING


async def test_an_agent_restart_between_two_publishes_is_not_noticed(agent: Agent, tmp_path: Path) -> None:
    await call(publish, {"x": torch.ones(1)}, 1, run="run", socket=agent.socket)
    await agent.server.close()
    again = Agent(tmp_path)
    await again.server.start()
    try:
        assert [each.version.version for each in again.server.source().versions] == [1]
        await call(publish, {"x": torch.zeros(1)}, 2, run="run", socket=again.socket)
        assert [each.version.version for each in again.server.source().versions] == [1, 2]
    finally:
        await again.server.close()


async def test_without_an_agent_the_error_says_what_to_check(tmp_path: Path) -> None:
    with pytest.raises(AgentUnavailableError, match="WEIGHTSYNC_DIR"):
        await call(publish, {"x": torch.ones(1)}, 1, socket=tmp_path / "publish.sock")


async def test_an_agent_that_stands_still_does_not_hang_training(tmp_path: Path) -> None:
    import socket

    with socket.socket(socket.AF_UNIX) as deaf:
        deaf.bind(str(tmp_path / "publish.sock"))
        deaf.listen()
        began = time.monotonic()
        with pytest.raises(PublishTimeoutError):
            await call(publish, {"x": torch.ones(1)}, 1, timeout=1.0, socket=tmp_path / "publish.sock")
        assert time.monotonic() - began < 4


TRAINER = """
    import sys, time, torch
    from weightsync_engine.client import publish
    socket, size, then = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    def told(done, total):
        print("moving", flush=True)
        if then == "stall": time.sleep(600)
    tensors = {f"t{i}": torch.ones(size) for i in range(4)}
    publish(tensors, 1, run="other", socket=socket, progress=told)
    print("published", flush=True)
    if then == "stay": time.sleep(600)
"""


@contextlib.contextmanager
def trainer(agent: Agent, then: str, size: int = 1000) -> Any:
    command = [sys.executable, "-c", textwrap.dedent(TRAINER), str(agent.socket), str(size), then]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        lines: list[str] = []
        assert process.stdout is not None
        stdout = process.stdout
        thread = threading.Thread(target=lambda: lines.extend(stdout), daemon=True)
        thread.start()
        try:
            yield process, lines
        finally:
            process.kill()
            process.wait(10)
            thread.join(10)


async def said(lines: list[str], word: str) -> None:
    await call(wait_for, lambda: any(word in line for line in lines), 60, f"the trainer to say {word!r}")


async def test_a_trainer_that_is_killed_in_mid_publish_leaves_nothing(agent: Agent, tmp_path: Path) -> None:
    with trainer(agent, "stall", 2_000_000) as (process, lines):
        await said(lines, "moving")
        process.send_signal(signal.SIGKILL)
        process.wait(10)
        await call(
            wait_for, lambda: not list((tmp_path / "versions").glob(".writing-*")), 10, "the half copy to go"
        )
    assert agent.store.versions() == ()
    assert not agent.server.source().connected
    await call(publish, {"x": torch.ones(1)}, 1, run="run", socket=agent.socket)


async def test_a_second_publisher_is_refused_and_told_the_pid_of_the_first(agent: Agent) -> None:
    with trainer(agent, "stay") as (process, lines):
        await said(lines, "published")
        assert agent.server.source().connected
        with pytest.raises(PublishRefusedError, match=f"process {process.pid} publishes") as refused:
            await call(publish, {"x": torch.ones(1)}, 9, run="run", socket=agent.socket)
        assert refused.value.code is PublishCode.ANOTHER_PUBLISHER
        process.kill()
        process.wait(10)
        await call(wait_for, lambda: not agent.server.source().connected, 10, "the publisher to be gone")
    assert not agent.server.source().completed
    await call(publish, {"x": torch.ones(1)}, 9, run="run", socket=agent.socket)


async def test_a_trainer_that_ends_as_it_should_has_completed(agent: Agent) -> None:
    with trainer(agent, "end") as (process, lines):
        await said(lines, "published")
        process.wait(30)
        await call(wait_for, lambda: agent.server.source().completed, 10, "the goodbye")
    assert [each.version for each in agent.server.source().versions] == [VersionId("other", 1)]


async def test_nonsense_on_the_socket_is_refused_and_harms_nobody(agent: Agent) -> None:
    import socket

    for nonsense in (b"hello\n", b"{}\n", b'{"type":"Filled","bytes":5}\n', b"\xff" * 100_000 + b"\n"):
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(5)
            client.connect(str(agent.socket))
            with contextlib.suppress(OSError):
                client.sendall(nonsense)
            answer = await call(_drain, client)
            assert b"Malformed" in answer or b"Refused" in answer or answer.endswith(b"}\n")
    await call(publish, {"x": torch.ones(1)}, 1, run="run", socket=agent.socket)


def _drain(client: Any) -> bytes:
    data = b""
    with contextlib.suppress(OSError):
        while chunk := client.recv(65536):
            data += chunk
    return data
