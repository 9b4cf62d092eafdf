"""The agent's end of the session, against a small real WebSocket server."""

import asyncio
import json
import time
from contextlib import asynccontextmanager

import pytest
from aiohttp import WSMsgType, web

from weightsync_contract.frames import decode_from_agent, encode
from weightsync_contract.messages import (
    Desired,
    Hello,
    Nack,
    ObjectRef,
    Observed,
    PodRef,
    Refused,
    Released,
    Transfer,
    TransferState,
    Welcome,
)
from weightsync_contract.names import SESSION_PATH
from weightsync_contract.reasons import RefusalCode, Role
from weightsync_engine.agent import session as module
from weightsync_engine.agent.core.events import (
    DesiredReceived,
    ReleasedReceived,
    SessionClosed,
    SessionOpened,
)
from weightsync_engine.agent.session import Operator, Session

DESIRED = Desired(ObjectRef("n", "w", "u"), 1, 1)
SECONDS = 10.0


class FakeOperator:
    """Answers as its ``script`` says; remembers what agents sent."""

    def __init__(self):
        self.heard = []
        self.tokens = []
        self.sockets = []
        self.changed = asyncio.Event()
        self.script = self.welcome
        self.ping, self.dead = 5.0, 15.0
        self.url = ""

    async def welcome(self, socket):
        await socket.send_str(encode(Welcome(1, self.ping, self.dead)))

    async def handle(self, request):
        self.tokens.append(request.headers.get("Authorization"))
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        self.sockets.append(socket)
        self.changed.set()
        await self.script(socket)
        async for frame in socket:
            if frame.type is WSMsgType.TEXT:
                self.heard.append((time.monotonic(), decode_from_agent(frame.data)))
                self.changed.set()
        self.changed.set()
        return socket

    async def until(self, condition):
        async with asyncio.timeout(SECONDS):
            while not condition():
                self.changed.clear()
                await self.changed.wait()

    def messages(self, kind):
        return [message for _, message in self.heard if isinstance(message, kind)]

    def times(self, kind):
        return [at for at, message in self.heard if isinstance(message, kind)]


@asynccontextmanager
async def serve(operator):
    app = web.Application()
    app.router.add_get(SESSION_PATH, operator.handle)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    operator.address = "{}:{}".format(*runner.addresses[0])
    operator.url = f"ws://{operator.address}"
    try:
        yield operator
    finally:
        await runner.cleanup()


class Agent:
    def __init__(self, url, token_file):
        self.events = []
        self.happened = asyncio.Event()
        self.term = 4
        self.session = Session(Operator(url, token_file), self.hello, self.post)

    def hello(self):
        return Hello(1, 1, PodRef("n", "p", "uid"), Role.INFERENCE, "i", self.term)

    def post(self, event):
        self.events.append(event)
        self.happened.set()

    async def until(self, condition):
        async with asyncio.timeout(SECONDS):
            while not condition(self.events):
                self.happened.clear()
                await self.happened.wait()


@pytest.fixture
def token_file(tmp_path):
    path = tmp_path / "token"
    path.write_text("secret-1\n")
    return path


@pytest.fixture
async def operator():
    async with serve(FakeOperator()) as operator:
        yield operator


@pytest.fixture
async def agent(operator, token_file):
    agent = Agent(operator.url, token_file)
    task = asyncio.create_task(agent.session.run())
    yield agent
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def seen(bytes_=0, state=TransferState.JOINED, seq=1):
    return Observed(1, seq, 1, 1, Transfer(state, 1, bytes=bytes_))


async def test_an_agent_says_who_it_is_and_what_it_is(operator, agent):
    agent.session.report(seen())
    await operator.until(lambda: operator.messages(Observed))
    hello, observed = [message for _, message in operator.heard]
    assert (hello.pod.uid, hello.term, hello.role) == ("uid", 4, Role.INFERENCE)
    assert observed == seen()
    assert operator.tokens == ["Bearer secret-1"]
    assert agent.events == [SessionOpened()]


async def test_what_the_operator_wants_is_heard(operator, agent):
    await agent.until(lambda events: events)
    await operator.sockets[0].send_str(encode(DESIRED))
    await operator.sockets[0].send_str(encode(DESIRED))
    await operator.sockets[0].send_str(encode(Released(1)))
    await agent.until(lambda events: len(events) == 4)
    assert agent.events[1:] == [DesiredReceived(DESIRED)] * 2 + [ReleasedReceived(Released(1))]


async def test_a_lost_session_is_dialled_again_with_the_present_token_and_everything(
    operator, agent, token_file
):
    agent.session.report(seen())
    await operator.until(lambda: operator.messages(Observed))
    token_file.write_text("secret-2")
    agent.term = 5
    await operator.sockets[0].close()
    await operator.until(lambda: len(operator.messages(Observed)) == 2)
    assert operator.tokens == ["Bearer secret-1", "Bearer secret-2"]
    assert operator.messages(Hello)[1].term == 5
    assert agent.events == [SessionOpened(), SessionClosed(), SessionOpened()]


async def test_only_the_newest_report_is_sent(operator, agent):
    blocked = asyncio.Event()

    async def late(socket):
        await blocked.wait()
        await operator.welcome(socket)

    operator.script = late
    for number in range(50):
        agent.session.report(seen(seq=number))
    blocked.set()
    await operator.until(lambda: operator.messages(Observed))
    assert [message.seq for message in operator.messages(Observed)] == [49]


async def test_progress_is_told_once_a_second_and_a_change_at_once(operator, agent, monkeypatch):
    monkeypatch.setattr(module, "PROGRESS_SECONDS", 1.0)
    agent.session.report(seen(0, TransferState.RECEIVING))
    await operator.until(lambda: operator.messages(Observed))
    for number in range(1, 8):
        agent.session.report(seen(number, TransferState.RECEIVING))
        await asyncio.sleep(0.05)
    changed_at = time.monotonic()
    agent.session.report(seen(8, TransferState.STAGED))
    await operator.until(lambda: operator.messages(Observed)[-1].transfer.state is TransferState.STAGED)
    assert operator.times(Observed)[-1] - changed_at < 0.2
    assert len(operator.messages(Observed)) == 2
    agent.session.report(seen(9, TransferState.RECEIVING))
    await operator.until(lambda: len(operator.messages(Observed)) == 3)
    agent.session.report(seen(10, TransferState.RECEIVING))
    await operator.until(lambda: len(operator.messages(Observed)) == 4)
    times = operator.times(Observed)
    assert times[3] - times[2] > 0.9


async def test_silence_is_filled_with_the_state(operator, agent):
    operator.ping = 0.2
    agent.session.report(seen())
    await operator.until(lambda: len(operator.messages(Observed)) == 3)
    times = operator.times(Observed)
    assert 0.15 < times[1] - times[0] < 1.0
    assert set(operator.messages(Observed)) == {seen()}


async def test_a_silent_operator_is_left(operator, agent):
    operator.dead = 0.5
    agent.session.report(seen())
    await agent.until(lambda events: SessionClosed() in events)
    await operator.until(lambda: len(operator.sockets) == 2)


async def test_in_a_transfer_patience_is_shorter(operator, agent, monkeypatch):
    monkeypatch.setattr(module, "TRANSFER_DEAD_SECONDS", 1.0)
    agent.session.report(seen(0, TransferState.RECEIVING))
    began = time.monotonic()
    await agent.until(lambda events: SessionClosed() in events)
    assert 0.9 < time.monotonic() - began < 3.5


async def test_an_operator_that_speaks_is_not_left(operator, agent):
    operator.dead = 0.6
    agent.session.report(seen())
    await agent.until(lambda events: events)
    for _ in range(10):
        await operator.sockets[0].send_str(encode(DESIRED))
        await asyncio.sleep(0.15)
    assert SessionClosed() not in agent.events


async def test_a_follower_names_the_leader_and_is_believed_once(operator, token_file):
    async with serve(FakeOperator()) as follower:

        async def refuse(socket):
            await socket.send_str(encode(Refused(RefusalCode.NOT_LEADER, "not I", operator.address)))

        follower.script = refuse
        agent = Agent(follower.url, token_file)
        task = asyncio.create_task(agent.session.run())
        try:
            began = time.monotonic()
            await agent.until(lambda events: SessionOpened() in events)
            assert time.monotonic() - began < 0.5
            assert (len(follower.sockets), len(operator.sockets)) == (1, 1)
            await operator.sockets[0].close()
            await agent.until(lambda events: len(events) == 3)
            assert (len(follower.sockets), len(operator.sockets)) == (2, 2), "the Service is asked again"
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def test_two_followers_that_name_each_other_are_not_asked_in_a_loop(operator, token_file):
    async def refuse(socket):
        await socket.send_str(encode(Refused(RefusalCode.NOT_LEADER, "not I", operator.address)))

    operator.script = refuse
    agent = Agent(operator.url, token_file)
    task = asyncio.create_task(agent.session.run())
    await asyncio.sleep(1.0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert len(operator.sockets) < 14


@pytest.mark.parametrize("code", [RefusalCode.WRONG_POD, RefusalCode.TOKEN_INVALID, RefusalCode.REPLACED])
async def test_a_refused_agent_tries_again_later(operator, token_file, monkeypatch, code):
    monkeypatch.setattr(module, "REDIAL_SECONDS", (0.1, 0.3))

    async def refuse(socket):
        await socket.send_str(encode(Refused(code, "no")))

    operator.script = refuse
    agent = Agent(operator.url, token_file)
    task = asyncio.create_task(agent.session.run())
    await operator.until(lambda: len(operator.sockets) >= 2)
    operator.script = operator.welcome
    await agent.until(lambda events: SessionOpened() in events)
    assert agent.events == [SessionOpened()], "a session that was refused was never open"
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_a_malformed_frame_ends_the_session(operator, agent):
    await agent.until(lambda events: events)
    await operator.sockets[0].send_str(json.dumps({"type": "desired", "term": "one"}))
    await agent.until(lambda events: SessionClosed() in events)
    assert not any(isinstance(event, DesiredReceived) for event in agent.events)


async def test_an_oversized_frame_ends_the_session(operator, agent):
    await agent.until(lambda events: events)
    await operator.sockets[0].send_str("x" * (300 * 1024))
    await agent.until(lambda events: SessionClosed() in events)


async def test_a_nack_is_sent(operator, agent):
    await agent.until(lambda events: events)
    nack = Nack(5, 1, RefusalCode.STALE_TERM, "term 4, but term 5 was obeyed")
    agent.session.nack(nack)
    await operator.until(lambda: operator.messages(Nack) == [nack])


async def test_no_token_and_no_operator_are_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "REDIAL_SECONDS", (0.05, 0.1))
    agent = Agent("ws://127.0.0.1:9", tmp_path / "token")
    task = asyncio.create_task(agent.session.run())
    await asyncio.sleep(0.3)
    (tmp_path / "token").write_text("t")
    await asyncio.sleep(0.3)
    assert not task.done()
    assert agent.events == []
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_a_peer_that_accepts_and_says_nothing_is_left(monkeypatch, token_file):
    monkeypatch.setattr(module, "DIAL_SECONDS", 0.3)
    monkeypatch.setattr(module, "REDIAL_SECONDS", (0.05, 0.1))
    dialled, often = [], asyncio.Event()

    async def silent(reader, writer):
        dialled.append(writer)
        if len(dialled) == 3:
            often.set()
        await reader.read()
        writer.close()

    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    agent = Agent(f"ws://127.0.0.1:{port}", token_file)
    task = asyncio.create_task(agent.session.run())
    await asyncio.wait_for(often.wait(), SECONDS)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    server.close()
    await server.wait_closed()


async def test_an_operator_that_does_not_welcome_is_left(operator, token_file, monkeypatch):
    monkeypatch.setattr(module, "DIAL_SECONDS", 0.3)

    async def silent(socket):
        pass

    operator.script = silent
    agent = Agent(operator.url, token_file)
    task = asyncio.create_task(agent.session.run())
    await operator.until(lambda: len(operator.sockets) == 2)
    assert agent.events == []
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def test_redials_are_spread():
    pauses = [module._backoff(20, None) for _ in range(200)]
    assert min(pauses) < 1
    assert max(pauses) > 4
    assert all(0.1 <= pause <= 5.0 for pause in pauses)
    assert all(module._backoff(1, None) <= 0.2 for _ in range(50))
