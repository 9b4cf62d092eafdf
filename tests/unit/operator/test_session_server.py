"""The session over a real WebSocket: refusals say why, the newest connection counts, states conflate.

The API server is stood in for here by functions; tests/integration has the real one.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
from aiohttp import ClientSession, ClientWebSocketResponse, WSMsgType, web
from aiohttp.test_utils import TestServer

from weightsync_contract.messages import (
    Desired,
    ObjectRef,
    Phase,
    Released,
    Transfer,
    TransferState,
    VersionId,
    Wanted,
)
from weightsync_contract.names import LABEL_ROLE, MAX_FRAME_BYTES, SESSION_PATH
from weightsync_operator.core.model import PodView
from weightsync_operator.kube.errors import UnavailableError
from weightsync_operator.kube.reviews import User
from weightsync_operator.session.auth import Authenticator
from weightsync_operator.session.connection import KeepAlive
from weightsync_operator.session.registry import Registry
from weightsync_operator.session.server import Leadership, SessionServer

POD = PodView(uid="uid-1", namespace="default", name="vllm-0", labels=((LABEL_ROLE, "inference"),))
USER = User(
    "system:serviceaccount:default:default",
    extra={
        "authentication.kubernetes.io/pod-name": ["vllm-0"],
        "authentication.kubernetes.io/pod-uid": ["uid-1"],
    },
)
HELLO: dict[str, Any] = {
    "type": "hello",
    "protocolMin": 1,
    "protocolMax": 1,
    "pod": {"namespace": "default", "name": "vllm-0", "uid": "uid-1"},
    "role": "inference",
    "incarnation": "one",
    "term": 0,
}
OBSERVED: dict[str, Any] = {"type": "observed", "term": 0, "seq": 0, "highestTerm": 0, "ranks": 1}
USUAL = KeepAlive()
WANTED = Desired(weightsync=ObjectRef("default", "policy", "ws-1"), term=3, seq=0)


class Operator:
    """A session server with everything around it replaced by attributes."""

    def __init__(self) -> None:
        self.user: User | None = USER
        self.review_fails = False
        self.pods = {POD.uid: POD}
        self.leadership = Leadership(ready=True)
        self.may_send = True
        self.changes: list[tuple[str, bool]] = []
        self.changed = asyncio.Event()
        self.registry = Registry(self._on_change)
        self.url = ""

    def _on_change(self, namespace: str, only_bytes: bool) -> None:
        self.changes.append((namespace, only_bytes))
        self.changed.set()

    async def review(self, token: str, audience: str) -> User | None:
        assert (token, audience) == ("good", "weightsync")
        if self.review_fails:
            raise UnavailableError("POST tokenreviews: 503")
        return self.user

    async def find_pod(self, namespace: str, uid: str) -> PodView | None:
        return self.pods.get(uid)

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(3):
            while not condition():
                self.changed.clear()
                await self.changed.wait()


@asynccontextmanager
async def serving(keep_alive: KeepAlive = USUAL) -> AsyncIterator[Operator]:
    operator = Operator()
    app = web.Application()
    SessionServer(
        operator.registry,
        Authenticator(operator.review, operator.find_pod),
        lambda: operator.leadership,
        lambda: operator.may_send,
        keep_alive,
    ).add_routes(app)
    async with TestServer(app) as server:
        operator.url = str(server.make_url(SESSION_PATH))
        yield operator


@asynccontextmanager
async def dialled(operator: Operator, token: str = "good") -> AsyncIterator[ClientWebSocketResponse]:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    async with ClientSession() as http, http.ws_connect(operator.url, headers=headers) as socket:
        yield socket


async def receive(socket: ClientWebSocketResponse, seconds: float = 3) -> dict[str, Any]:
    document: dict[str, Any] = await socket.receive_json(timeout=seconds)
    return document


async def welcomed(socket: ClientWebSocketResponse, **hello: Any) -> None:
    await socket.send_json({**HELLO, **hello})
    assert (await receive(socket))["type"] == "welcome"


async def refusal(socket: ClientWebSocketResponse, seconds: float = 3) -> dict[str, Any]:
    """The refusal, after which the socket must be closed."""
    while (document := await receive(socket, seconds))["type"] != "refused":
        pass
    assert (await socket.receive(timeout=3)).type in (WSMsgType.CLOSE, WSMsgType.CLOSED)
    return document


async def test_a_session_opens_and_both_states_flow() -> None:
    async with serving() as operator, dialled(operator) as socket:
        await socket.send_json(HELLO)
        welcome = await receive(socket)
        assert welcome == {"type": "welcome", "protocol": 1, "pingSeconds": 5.0, "deadSeconds": 15.0}
        operator.registry.ask("uid-1", WANTED)
        desired = await receive(socket)
        assert (desired["type"], desired["term"], desired["seq"]) == ("desired", 3, 1)
        await socket.send_json({**OBSERVED, "term": 3, "seq": 1, "highestTerm": 3})
        await operator.until(lambda: operator.registry.views()["uid-1"].observed is not None)
        observed = operator.registry.views()["uid-1"].observed
        assert observed is not None and (observed.term, observed.seq) == (3, 1)
    await operator.until(lambda: not operator.registry.views()["uid-1"].connected)


Break = Callable[[Operator, dict[str, Any]], None]
REFUSED: dict[str, tuple[Break, str, str]] = {
    "expired or foreign token": (lambda o, _: setattr(o, "user", None), "TokenInvalid", "expired, revoked"),
    "API server away": (lambda o, _: setattr(o, "review_fails", True), "TokenReviewUnavailable", "503"),
    "token of no pod": (
        lambda o, _: setattr(o, "user", replace(USER, extra={})),
        "WrongPod",
        "is bound to no pod: use a projected serviceAccountToken",
    ),
    "another pod's uid": (lambda _, h: h["pod"].update(uid="uid-2"), "WrongPod", "default/vllm-0/uid-1"),
    "another pod's name": (lambda _, h: h["pod"].update(name="vllm-1"), "WrongPod", "default/vllm-1/uid-1"),
    "another namespace": (lambda _, h: h["pod"].update(namespace="x"), "WrongPod", "x/vllm-0/uid-1"),
    "no such pod": (lambda o, _: o.pods.clear(), "UnknownPod", "label the pod with its role"),
    "another role": (
        lambda _, h: h.update(role="trainer"),
        "WrongPod",
        "started as trainer: make them equal",
    ),
    "older protocol": (
        lambda _, h: h.update(protocolMin=0, protocolMax=0),
        "ProtocolUnsupported",
        "upgrade the older one",
    ),
    "newer protocol": (lambda _, h: h.update(protocolMin=2, protocolMax=9), "ProtocolUnsupported", "2 to 9"),
    "missing field": (lambda _, h: h.pop("incarnation"), "FrameMalformed", "$.incarnation: missing"),
    "wrong type": (lambda _, h: h.update(term="1"), "FrameMalformed", "$.term: expected int"),
    "no hello": (
        lambda _, h: (h.clear(), h.update(OBSERVED)),
        "FrameMalformed",
        "the first frame must be a hello",
    ),
    "unknown type": (lambda _, h: h.update(type="hi"), "FrameMalformed", "is none of hello"),
    "follower": (
        lambda o, _: setattr(o, "leadership", Leadership(False, "10.0.0.7:8443")),
        "NotLeader",
        "dial the leader",
    ),
}


@pytest.mark.parametrize(("spoil", "code", "sentence"), list(REFUSED.values()), ids=list(REFUSED))
async def test_a_refusal_says_why(spoil: Break, code: str, sentence: str) -> None:
    async with serving() as operator, dialled(operator) as socket:
        hello = json.loads(json.dumps(HELLO))
        spoil(operator, hello)
        await socket.send_json(hello)
        refused = await refusal(socket)
        assert refused["code"] == code
        assert sentence in refused["message"]
        assert operator.registry.views() == {}
        assert refused["address"] == ("10.0.0.7:8443" if code == "NotLeader" else "")


async def test_no_token_is_refused() -> None:
    async with serving() as operator, dialled(operator, token="") as socket:
        await socket.send_json(HELLO)
        refused = await refusal(socket)
        assert (refused["code"], refused["message"][:15]) == ("TokenInvalid", "no bearer token")


Spoken = Callable[[ClientWebSocketResponse], Awaitable[None]]
BAD_FRAMES: dict[str, tuple[Spoken, str]] = {
    "no JSON": (lambda s: s.send_str("{"), "FrameMalformed"),
    "deep JSON": (lambda s: s.send_str("[" * 100_000), "FrameMalformed"),
    "binary": (lambda s: s.send_bytes(b"{}"), "FrameMalformed"),
    "a second hello": (lambda s: s.send_json(HELLO), "FrameMalformed"),
    "oversized": (lambda s: s.send_str(" " * (MAX_FRAME_BYTES + 1)), "FrameTooLarge"),
}


@pytest.mark.parametrize(("speak", "code"), list(BAD_FRAMES.values()), ids=list(BAD_FRAMES))
async def test_a_bad_frame_ends_the_session_with_its_reason(speak: Spoken, code: str) -> None:
    async with serving() as operator, dialled(operator) as socket:
        await welcomed(socket)
        await speak(socket)
        assert (await refusal(socket))["code"] == code
        await operator.until(lambda: not operator.registry.views()["uid-1"].connected)


async def test_a_frame_beyond_all_bounds_is_not_even_read() -> None:
    async with serving() as operator, dialled(operator) as socket:
        await welcomed(socket)
        await socket.send_str(" " * (5 * MAX_FRAME_BYTES))
        closed = await socket.receive(timeout=3)
        assert (closed.type, closed.data) == (WSMsgType.CLOSE, 1009)


async def test_the_largest_frame_is_taken() -> None:
    async with serving() as operator, dialled(operator) as socket:
        await welcomed(socket)
        frame = json.dumps(OBSERVED)
        await socket.send_str(frame + " " * (MAX_FRAME_BYTES - len(frame)))
        await operator.until(lambda: operator.registry.views()["uid-1"].observed is not None)


async def test_the_newest_connection_of_a_pod_counts() -> None:
    async with serving() as operator, dialled(operator) as older, dialled(operator) as newer:
        await welcomed(older)
        await welcomed(newer)
        assert (await refusal(older))["code"] == "Replaced"
        operator.registry.ask("uid-1", WANTED)
        assert (await receive(newer))["type"] == "desired"
        await asyncio.sleep(0.05)
        assert operator.registry.views()["uid-1"].connected


async def test_another_process_of_the_pod_counts_once_it_has_reported() -> None:
    async with serving() as operator:
        async with dialled(operator) as socket:
            await welcomed(socket)
            await socket.send_json(OBSERVED)
            await operator.until(lambda: operator.registry.views()["uid-1"].observed is not None)
        async with dialled(operator) as socket:
            await welcomed(socket)
            view = operator.registry.views()["uid-1"]
            assert (view.connected, view.observed is not None) == (True, True)
        async with dialled(operator) as socket:
            await welcomed(socket, incarnation="two")
            # A member that is away, and what it served: not one that nothing is known of.
            view = operator.registry.views()["uid-1"]
            assert (view.hello.incarnation, view.connected, view.observed is not None) == ("one", False, True)
            operator.registry.ask("uid-1", WANTED)
            operator.registry.release("uid-1", Released(WANTED.term))
            await socket.send_json(OBSERVED)
            await operator.until(lambda: operator.registry.views()["uid-1"].connected)
            assert operator.registry.views()["uid-1"].hello.incarnation == "two"
            # The first thing that it is asked was asked after its report.
            operator.registry.ask("uid-1", replace(WANTED, retained_versions=7))
            assert (await receive(socket))["retainedVersions"] == 7


async def test_what_was_asked_already_is_not_sent_again_but_to_a_new_session() -> None:
    async with serving() as operator:
        async with dialled(operator) as socket:
            await welcomed(socket)
            operator.registry.ask("uid-1", replace(WANTED, remaining_ms=900))
            assert (await receive(socket))["seq"] == 1
            operator.registry.ask("uid-1", replace(WANTED, remaining_ms=500))
            operator.registry.ask("uid-1", replace(WANTED, retained_versions=7))
            second = await receive(socket)
            assert (second["seq"], second["retainedVersions"]) == (2, 7)
        async with dialled(operator) as socket:
            await welcomed(socket)
            operator.registry.ask("uid-1", replace(WANTED, retained_versions=7))
            assert (await receive(socket))["seq"] == 3


async def test_only_the_newest_state_is_sent() -> None:
    async with serving() as operator, dialled(operator) as socket:
        await welcomed(socket)
        for number in range(1, 100):
            operator.registry.ask("uid-1", replace(WANTED, retained_versions=number))
        desired = await receive(socket)
        assert desired["retainedVersions"] == 99


async def test_whoever_may_not_send_is_silent() -> None:
    async with serving(KeepAlive(ping=0.02)) as operator, dialled(operator) as socket:
        await welcomed(socket)
        operator.may_send = False
        operator.registry.ask("uid-1", WANTED)
        await asyncio.sleep(0.1)
        operator.may_send = True
        operator.registry.ask("uid-1", replace(WANTED, retained_versions=7))
        received = [await receive(socket)]
        while received[-1].get("retainedVersions") != 7:
            received.append(await receive(socket))
        assert {each.get("retainedVersions") for each in received} <= {None, 7}


async def test_keep_alive_is_the_state_with_the_time_that_is_left() -> None:
    async with serving(KeepAlive(ping=0.2)) as operator, dialled(operator) as socket:
        await welcomed(socket)
        operator.registry.ask("uid-1", replace(WANTED, remaining_ms=300))
        first, second, third = [await receive(socket) for _ in range(3)]
        assert {each["seq"] for each in (first, second, third)} == {1}
        assert first["remainingMs"] > second["remainingMs"] >= 1
        # Never 0, which means that there is no deadline.
        assert third["remainingMs"] == 1


async def test_silence_ends_a_session() -> None:
    async with serving(KeepAlive(dead=0.1)) as operator, dialled(operator) as socket:
        await welcomed(socket)
        assert (await refusal(socket))["code"] == "PeerSilent"


async def test_whoever_speaks_is_not_silent() -> None:
    async with serving(KeepAlive(dead=0.2)) as operator, dialled(operator) as socket:
        await welcomed(socket)
        for _ in range(8):
            await socket.send_json(OBSERVED)
            await asyncio.sleep(0.05)
        assert operator.registry.views()["uid-1"].connected


async def test_in_a_transfer_both_are_faster() -> None:
    keep_alive = KeepAlive(ping=60, dead=60, transfer_ping=0.05, transfer_dead=0.3)
    async with serving(keep_alive) as operator, dialled(operator) as socket:
        await welcomed(socket)
        moving = {"state": TransferState.RECEIVING.value}
        await socket.send_json({**OBSERVED, "transfer": moving})
        started = time.monotonic()
        assert (await refusal(socket))["code"] == "PeerSilent"
        assert time.monotonic() - started < 5


async def test_asking_for_a_transfer_speeds_up_the_state_that_is_sent() -> None:
    keep_alive = KeepAlive(ping=60, transfer_ping=0.05)
    async with serving(keep_alive) as operator, dialled(operator) as socket:
        await welcomed(socket)
        wanted = Wanted(VersionId("run", 1), "layout", "digest", 1, Phase.TRANSFER)
        operator.registry.ask("uid-1", replace(WANTED, wanted=wanted))
        assert [(await receive(socket))["seq"] for _ in range(3)] == [1, 1, 1]


async def test_bytes_alone_are_told_apart() -> None:
    async with serving() as operator, dialled(operator) as socket:
        await welcomed(socket)
        for count in (1, 2):
            await socket.send_json({**OBSERVED, "transfer": {"state": "Receiving", "bytes": count}})
        await operator.until(lambda: ("default", True) in operator.changes)
        before = len(operator.changes)
        await socket.send_json({**OBSERVED, "transfer": {"state": "Staged", "bytes": 2}})
        await operator.until(lambda: len(operator.changes) > before)
        assert operator.changes[-1] == ("default", False)
        view = operator.registry.views()["uid-1"].observed
        assert view is not None and view.transfer == Transfer(state=TransferState.STAGED, bytes=2)


async def test_a_deleted_pod_loses_its_session() -> None:
    async with serving() as operator, dialled(operator) as socket:
        await welcomed(socket)
        operator.registry.forget("uid-1")
        refused = await refusal(socket)
        assert (refused["code"], refused["message"]) == ("UnknownPod", "the pod was deleted")
        assert operator.registry.views() == {}


async def test_a_nack_for_a_stale_term_is_remembered() -> None:
    async with serving() as operator, dialled(operator) as socket:
        await welcomed(socket)
        nack = {"type": "nack", "term": 9, "seq": 1, "code": "StaleTerm", "message": "term 9 was obeyed"}
        await socket.send_json(nack)
        await operator.until(lambda: operator.registry.views()["uid-1"].nacked_term == 9)
        await socket.send_json({**nack, "term": 4})
        await socket.send_json(OBSERVED)
        await operator.until(lambda: operator.registry.views()["uid-1"].observed is not None)
        assert operator.registry.views()["uid-1"].nacked_term == 9


@pytest.mark.parametrize(("seq", "expected"), [(1, 0), (7, 3)])
async def test_a_nack_for_a_sequence_that_we_never_reached_names_a_term_that_is_not_ours_alone(
    seq: int, expected: int
) -> None:
    """The status with the term was lost, and the last leader had spoken under the same one."""
    async with serving(KeepAlive(ping=60)) as operator, dialled(operator) as socket:
        await welcomed(socket)
        operator.registry.ask("uid-1", WANTED)
        await receive(socket)
        nack = {"type": "nack", "term": 3, "seq": seq, "code": "StaleSequence", "message": "obeyed"}
        await socket.send_json(nack)
        await socket.send_json(OBSERVED)
        await operator.until(lambda: operator.registry.views()["uid-1"].observed is not None)
        assert operator.registry.views()["uid-1"].nacked_term == expected


async def test_released_is_sent_once() -> None:
    async with serving(KeepAlive(ping=60)) as operator, dialled(operator) as socket:
        await welcomed(socket)
        for _ in range(3):
            operator.registry.release("uid-1", Released(4, "nobody wants it"))
        assert (await receive(socket))["type"] == "released"
        with pytest.raises(TimeoutError):
            await receive(socket, 0.1)


async def test_a_token_near_its_end_ends_the_session(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weightsync_operator.session.server.session_seconds", lambda _: 0.1)
    async with serving() as operator, dialled(operator) as socket:
        await welcomed(socket)
        assert (await refusal(socket))["code"] == "TokenExpired"
