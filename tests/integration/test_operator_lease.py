"""The election at a real API server: one leader at a time, and he knows until when."""

import asyncio
import itertools
import os
import signal
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

import pytest
from kubernetes import client
from kubernetes.client.exceptions import ApiException

from weightsync_contract.names import LEASE_NAME
from weightsync_demo.kube.apiserver import ApiServer, run_apiserver
from weightsync_demo.kube.build import Binaries
from weightsync_operator.kube.api import Api
from weightsync_operator.kube.connection import Connection
from weightsync_operator.lease import Elector, LeaseLostError, LeaseTimes

TIMES = LeaseTimes(duration=1.0, renew=0.7, retry=0.1)
NUMBERS = itertools.count()


@pytest.fixture
async def api(apiserver: ApiServer) -> AsyncIterator[Api]:
    api = Api(Connection(str(apiserver.kubeconfig)))
    yield api
    api.close()


def elector(api: Api, namespace: str, times: LeaseTimes = TIMES) -> Elector:
    number = next(NUMBERS)
    return Elector(api, namespace, f"replica-{number}", f"10.0.0.{number}:8443", times)


@asynccontextmanager
async def running(elector: Elector) -> AsyncIterator["asyncio.Task[None]"]:
    task = asyncio.create_task(elector.run())
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_one_of_many_leads_and_the_others_know_where(api: Api, namespace: str) -> None:
    electors = [elector(api, namespace) for _ in range(4)]
    async with AsyncExitStack() as stack:
        for each in electors:
            await stack.enter_async_context(running(each))
        for _ in range(30):
            assert sum(each.valid() for each in electors) <= 1
            await asyncio.sleep(0.05)
        [leader] = [each for each in electors if each.valid()]
        addresses = {each.leader_address for each in electors}
        assert len(addresses) == 1
        assert leader.leader_address in addresses


async def test_a_silent_leader_is_replaced_and_stopped_believing_before(api: Api, namespace: str) -> None:
    first, second = elector(api, namespace), elector(api, namespace)
    async with running(first):
        await first.elected.wait()
        # Let it renew a few times.
        await asyncio.sleep(0.3)
    async with running(second):
        while not second.valid():
            await asyncio.sleep(0.005)
            assert not (first.valid() and second.valid())
        assert not first.valid()


async def test_a_released_lease_is_taken_at_once(api: Api, namespace: str) -> None:
    slow = LeaseTimes(duration=60, renew=40, retry=0.1)
    first, second = elector(api, namespace, slow), elector(api, namespace, slow)
    async with running(first):
        await first.elected.wait()
    async with running(second):
        await asyncio.sleep(0.3)
        assert not second.elected.is_set()
        await first.release()
        assert not first.valid()
        async with asyncio.timeout(5):
            await second.elected.wait()


async def test_a_lease_that_was_renewed_in_the_last_moment_is_released_too(
    api: Api, namespace: str, api_client: client.ApiClient
) -> None:
    slow = LeaseTimes(duration=60, renew=40, retry=0.1)
    first, second = elector(api, namespace, slow), elector(api, namespace, slow)
    async with running(first):
        await first.elected.wait()
    # A renewal that arrives though nobody waits for its answer any more.
    renewed = {"spec": {"renewTime": datetime.now(UTC).isoformat()}}
    client.CoordinationV1Api(api_client).patch_namespaced_lease(LEASE_NAME, namespace, renewed)
    await first.release()
    async with running(second):
        await asyncio.wait_for(second.elected.wait(), 5)


async def test_a_lease_that_another_holds_is_not_released(
    api: Api, namespace: str, api_client: client.ApiClient
) -> None:
    leases = client.CoordinationV1Api(api_client)
    first = elector(api, namespace)
    async with running(first):
        await first.elected.wait()
    leases.patch_namespaced_lease(LEASE_NAME, namespace, {"spec": {"holderIdentity": "another"}})
    await first.release()
    assert leases.read_namespaced_lease(LEASE_NAME, namespace).spec.holder_identity == "another"


async def test_whoever_lost_the_lease_ends(api: Api, namespace: str, api_client: client.ApiClient) -> None:
    leader = elector(api, namespace)
    async with running(leader) as task:
        await leader.elected.wait()
        leases = client.CoordinationV1Api(api_client)
        stolen = {"spec": {"holderIdentity": "somebody-else"}}
        leases.patch_namespaced_lease(LEASE_NAME, namespace, stolen)
        with pytest.raises(LeaseLostError, match="somebody-else holds"):
            async with asyncio.timeout(5):
                await task


async def test_a_foreign_annotation_takes_nothing_away(
    api: Api, namespace: str, api_client: client.ApiClient
) -> None:
    leader = elector(api, namespace)
    async with running(leader) as task:
        await leader.elected.wait()
        leases = client.CoordinationV1Api(api_client)
        leases.patch_namespaced_lease(LEASE_NAME, namespace, {"metadata": {"annotations": {"a": "b"}}})
        await asyncio.sleep(1.5)
        assert leader.valid()
        assert not task.done()


async def test_without_an_answer_the_leader_ends_in_time(binaries: Binaries, tmp_path: Path) -> None:
    with run_apiserver(tmp_path, binaries) as server:
        api = Api(Connection(str(server.kubeconfig)))
        leader = elector(api, "default")
        async with running(leader) as task:
            await leader.elected.wait()
            # It takes requests still, and answers none.
            os.kill(server.pid, signal.SIGSTOP)
            stopped_at = time.monotonic()
            with pytest.raises(LeaseLostError, match=r"could not be renewed within 0\.7 s"):
                async with asyncio.timeout(5):
                    await task
            assert time.monotonic() - stopped_at < TIMES.renew + TIMES.retry + 0.5
            assert not leader.valid()
        os.kill(server.pid, signal.SIGCONT)
        api.close()


async def test_a_deleted_lease_makes_no_second_leader(
    api: Api, namespace: str, api_client: client.ApiClient
) -> None:
    electors = [elector(api, namespace) for _ in range(3)]
    leases = client.CoordinationV1Api(api_client)
    async with AsyncExitStack() as stack:
        tasks = [await stack.enter_async_context(running(each)) for each in electors]
        for _ in range(4):
            for _ in range(40):
                assert sum(each.valid() for each in electors) <= 1
                await asyncio.sleep(0.01)
            if not all(task.done() for task in tasks):
                with suppress(ApiException):
                    leases.delete_namespaced_lease(LEASE_NAME, namespace)


def test_times_that_could_make_two_leaders_are_refused() -> None:
    with pytest.raises(ValueError, match="must grow"):
        LeaseTimes(duration=10, renew=10, retry=1)
