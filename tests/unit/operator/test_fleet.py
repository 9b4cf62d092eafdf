"""The fleet is shown to those who may read the WeightSync, and to nobody else.

The API server is stood in for here by functions; tests/integration has the real one.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from weightsync_contract import names
from weightsync_contract.codec import from_document
from weightsync_contract.fleetview import FleetView, MemberView
from weightsync_contract.messages import Transfer, VersionId
from weightsync_operator.fleet import FleetServer
from weightsync_operator.kube.errors import UnavailableError
from weightsync_operator.kube.reviews import User
from weightsync_operator.session.server import Leadership

VIEW = FleetView(
    namespace="default",
    name="policy",
    term=2,
    epoch=3,
    world_size=2,
    phase="Transferring",
    message="",
    target=VersionId("run", 4),
    current=None,
    members=(MemberView("vllm-0", "uid", "inference", True, 1, 1, Transfer(bytes=7, total_bytes=9)),),
)
URL = "/v1/weightsyncs/default/policy"


class Everything:
    """What the server asks around it."""

    leadership = Leadership(ready=True)
    user: User | None = User("reader")
    fails = False
    allowed = True

    own = User("system:serviceaccount:default:any")

    async def review(self, token: str, audience: str) -> User | None:
        if self.fails:
            raise UnavailableError("503")
        known = {("good", ""): self.user, ("own", names.FLEET_AUDIENCE): self.own}
        return known.get((token, audience))

    async def may_read(self, user: User, namespace: str, name: str) -> bool:
        return self.allowed and (user.name, namespace, name) == ("reader", "default", "policy")


@asynccontextmanager
async def serving(everything: Everything) -> AsyncIterator[TestClient[Any, Any]]:
    app = web.Application()
    FleetServer(
        {("default", "policy"): VIEW}.get,
        lambda: everything.leadership,
        everything.review,
        everything.may_read,
    ).add_routes(app)
    async with TestClient(TestServer(app)) as http:
        yield http


async def get(everything: Everything, token: str = "good", url: str = URL) -> tuple[int, dict[str, Any]]:
    async with serving(everything) as http:
        answer = await http.get(url, headers={"Authorization": f"Bearer {token}"} if token else {})
        return answer.status, await answer.json()


async def test_a_reader_sees_the_fleet() -> None:
    status, document = await get(Everything())
    assert status == 200
    assert from_document(FleetView, document) == VIEW


@pytest.mark.parametrize(
    ("spoil", "status", "sentence"),
    [
        ({"user": None}, 401, "does not know this token"),
        ({"allowed": False}, 403, "reader may not get weightsyncs in namespace default"),
        ({"fails": True}, 503, "can't be asked now"),
        ({"leadership": Leadership(False, "10.0.0.7:8443")}, 503, "ask the leader"),
    ],
)
async def test_others_are_told_why_not(spoil: dict[str, Any], status: int, sentence: str) -> None:
    everything = Everything()
    for name, value in spoil.items():
        setattr(everything, name, value)
    answered, document = await get(everything)
    assert answered == status
    assert sentence in document["error"]
    assert "members" not in document


async def test_a_follower_says_where_the_leader_is() -> None:
    everything = Everything()
    everything.leadership = Leadership(False, "10.0.0.7:8443")
    assert (await get(everything))[1]["address"] == "10.0.0.7:8443"


async def test_no_token_and_a_wrong_one() -> None:
    assert (await get(Everything(), token=""))[0] == 401
    assert (await get(Everything(), token="bad"))[0] == 401


async def test_whether_there_is_one_is_only_said_to_those_who_may_read_it() -> None:
    assert (await get(Everything(), url="/v1/weightsyncs/default/other"))[0] == 403


async def ask(everything: Everything, headers: dict[str, str]) -> int:
    async with serving(everything) as http:
        return (await http.get(URL, headers=headers)).status


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({names.FLEET_TOKEN_HEADER: "own"}, 200),
        ({"Authorization": "Bearer own"}, 200),
        # A token for the API server is not taken from where a stranger may have read it.
        ({names.FLEET_TOKEN_HEADER: "good"}, 401),
        ({names.FLEET_TOKEN_HEADER: "bad"}, 401),
        ({}, 401),
    ],
)
async def test_a_token_for_fleets_only_goes_through_the_proxy(headers: dict[str, str], status: int) -> None:
    assert await ask(Everything(), headers) == status


async def test_a_service_account_speaks_for_its_own_namespace_alone() -> None:
    everything = Everything()
    everything.own = User("system:serviceaccount:other:any")
    assert await ask(everything, {names.FLEET_TOKEN_HEADER: "own"}) == 403
