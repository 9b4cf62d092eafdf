"""What the agent makes of a client that is not ours: everything is checked at its border, nothing half is kept."""

import asyncio
import json
import mmap
import os
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from weightsync_contract.manifest import Manifest
from weightsync_contract.reasons import PublishCode
from weightsync_demo.waiting import wait_for
from weightsync_engine.publish.channel import Channel, ChannelClosedError, Deadline
from weightsync_engine.publish.protocol import (
    FROM_AGENT,
    MAX_DESCRIPTION_BYTES,
    PROTOCOL,
    Accepted,
    Begin,
    Filled,
    Greeting,
    Ready,
    Refused,
    Seal,
    Taken,
)
from weightsync_engine.publish.server import SLOT_BYTES, PublishServer
from weightsync_engine.publish.store import VersionStore

SOON = 10.0
MANIFEST = Manifest.from_lists(["x"], ["uint8"], [[3 * SLOT_BYTES]])
LISTS = {"names": ["x"], "dtypeNames": ["uint8"], "shapes": [[3 * SLOT_BYTES]]}


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[PublishServer]:
    made = PublishServer(tmp_path / "publish.sock", VersionStore(tmp_path / "versions"))
    await made.start()
    yield made
    await made.close()
    assert not list((tmp_path / "versions").glob(".writing-*"))


class Client:
    """Says what it likes."""

    def __init__(self, directory: Path) -> None:
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(str(directory / "publish.sock"))
        self.channel = Channel(connection, FROM_AGENT)
        try:
            assert self.hear() == Greeting(PROTOCOL)
        except BaseException:
            self.channel.close()
            raise

    def say(self, message: Any) -> None:
        self.channel.send(message, Deadline(SOON))

    def hear(self) -> Any:
        return self.channel.receive(Deadline(SOON))

    def begin(self, lists: Any = LISTS, *, version: Any = 1, run: str = "run") -> Any:
        data = lists if isinstance(lists, bytes) else json.dumps(lists).encode()
        self.say(Begin(run, version, len(data), "process", os.getpid()))
        self.channel.send_bytes(data, Deadline(SOON))
        return self.hear()


async def play(directory: Path, script: Callable[[Client], Any]) -> Any:
    def run() -> Any:
        client = Client(directory)
        try:
            return script(client)
        finally:
            client.channel.close()

    return await asyncio.to_thread(run)


@pytest.mark.parametrize(
    ("lists", "code"),
    [
        pytest.param({**LISTS, "dtypeNames": []}, PublishCode.UNEQUAL_LENGTHS, id="dtypes missing"),
        pytest.param({**LISTS, "shapes": [[1], [2]]}, PublishCode.UNEQUAL_LENGTHS, id="a shape too many"),
        pytest.param({**LISTS, "dtypeNames": ["float7"]}, PublishCode.UNKNOWN_DTYPE, id="dtype"),
        pytest.param({**LISTS, "shapes": [[-1]]}, PublishCode.BAD_SHAPE, id="shape"),
        pytest.param({**LISTS, "names": [""]}, PublishCode.BAD_NAME, id="name"),
        pytest.param(
            {"names": ["x", "x"], "dtypeNames": ["int8"] * 2, "shapes": [[1]] * 2},
            PublishCode.DUPLICATE_NAME,
            id="twice",
        ),
        pytest.param({"names": [], "dtypeNames": [], "shapes": []}, PublishCode.EMPTY, id="nothing"),
        pytest.param({**LISTS, "shapes": [[1 << 45, 1 << 45]]}, PublishCode.TOO_LARGE, id="beyond machines"),
        pytest.param({**LISTS, "shapes": [[1 << 49]]}, PublishCode.NO_SPACE, id="beyond this machine"),
        pytest.param({**LISTS, "names": [5]}, PublishCode.MALFORMED, id="a number for a name"),
        pytest.param({"names": []}, PublishCode.MALFORMED, id="lists missing"),
        pytest.param(b"nonsense", PublishCode.MALFORMED, id="no JSON"),
        pytest.param(b"[" * 50_000, PublishCode.MALFORMED, id="nesting"),
    ],
)
async def test_tensors_that_cannot_be_published_are_refused_and_the_conversation_goes_on(
    server: PublishServer, tmp_path: Path, lists: Any, code: PublishCode
) -> None:
    def script(client: Client) -> None:
        refused = client.begin(lists)
        assert isinstance(refused, Refused)
        assert refused.code is code
        assert isinstance(client.begin(), Ready)

    await play(tmp_path, script)
    assert server.source().versions == ()
    assert not server.source().connected


@pytest.mark.parametrize(
    ("run", "version", "code"),
    [
        ("..", 1, None),
        ("a/b", 1, PublishCode.BAD_RUN),
        ("", 1, PublishCode.BAD_RUN),
        ("x" * 64, 1, PublishCode.BAD_RUN),
        ("run\n", 1, PublishCode.BAD_RUN),
        ("run", -1, PublishCode.BAD_VERSION),
        ("run", 1 << 63, PublishCode.BAD_VERSION),
        ("run", (1 << 63) - 1, None),
    ],
)
async def test_an_identity_is_checked_too(
    server: PublishServer, tmp_path: Path, run: str, version: int, code: PublishCode | None
) -> None:
    answer = await play(tmp_path, lambda client: client.begin(run=run, version=version))
    assert (answer.code if isinstance(answer, Refused) else None) is code


@pytest.mark.parametrize(
    "words",
    [
        pytest.param([Seal()], id="sealed before the first byte"),
        pytest.param([Filled(SLOT_BYTES), Seal()], id="sealed in the middle"),
        pytest.param([Filled(SLOT_BYTES + 1)], id="more than a slot"),
        pytest.param([Filled(0)], id="nothing"),
        pytest.param([Filled(-1)], id="less than nothing"),
        pytest.param([Filled(SLOT_BYTES)] * 3 + [Filled(1)], id="more than the image"),
        pytest.param([Begin("run", 2, 0, "process", 1)], id="another begin"),
    ],
)
async def test_an_image_that_is_not_what_was_described_is_dropped(
    server: PublishServer, tmp_path: Path, words: list[Any]
) -> None:
    def script(client: Client) -> Any:
        assert isinstance(client.begin(), Ready)
        for word in words:
            client.say(word)
        while isinstance(answer := client.hear(), Taken):
            pass
        with pytest.raises(ChannelClosedError):
            client.hear()
        return answer

    answer = await play(tmp_path, script)
    assert isinstance(answer, Refused)
    assert answer.code is PublishCode.MALFORMED
    assert "not what comes next" in answer.message
    assert server.source().versions == ()


@pytest.mark.parametrize("length", [-1, MAX_DESCRIPTION_BYTES + 1])
async def test_a_description_of_no_sound_length_is_not_waited_for(
    server: PublishServer, tmp_path: Path, length: int
) -> None:
    def script(client: Client) -> Any:
        client.say(Begin("run", 1, length, "process", 1))
        return client.hear()

    answer = await play(tmp_path, script)
    assert answer.code is PublishCode.MALFORMED


async def test_what_a_client_does_to_the_slots_later_changes_nothing(
    server: PublishServer, tmp_path: Path
) -> None:
    """It keeps the memory and goes on writing there: the stored bytes are those of the digest all the same."""

    def script(client: Client) -> Any:
        ready = client.begin()
        fd = client.channel.take_fd()
        with pytest.raises(OSError, match="not permitted"):
            os.ftruncate(fd, 1)
        memory = mmap.mmap(fd, ready.slots * ready.slot_bytes)
        for number in range(3):
            start = number % ready.slots * SLOT_BYTES
            memory[start : start + SLOT_BYTES] = bytes([number + 1]) * SLOT_BYTES
            client.say(Filled(SLOT_BYTES))
            assert client.hear() == Taken()
            memory[:] = b"\xee" * len(memory)
        client.say(Seal())
        answer = client.hear()
        memory[:] = b"\xff" * len(memory)
        return answer

    accepted = await play(tmp_path, script)
    assert isinstance(accepted, Accepted)
    (published,) = server.source().versions
    assert published.digest == accepted.digest
    with VersionStore(tmp_path / "versions").open(published.version) as stored:
        image = os.pread(stored.fd, stored.manifest.nbytes, 0)
    assert image == b"".join(bytes([number]) * SLOT_BYTES for number in (1, 2, 3))


async def test_so_many_connections_at_most(
    server: PublishServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("weightsync_engine.publish.server.MAX_CONNECTIONS", 2)
    first, second = Client(tmp_path), Client(tmp_path)
    with pytest.raises(ChannelClosedError):
        await asyncio.to_thread(Client, tmp_path)
    first.channel.close()
    await asyncio.to_thread(wait_for, lambda: len(server._threads) == 1, SOON, "the first to be gone")
    third = await asyncio.to_thread(Client, tmp_path)
    for client in (second, third):
        client.channel.close()
