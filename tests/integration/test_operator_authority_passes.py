"""Each replica's part in the operator's own authority, at a real API server and by a clock of the test's."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cluster_objects import ClusterObjects
from kubernetes import client
from trusting_agents import Bundles

from weightsync_contract.names import CA_FILE, CA_NAME
from weightsync_contract.reasons import Reason
from weightsync_demo.kube.apiserver import ApiServer
from weightsync_operator.core.model import Note
from weightsync_operator.kube.api import Api
from weightsync_operator.kube.connection import Connection
from weightsync_operator.kube.errors import ForbiddenError
from weightsync_operator.pki.authority import Authority, Place
from weightsync_operator.pki.certificates import make_ca
from weightsync_operator.pki.serving import Serving
from weightsync_operator.pki.times import PkiTimes

SECONDS = 20.0


class Clock:
    def __init__(self) -> None:
        self.now = datetime.now(UTC)

    def __call__(self) -> datetime:
        return self.now


class Recorded(Serving):
    def __init__(self, clock: Clock) -> None:
        super().__init__(clock)
        self.taken: list[bytes] = []

    def take(self, certificate: bytes, key: bytes) -> datetime:
        self.taken.append(certificate)
        return super().take(certificate, key)


class Replica:
    """An authority that looks only when it is told to, within the test."""

    def __init__(self, api: Api, namespace: str, leads: bool) -> None:
        self.clock = Clock()
        self.serving = Recorded(self.clock)
        self.leads = leads
        self.namespaces = {namespace}
        self.notes: list[Note] = []
        self.authority = Authority(
            api,
            self.serving,
            Place(namespace, ("op",)),
            PkiTimes(check=3600.0),
            lambda: self.namespaces,
            lambda: self.leads,
            lambda note, about: self.notes.append(note),
            self.clock,
        )

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Replica"]:
        task = asyncio.create_task(self.authority.run())
        try:
            yield self
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def later(self, **time: float) -> None:
        """Look again, by a clock that much later."""
        self.clock.now += timedelta(**time)
        self.authority.wake()


async def until(condition: Callable[[], object]) -> None:
    deadline = asyncio.get_running_loop().time() + SECONDS
    while not await asyncio.to_thread(condition):
        assert asyncio.get_running_loop().time() < deadline
        await asyncio.sleep(0.02)


@pytest.fixture
async def api(apiserver: ApiServer) -> AsyncIterator[Api]:
    api = Api(Connection(str(apiserver.kubeconfig)))
    yield api
    api.close()


@pytest.fixture
def bundles(api_client: client.ApiClient, namespace: str, tmp_path: Path) -> Bundles:
    return Bundles(ClusterObjects(api_client, namespace), tmp_path / "ca.crt")


async def test_a_follower_writes_nothing_and_signs_with_what_the_leader_made(
    api: Api, namespace: str, bundles: Bundles
) -> None:
    follower, leader = Replica(api, namespace, leads=False), Replica(api, namespace, leads=True)
    async with follower.running():
        await until(lambda: "the leader has to make it" in follower.serving.not_ready())
        follower.authority.look(namespace)
        assert await asyncio.to_thread(bundles.secret) is None
        assert await asyncio.to_thread(bundles.configmap) is None
        async with leader.running():
            await until(lambda: leader.serving.not_ready() == "" and bundles.configmap())
        # Soon, and not with the next look.
        await until(lambda: follower.serving.not_ready() == "")
        await asyncio.to_thread(bundles.objects.core.delete_namespaced_config_map, CA_NAME, namespace)
        before = await asyncio.to_thread(bundles.secret)
        follower.later(hours=13)
        await until(lambda: len(follower.serving.taken) == 2)
        after = await asyncio.to_thread(bundles.secret)
        assert after.metadata.resource_version == before.metadata.resource_version
        assert await asyncio.to_thread(bundles.configmap) is None


async def test_two_that_both_take_themselves_for_the_leader_make_one_authority(
    api: Api, namespace: str, bundles: Bundles
) -> None:
    replicas = [Replica(api, namespace, leads=True) for _ in range(4)]
    async with AsyncExitStack() as stack:
        for each in replicas:
            await stack.enter_async_context(each.running())
        await until(lambda: all(each.serving.not_ready() == "" for each in replicas))
        for each in replicas:
            each.later(seconds=1)
        await until(bundles.configmap)
        text = (await asyncio.to_thread(bundles.configmap)).data[CA_FILE]
    assert text.count("BEGIN") == 1
    assert not [note for each in replicas for note in each.notes]


async def test_a_certificate_is_renewed_at_half_of_its_life_and_not_before(api: Api, namespace: str) -> None:
    replica = Replica(api, namespace, leads=True)
    async with replica.running():
        await until(lambda: len(replica.serving.taken) == 1)
        replica.namespaces.clear()
        replica.later(hours=11)
        # Something that can be seen to have been looked at.
        await until(lambda: replica.authority.looked_at == frozenset())
        assert len(replica.serving.taken) == 1
        replica.later(hours=2)
        await until(lambda: len(replica.serving.taken) == 2)


async def test_what_cannot_be_written_keeps_no_certificate_from_being_renewed(
    api: Api, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    replica = Replica(api, namespace, leads=True)
    async with replica.running():
        await until(lambda: len(replica.serving.taken) == 1)
        request = api.request

        async def forbidden(method: str, path: str, **more: Any) -> dict[str, Any]:
            if method != "GET" or "configmaps" in path:
                raise ForbiddenError(f"{method} {path}: 403 forbidden")
            return await request(method, path, **more)

        monkeypatch.setattr(api, "request", forbidden)
        # Due for the next authority, which can't be stored.
        replica.later(days=250)
        await until(lambda: len(replica.serving.taken) == 2)
        assert replica.serving.not_ready() == ""
    assert [note.reason for note in replica.notes] == [Reason.BUNDLE_NOT_WRITTEN]
    assert "403 forbidden" in replica.notes[0].message


async def test_a_namespace_that_refuses_its_bundle_is_said_once_and_holds_up_no_other(
    api: Api, namespace: str, bundles: Bundles
) -> None:
    replica = Replica(api, namespace, leads=True)
    replica.namespaces |= {"a-namespace-that-is-not-there"}
    async with replica.running():
        await until(bundles.configmap)
        for _ in range(3):
            replica.later(seconds=1)
            await asyncio.sleep(0.1)
    assert [note.reason for note in replica.notes] == [Reason.BUNDLE_NOT_WRITTEN]


async def test_whoever_was_away_until_the_end_begins_anew(api: Api, namespace: str, bundles: Bundles) -> None:
    replica = Replica(api, namespace, leads=True)
    async with replica.running():
        await until(bundles.configmap)
        before = (await asyncio.to_thread(bundles.configmap)).data[CA_FILE]
        replica.later(days=366)
        await until(lambda: bundles.configmap().data[CA_FILE] != before)
    assert [note.reason for note in replica.notes] == [Reason.AUTHORITY_REPLACED]
    assert "it ended at" in replica.notes[0].message


async def test_an_immutable_bundle_is_said(api: Api, namespace: str, bundles: Bundles) -> None:
    replica = Replica(api, namespace, leads=True)
    core = bundles.objects.core
    async with replica.running():
        await until(bundles.configmap)
        frozen = {"immutable": True}
        await asyncio.to_thread(core.patch_namespaced_config_map, CA_NAME, namespace, frozen)
        old = make_ca(replica.clock.now, PkiTimes())
        await asyncio.to_thread(
            core.patch_namespaced_secret,
            CA_NAME,
            namespace,
            {"stringData": {"old.crt": old.certificate}},
        )
        replica.later(seconds=1)
        await until(lambda: replica.notes)
    assert "immutable" in replica.notes[0].message
