"""Publishing while something dies, stops, stalls or is full: training goes on in time, and nothing half is kept."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
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
from weightsync_engine.publish import server as server_module
from weightsync_engine.publish.server import PublishServer
from weightsync_engine.publish.store import VersionStore

AGENT = """
    import asyncio, resource, sys
    from pathlib import Path
    from weightsync_engine.publish.server import PublishServer
    from weightsync_engine.publish.store import VersionStore
    directory, limit = Path(sys.argv[1]), int(sys.argv[2])
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    async def main():
        server = PublishServer(directory / "publish.sock", VersionStore(directory / "versions"))
        await server.start()
        print("ready", flush=True)
        await asyncio.to_thread(sys.stdin.read)
        await server.close()
    asyncio.run(main())
"""


@contextlib.contextmanager
def running(code: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """A Python process that has said its first line."""
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            yield process
        finally:
            process.send_signal(signal.SIGCONT)
            process.kill()
            process.wait(10)


def agent_process(
    directory: Path, file_limit: int = 0
) -> contextlib.AbstractContextManager[subprocess.Popen[str]]:
    """The publishing side of an agent, in a process of its own."""
    return running(AGENT, directory, file_limit)


def kept(directory: Path) -> list[str]:
    """What an agent that starts now finds."""
    return [str(each.version) for each in VersionStore(directory / "versions").versions()]


def leftovers(directory: Path) -> list[Path]:
    return list((directory / "versions").glob(".writing-*"))


def big(value: float) -> dict[str, torch.Tensor]:
    """Some 16 MB in several slots."""
    return {f"t{number}": torch.full((1_000_000,), float(value)) for number in range(4)}


# ------------------------------------------------------------------------------------------------ the agent


def test_an_agent_that_is_killed_in_mid_publish_is_published_to_once_it_is_back(tmp_path: Path) -> None:
    socket_path = tmp_path / "publish.sock"
    with agent_process(tmp_path) as first, contextlib.ExitStack() as later:
        publish(big(1), 1, run="run", socket=socket_path)
        times = []

        def crash(done: int, total: int) -> None:
            times.append(done)
            if len(times) == 5:
                first.kill()
                first.wait(10)
                later.enter_context(agent_process(tmp_path))

        publish(big(2), 2, run="run", socket=socket_path, progress=crash)
        assert times[5] < times[4], "the image was sent to the new agent from its start"
        assert kept(tmp_path) == ["run/1", "run/2"]
        assert not leftovers(tmp_path)


def test_an_agent_that_is_gone_for_good_in_mid_publish_is_told_and_nothing_half_is_kept(
    tmp_path: Path,
) -> None:
    with agent_process(tmp_path) as agent:

        def crash(done: int, total: int) -> None:
            agent.kill()
            agent.wait(10)

        with pytest.raises(AgentUnavailableError, match="run/1"):
            publish(big(1), 1, run="run", timeout=20, socket=tmp_path / "publish.sock", progress=crash)
    assert kept(tmp_path) == []
    assert not leftovers(tmp_path)


@pytest.mark.parametrize("known", [True, False], ids=["between publishes", "before the first"])
def test_a_stopped_agent_holds_training_no_longer_than_the_timeout(tmp_path: Path, known: bool) -> None:
    with agent_process(tmp_path) as agent:
        if known:
            publish({"x": torch.ones(1)}, 1, run="run", socket=tmp_path / "publish.sock")
        agent.send_signal(signal.SIGSTOP)
        began = time.monotonic()
        with pytest.raises(PublishTimeoutError, match="longer timeout"):
            publish(big(1), 2, run="run", timeout=1.5, socket=tmp_path / "publish.sock")
        assert 1.4 < time.monotonic() - began < 4
        agent.send_signal(signal.SIGCONT)
        publish(big(1), 2, run="run", socket=tmp_path / "publish.sock")


def test_an_agent_that_is_stopped_in_mid_publish_holds_training_no_longer_either(tmp_path: Path) -> None:
    with agent_process(tmp_path) as agent:
        began: list[float] = []

        def stop(done: int, total: int) -> None:
            if not began:
                agent.send_signal(signal.SIGSTOP)
                began.append(time.monotonic())

        with pytest.raises(PublishTimeoutError):
            publish(big(1), 1, run="run", timeout=2, socket=tmp_path / "publish.sock", progress=stop)
        assert time.monotonic() - began[0] < 5
        agent.send_signal(signal.SIGCONT)
        publish({"x": torch.ones(1)}, 1, run="run", socket=tmp_path / "publish.sock")
    assert not leftovers(tmp_path)


def test_a_steady_but_slow_publish_ends_at_its_deadline_too(tmp_path: Path) -> None:
    with agent_process(tmp_path):
        began = time.monotonic()
        with pytest.raises(PublishTimeoutError):
            publish(
                big(1),
                1,
                run="run",
                timeout=0.5,
                socket=tmp_path / "publish.sock",
                progress=lambda done, total: time.sleep(0.1),
            )
        assert time.monotonic() - began < 2


def test_a_stopped_agent_is_not_waited_for_all_of_a_long_timeout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("weightsync_engine.publish.connection.CONNECT_SECONDS", 0.5)
    with agent_process(tmp_path) as agent:
        agent.send_signal(signal.SIGSTOP)
        with pytest.raises(AgentUnavailableError, match="is the agent stopped"):
            publish({"x": torch.ones(1)}, 1, timeout=100, socket=tmp_path / "publish.sock")


def test_an_agent_that_is_just_starting_is_waited_for(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        starting = threading.Timer(1.0, lambda: stack.enter_context(agent_process(tmp_path)))
        starting.start()
        publish({"x": torch.ones(1)}, 1, run="run", socket=tmp_path / "publish.sock")
        starting.join()


def test_a_file_that_may_not_grow_so_large_is_told_before_a_byte_is_sent(tmp_path: Path) -> None:
    with agent_process(tmp_path, file_limit=8_000_000):
        seen: list[int] = []
        with pytest.raises(PublishRefusedError, match="16,000,000 bytes") as refused:
            publish(
                big(1),
                1,
                run="run",
                socket=tmp_path / "publish.sock",
                progress=lambda done, total: seen.append(done),
            )
        assert refused.value.code is PublishCode.NO_SPACE
        assert not seen
        publish({"x": torch.ones(1)}, 1, run="run", socket=tmp_path / "publish.sock")
    assert not leftovers(tmp_path)


def test_who_waits_is_answered_by_the_agent_that_is_back(tmp_path: Path) -> None:
    async def play() -> PublishOutcome:
        store = VersionStore(tmp_path / "versions")
        first = PublishServer(tmp_path / "publish.sock", store)
        await first.start()
        waiting = asyncio.create_task(
            asyncio.to_thread(
                publish,
                {"x": torch.ones(1)},
                1,
                run="run",
                wait=True,
                timeout=30,
                socket=tmp_path / "publish.sock",
            )
        )
        await asyncio.to_thread(wait_for, lambda: first._waiting, 10, "the one who waits")
        await first.close()
        second = PublishServer(tmp_path / "publish.sock", VersionStore(tmp_path / "versions"))
        await second.start()
        second.tell(Fleet(VersionId("run", 1), None, 1, 1))
        try:
            return (await waiting).outcome
        finally:
            await second.close()

    assert asyncio.run(play()) is PublishOutcome.SERVING


# ---------------------------------------------------------------------------------------------- the trainer


@pytest.fixture
async def server(tmp_path: Path) -> Any:
    made = PublishServer(tmp_path / "publish.sock", VersionStore(tmp_path / "versions"))
    await made.start()
    yield made
    await made.close()


async def call(function: Any, *arguments: Any, **named: Any) -> Any:
    return await asyncio.to_thread(function, *arguments, **named)


async def until(condition: Any, what: str) -> None:
    await call(wait_for, condition, 10, what)


async def test_a_trainer_that_stalls_is_dropped_and_told(
    server: PublishServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "IDLE_SECONDS", 0.3)
    first = True

    def stall(done: int, total: int) -> None:
        nonlocal first
        if first:
            first = False
            wait_for(lambda: not leftovers(tmp_path), 10, "the half copy to go")

    with pytest.raises(AgentUnavailableError, match=r"waited for 0\.3 s"):
        await call(publish, big(1), 1, run="run", socket=tmp_path / "publish.sock", progress=stall)
    assert not server.source().versions


async def test_those_who_stop_waiting_leave_nothing_at_the_agent(
    server: PublishServer, tmp_path: Path
) -> None:
    for version in range(3):
        result = await call(
            publish,
            {"x": torch.ones(1)},
            version,
            run="run",
            wait=True,
            timeout=0.3,
            socket=tmp_path / "publish.sock",
        )
        assert result.outcome is PublishOutcome.PENDING
    # The publisher's own connection is what stays.
    await until(lambda: len(server._threads) == 1 and not server._waiting, "the others to be gone")


async def test_waiting_for_a_version_that_the_agent_has_lost_ends_at_once(
    server: PublishServer, tmp_path: Path
) -> None:
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(5)
        client.connect(str(tmp_path / "publish.sock"))
        lines = client.makefile("rb")
        lines.readline()
        client.sendall(b'{"type":"Wait","version":{"run":"nobody","version":3}}\n')
        answer = json.loads(await call(lines.readline))
    assert (answer["outcome"], answer["reason"]) == ("failed", "VersionNotRetained")


@pytest.mark.parametrize("there_is_one", [True, False], ids=["another publishes", "nobody publishes"])
async def test_a_refused_first_publish_makes_nobody_the_publisher(
    server: PublishServer, tmp_path: Path, there_is_one: bool
) -> None:
    if there_is_one:
        await call(publish, {"x": torch.ones(1)}, 5, run="run", socket=tmp_path / "publish.sock")
    else:
        # As an agent before this one left it.
        manifest = Manifest.from_lists(["x"], ["float32"], [[1]])
        before = server._store.begin(VersionId("run", 5), manifest)
        before.write(memoryview(bytes(manifest.nbytes)))
        before.seal()
    code = """
        import sys, torch
        from weightsync_engine import client
        print("started", flush=True)
        try:
            client.publish({"x": torch.ones(1)}, 1, run="run", socket=sys.argv[1])
        except client.PublishRefusedError as error:
            print(error.code, flush=True)
        sys.stdin.read()
    """
    with running(code, tmp_path / "publish.sock") as process:
        assert process.stdout is not None
        refused = await call(process.stdout.readline)
        assert refused == ("AnotherPublisher\n" if there_is_one else "VersionNotGrowing\n")
        assert server.source().connected is there_is_one
        # The one that was refused stays connected, and is not in the way.
        await call(publish, {"x": torch.ones(1)}, 6, run="run", socket=tmp_path / "publish.sock")
        # What it says at its end is not the publisher's word.
        assert process.stdin is not None
        process.stdin.close()
        await call(process.wait, 60)
        await until(lambda: len(server._threads) == 1, "it to be gone")
    assert server.source().connected
    assert not server.source().completed


async def test_two_threads_of_a_trainer_publish_one_after_the_other(
    server: PublishServer, tmp_path: Path
) -> None:
    results = await asyncio.gather(
        *(
            call(publish, big(number), number, run=f"run-{number}", socket=tmp_path / "publish.sock")
            for number in range(3)
        )
    )
    assert {result.version.version for result in results} == {0, 1, 2}
    assert len({result.digest for result in results}) == 3


FORKING = """
    import os, sys, time, torch
    from weightsync_engine import client
    print("started", flush=True)
    client.publish({"x": torch.ones(1)}, 1, run="run", socket=sys.argv[1])
    mine = client.default_run()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            client.publish({"x": torch.ones(1)}, 2, run="run", socket=sys.argv[1], timeout=10)
            said = "published"
        except client.PublishRefusedError as error:
            said = str(error.code)
        os.write(writer, f"{said} {client.default_run() != mine}".encode())
        time.sleep(600)
        os._exit(0)
    print(os.read(reader, 100).decode(), child, flush=True)
    client.publish({"x": torch.ones(1)}, 3, run="run", socket=sys.argv[1])
    print("published", flush=True)
    os.kill(os.getpid(), 9)
"""


async def test_a_forked_child_is_another_process_and_does_not_keep_its_parent_alive(
    server: PublishServer, tmp_path: Path
) -> None:
    with running(FORKING, tmp_path / "publish.sock") as process:
        assert process.stdout is not None
        said, other_run, child = (await call(process.stdout.readline)).split()
        try:
            assert (said, other_run) == ("AnotherPublisher", "True")
            assert await call(process.stdout.readline) == "published\n"
            process.wait(10)
            await until(lambda: not server.source().connected, "the parent to be seen gone")
            os.kill(int(child), 0)
        finally:
            os.kill(int(child), signal.SIGKILL)
    assert [each.version.version for each in server.source().versions] == [1, 3]


ENDING = """
    import sys, torch
    from weightsync_engine.client import publish
    print("started", flush=True)
    publish({"x": torch.ones(1)}, 1, run="run", socket=sys.argv[1])
    if sys.argv[2] == "raise":
        raise RuntimeError("out of memory, say")
"""


@pytest.mark.parametrize(("how", "completed"), [("return", True), ("raise", False)])
async def test_only_a_trainer_that_ends_well_has_completed_and_that_outlives_the_agent(
    server: PublishServer, tmp_path: Path, how: str, completed: bool
) -> None:
    with running(ENDING, tmp_path / "publish.sock", how) as process:
        await call(process.wait, 60)
    await until(lambda: not server.source().connected and not server._threads, "the trainer to be gone")
    assert server.source().completed is completed
    again = PublishServer(tmp_path / "other.sock", VersionStore(tmp_path / "versions"))
    try:
        assert again.source().completed is completed
    finally:
        again._listener.close()
    await call(publish, {"x": torch.ones(1)}, 2, run="run", socket=tmp_path / "publish.sock")
    assert not server.source().completed, "another trainer has begun"


@pytest.mark.parametrize("how", ["cut", "written"])
async def test_a_file_that_is_changed_meanwhile_is_refused_and_ends_nobody(
    server: PublishServer, tmp_path: Path, how: str
) -> None:
    path = tmp_path / "model.safetensors"
    save_file(big(1), path)

    def change(done: int, total: int) -> None:
        if how == "cut":
            os.truncate(path, 5_000_000)
        else:
            with path.open("r+b") as file:
                file.seek(12_000_000)
                file.write(b"other")

    with pytest.raises(PublishRefusedError, match="changed while") as refused:
        await call(publish_file, path, 1, run="run", socket=tmp_path / "publish.sock", progress=change)
    assert refused.value.code is PublishCode.BAD_FILE
    await until(lambda: not leftovers(tmp_path), "the half copy to go")
    assert not server.source().versions


async def test_an_exception_in_the_middle_is_the_callers_and_the_next_publish_works(
    server: PublishServer, tmp_path: Path
) -> None:
    def fail(done: int, total: int) -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        await call(publish, big(1), 1, run="run", socket=tmp_path / "publish.sock", progress=fail)
    await call(publish, big(2), 1, run="run", socket=tmp_path / "publish.sock")
    assert [each.version.version for each in server.source().versions] == [1]


@pytest.mark.parametrize(
    ("tensors", "why"),
    [
        pytest.param(torch.nn.Linear(2, 2), "state_dict", id="a module"),
        pytest.param([torch.ones(1)], "pairs", id="tensors without names"),
        pytest.param({"x": 3.0}, "'x' is a float", id="a number"),
        pytest.param({"x": None}, "'x' is a NoneType", id="nothing"),
        pytest.param({3: torch.ones(1)}, "3 is no name", id="a number for a name"),
        pytest.param({"x": torch.ones(1, device="meta")}, "meta device", id="meta"),
        pytest.param({"x": torch.eye(3).to_sparse()}, "to_dense", id="sparse"),
    ],
)
async def test_what_is_no_tensor_is_named(
    server: PublishServer, tmp_path: Path, tensors: Any, why: str
) -> None:
    with pytest.raises(TypeError, match=why):
        await call(publish, tensors, 1, socket=tmp_path / "publish.sock")


def test_a_trainer_needs_nothing_but_the_standard_library_and_the_contract() -> None:
    code = """
        import sys
        import weightsync_engine.client
        ours = {"weightsync_contract", "weightsync_engine", "__main__"}
        before = set(sys.argv[1].split(","))
        roots = {name.split(".")[0] for name in sys.modules} - before
        print(sorted(roots - set(sys.stdlib_module_names) - ours))
    """
    startup = subprocess.run(
        [sys.executable, "-c", "import sys; print(','.join({n.split('.')[0] for n in sys.modules}))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), startup], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("size", [10, 3_000_000], ids=["smaller", "larger"])
async def test_a_tensor_that_gets_another_size_meanwhile_is_named(
    server: PublishServer, tmp_path: Path, size: int
) -> None:
    tensors = big(1)

    def resize(done: int, total: int) -> None:
        tensors["t3"].data = torch.ones(size)

    with pytest.raises(RuntimeError, match="'t3' got another size"):
        await call(publish, tensors, 1, run="run", socket=tmp_path / "publish.sock", progress=resize)
    assert not server.source().versions
    await call(publish, tensors, 1, run="run", socket=tmp_path / "publish.sock")


async def test_a_view_that_torch_negates_lazily_is_published_as_it_reads(
    server: PublishServer, tmp_path: Path
) -> None:
    view = torch._neg_view(torch.arange(4.0))
    assert view.is_neg() and view.is_contiguous()
    lazy = await call(publish, {"x": view}, 1, run="a", socket=tmp_path / "publish.sock")
    plain = await call(publish, {"x": -torch.arange(4.0)}, 1, run="b", socket=tmp_path / "publish.sock")
    assert lazy.digest == plain.digest


async def test_versions_may_be_whole_numbers_of_other_libraries(
    server: PublishServer, tmp_path: Path
) -> None:
    step = numpy.int64(7)
    result = await call(publish, {"x": torch.ones(1)}, step, run="run", socket=tmp_path / "publish.sock")
    assert result.version == VersionId("run", 7)


@pytest.mark.parametrize("timeout", [0, -1.0, float("nan")])
def test_a_timeout_that_is_none_is_an_error_of_the_caller(tmp_path: Path, timeout: float) -> None:
    with pytest.raises(ValueError, match="timeout"):
        publish({"x": torch.ones(1)}, 1, timeout=timeout, socket=tmp_path / "publish.sock")
