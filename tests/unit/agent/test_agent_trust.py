"""Whom an agent takes for its operator, and what it says when it takes it for nobody."""

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from aiohttp import WSMsgType, web

from weightsync_contract.frames import encode
from weightsync_contract.messages import Hello, PodRef, Welcome
from weightsync_contract.names import SESSION_PATH
from weightsync_contract.reasons import Role
from weightsync_engine.agent import session as module
from weightsync_engine.agent.core.events import Event, SessionOpened
from weightsync_engine.agent.session import Operator, Session
from weightsync_engine.agent.trust import TrustError, context_of
from weightsync_operator.pki.certificates import issue, make_ca
from weightsync_operator.pki.core import Ca
from weightsync_operator.pki.serving import Serving
from weightsync_operator.pki.times import PkiTimes

TIMES = PkiTimes()
NOW = datetime.now(UTC)
SECONDS = 10.0


def serving(ca: Ca, address: str = "127.0.0.1", made_at: datetime = NOW) -> Serving:
    made = Serving()
    leaf = issue(ca, ["op"], [address], made_at, TIMES)
    made.take(leaf.certificate, leaf.key)
    return made


@asynccontextmanager
async def operator(tls: ssl.SSLContext | None) -> AsyncIterator[str]:
    """Welcomes everybody; answers where, without the scheme."""

    async def handle(request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        await socket.send_str(encode(Welcome(1, 5.0, 15.0)))
        async for frame in socket:
            assert frame.type is WSMsgType.TEXT
        return socket

    app = web.Application()
    app.router.add_get(SESSION_PATH, handle)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls).start()
    try:
        yield "{}:{}".format(*runner.addresses[0])
    finally:
        await runner.cleanup()


def put(bundle: Path, text: str) -> None:
    bundle.write_text(text)


class Agent:
    def __init__(self, url: str, token: Path, bundle: Path | None) -> None:
        self.events: list[Event] = []
        hello = Hello(1, 1, PodRef("n", "p", "uid"), Role.INFERENCE, "i", 1)
        self.session = Session(Operator(url, token, bundle), lambda: hello, self.events.append)

    @property
    def opened(self) -> bool:
        return any(isinstance(each, SessionOpened) for each in self.events)


Dial = Callable[[str], Agent]


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return tmp_path / "ca.crt"


@pytest.fixture
async def dial(tmp_path: Path, bundle: Path) -> AsyncIterator[Dial]:
    token = tmp_path / "token"
    token.write_text("secret")
    tasks = []

    def start(url: str) -> Agent:
        agent = Agent(url, token, bundle)
        tasks.append(asyncio.create_task(agent.session.run()))
        return agent

    yield start
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Why there was no session."""
    texts: list[str] = []

    class Log:
        def info(self, _: str, **__: object) -> None: ...

        def warning(self, _: str, *, why: str) -> None:
            texts.append(why)

    monkeypatch.setattr(module, "log", Log())
    return texts


async def until(condition: Callable[[], object]) -> None:
    deadline = asyncio.get_running_loop().time() + SECONDS
    while not condition():
        assert asyncio.get_running_loop().time() < deadline
        await asyncio.sleep(0.01)


async def test_a_bundle_that_comes_later_is_read(dial: Dial, bundle: Path, said: list[str]) -> None:
    ca = make_ca(NOW, TIMES)
    async with operator(serving(ca).context) as address:
        agent = dial(f"wss://{address}")
        await until(lambda: said)
        assert f"{bundle} is not there: the operator writes the ConfigMap weightsync-ca" in said[-1]
        put(bundle, "")
        await until(lambda: "is empty" in said[-1])
        put(bundle, "nothing")
        await until(lambda: "holds no certificates" in said[-1])
        put(bundle, make_ca(NOW, TIMES).certificate)
        await until(lambda: "has signed it" in said[-1])
        assert not agent.opened
        put(bundle, ca.certificate)
        await until(lambda: agent.opened)


async def test_a_name_that_the_certificate_has_not(dial: Dial, bundle: Path, said: list[str]) -> None:
    ca = make_ca(NOW, TIMES)
    put(bundle, ca.certificate)
    async with operator(serving(ca, "10.1.2.3").context) as address:
        dial(f"wss://{address}")
        await until(lambda: said)
    assert "--session-service names" in said[0]


@pytest.mark.parametrize(
    ("made_at", "word"),
    [(NOW - timedelta(days=2), "it has ended"), (NOW + timedelta(hours=1), "not valid yet")],
)
async def test_a_certificate_at_another_time(
    dial: Dial, bundle: Path, said: list[str], made_at: datetime, word: str
) -> None:
    ca = make_ca(NOW - timedelta(days=3), TIMES)
    put(bundle, ca.certificate)
    async with operator(serving(ca, made_at=made_at).context) as address:
        dial(f"wss://{address}")
        await until(lambda: said)
    assert word in said[0]


async def test_an_operator_without_a_certificate_yet(dial: Dial, bundle: Path, said: list[str]) -> None:
    put(bundle, make_ca(NOW, TIMES).certificate)
    async with operator(Serving().context) as address:
        dial(f"wss://{address}")
        await until(lambda: said)
    assert "While an operator has no certificate it takes nobody" in said[0]


async def test_an_operator_without_tls(dial: Dial, bundle: Path, said: list[str]) -> None:
    put(bundle, make_ca(NOW, TIMES).certificate)
    async with operator(None) as address:
        dial(f"wss://{address}")
        await until(lambda: said)
    assert f"wss://{address} speaks no TLS" in said[0]


async def test_plain_words_to_an_operator_with_tls(dial: Dial, said: list[str]) -> None:
    async with operator(serving(make_ca(NOW, TIMES)).context) as address:
        agent = dial(f"ws://{address}")
        await until(lambda: said)
        assert "it takes wss:// only" in said[0]
        assert not agent.opened


def test_an_empty_bundle_never_means_everybody(bundle: Path) -> None:
    put(bundle, "\n")
    with pytest.raises(TrustError, match="is empty"):
        context_of(bundle)
    assert context_of(None).get_ca_certs() == ssl.create_default_context().get_ca_certs()
