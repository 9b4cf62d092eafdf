"""The operator's process at a real API server, with fake agents: whole rollouts and what breaks them."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientSession
from cluster_objects import ClusterObjects
from fake_agents import FakeAgent, Stop
from kubernetes import client, config, watch
from operated import SOON, Operated, operated, row

from weightsync_contract.codec import from_document
from weightsync_contract.fleetview import FleetView
from weightsync_contract.messages import ServingState, VersionId
from weightsync_contract.names import API_VERSION, GROUP, PLURAL
from weightsync_contract.reasons import Role
from weightsync_demo.kube.apiserver import ApiServer, run_apiserver
from weightsync_demo.kube.build import Binaries
from weightsync_demo.kube.crd import apply_crds

pytestmark = pytest.mark.usefixtures("crds")

MAX_RSS_MIB = 120


@pytest.fixture
async def world(
    apiserver: ApiServer, api_client: client.ApiClient, namespace: str, tmp_path: Path
) -> AsyncIterator[Operated]:
    async with operated(ClusterObjects(api_client, namespace), apiserver.kubeconfig, tmp_path) as made:
        yield made


async def started(world: Operated, members: int = 2, *arguments: str) -> tuple[FakeAgent, list[FakeAgent]]:
    """A WeightSync, an operator, a trainer and members, all connected."""
    await asyncio.to_thread(world.objects.weightsync)
    await world.start(*arguments)
    trainer = await world.trainer()
    agents = await world.members(members)
    for each in (trainer, *agents):
        await each.until(lambda agent: agent.desired is not None)
    return trainer, agents


async def served(agents: list[FakeAgent], version: VersionId, seconds: float = 20) -> None:
    await asyncio.gather(*(each.until_serving(version, seconds) for each in agents))


async def synced(world: Operated, version: int, members: int) -> dict[str, Any]:
    return await world.until_status(
        lambda s: (
            s["current"]["version"] == version
            and s["synced"] == f"{members}/{members}"
            and row(s, "Ready")["reason"] == "Synced"
            and s["rollout"]["outcome"] == "Succeeded"
        )
    )


async def test_a_new_weightsync_gets_its_conditions(world: Operated) -> None:
    await asyncio.to_thread(world.objects.weightsync)
    await world.start()
    status = await world.until_status(lambda s: len(s["conditions"]) == 4)
    assert {each["type"] for each in status["conditions"]} == {
        *("Ready", "Progressing", "SourceAvailable", "MembersHealthy")
    }
    assert status["term"] == 1
    assert status["observedGeneration"] == 1
    assert row(status, "SourceAvailable")["reason"] == "NoPublisher"
    assert all(each["message"] for each in status["conditions"])


async def test_a_version_goes_to_all_members(world: Operated) -> None:
    trainer, agents = await started(world, 3)
    version = trainer.publish(1)
    await served(agents, version)
    status = await synced(world, 1, 3)
    assert status["group"]["worldSize"] == 4
    assert [each.split(":")[:3] for each in status["group"]["members"]] == [
        ["0", "1", "trainer-0"],
        ["1", "1", "vllm-0"],
        ["2", "1", "vllm-1"],
        ["3", "1", "vllm-2"],
    ]
    assert status["source"] == {"run": "run-1", "pod": "trainer-0"}
    assert row(status, "Ready")["status"] == "True"
    await trainer.until(lambda a: a.desired is not None and a.desired.fleet.current == version)


async def test_the_next_version_uses_the_same_group(world: Operated) -> None:
    trainer, agents = await started(world)
    await served(agents, trainer.publish(1))
    epoch = (await synced(world, 1, 2))["group"]["epoch"]
    await served(agents, trainer.publish(2))
    status = await synced(world, 2, 2)
    assert status["group"]["epoch"] == epoch
    assert status["previous"]["version"] == 1


async def test_ranks_follow_the_workers_of_each_member(world: Operated) -> None:
    trainer, agents = await started(world, 0)
    agents = [await world.agent(f"vllm-{number}", Role.INFERENCE, "vllm", ranks=2) for number in range(2)]
    await served(agents, trainer.publish(1))
    status = await synced(world, 1, 2)
    assert [each[:3] for each in status["group"]["members"]] == ["0:1", "1:2", "3:2"]


async def test_who_comes_late_is_caught_up(world: Operated) -> None:
    trainer, agents = await started(world, 1)
    version = trainer.publish(1)
    await served(agents, version)
    first = (await synced(world, 1, 1))["group"]["epoch"]
    late = await world.members(1, first=1)
    await served(late, version)
    status = await synced(world, 1, 2)
    assert status["group"]["epoch"] > first
    assert agents[0].served == [version], "the one that had it was switched again"


async def test_who_dies_in_the_transfer_is_left_behind(world: Operated) -> None:
    trainer, agents = await started(world, 3)
    for each in agents:
        each.hold(Stop.TRANSFER)
    version = trainer.publish(1)
    await agents[2].until(lambda a: a.transfer.version == version)
    first = (await world.status())["group"]["epoch"]
    await asyncio.to_thread(world.objects.delete_pod, "vllm-2")
    await trainer.until(lambda a: a.transfer.epoch > first)
    for each in agents:
        each.let_go()
    await served(agents[:2], version)
    status = await synced(world, 1, 2)
    assert status["group"]["epoch"] > first
    assert all("vllm-2" not in each for each in status["group"]["members"])


async def test_a_restarted_engine_gets_the_version_again(world: Operated) -> None:
    trainer, agents = await started(world, 2)
    version = trainer.publish(1)
    await served(agents, version)
    await synced(world, 1, 2)
    agents[0].restart_engine()
    await agents[0].until(lambda a: a.served == [version, version])
    await synced(world, 1, 2)
    assert agents[1].served == [version]


async def test_paused_begins_nothing_new(world: Operated) -> None:
    trainer, agents = await started(world)
    await served(agents, trainer.publish(1))
    await synced(world, 1, 2)
    await asyncio.to_thread(world.objects.patch, {"spec": {"paused": True}})
    await world.until_status(lambda s: s["observedGeneration"] == 2)
    version = trainer.publish(2)
    await world.until_condition("Progressing", "Paused")
    await asyncio.sleep(0.5)
    assert all(each.served[-1].version == 1 for each in agents)
    await asyncio.to_thread(world.objects.patch, {"spec": {"paused": False}})
    await served(agents, version)


async def test_a_field_of_a_later_release_moves_nothing_and_says_so(world: Operated) -> None:
    spec: dict[str, Any] = {"dataPlane": {"type": "Engine"}, "verification": "None"}
    await asyncio.to_thread(lambda: world.objects.weightsync(**spec))
    await world.start()
    trainer = await world.trainer()
    agents = await world.members(1)
    trainer.publish(1)
    message = await world.until_condition("Ready", "Unsupported")
    assert "dataPlane.type Engine" in message
    assert "0.2" in message
    await asyncio.sleep(0.5)
    assert agents[0].served == []
    assert "group" not in await world.status()


async def test_a_selector_that_matches_nothing_is_said(world: Operated) -> None:
    await asyncio.to_thread(world.objects.weightsync)
    await world.start()
    await world.trainer()
    await world.until_condition("Ready", "NoMembers")


async def test_two_weightsyncs_on_one_pod(world: Operated) -> None:
    trainer, agents = await started(world, 1)
    version = trainer.publish(1)
    await served(agents, version)
    await synced(world, 1, 1)
    await asyncio.to_thread(world.objects.weightsync, "second")
    message = await world.until_condition("MembersHealthy", "Conflict", name="second")
    assert "vllm-0" in message
    assert "policy" in message
    await served(agents, trainer.publish(2))
    assert (await world.status("second")).get("group") is None


async def test_a_deleted_weightsync_lets_its_agents_go(world: Operated) -> None:
    trainer, agents = await started(world)
    version = trainer.publish(1)
    await served(agents, version)
    await asyncio.to_thread(world.objects.delete)
    for each in (trainer, *agents):
        await each.until(lambda a: a.counters.released == 1)
    # They serve on.
    assert all(each.serving and each.serving.version == version for each in agents)
    # Made again, it is another one; what the agents obeyed before does not bind it.
    await asyncio.to_thread(world.objects.weightsync)
    await served(agents, trainer.publish(2))
    await synced(world, 2, 2)


async def test_a_deleted_pod_loses_its_session(world: Operated) -> None:
    _, agents = await started(world, 1)
    await asyncio.to_thread(world.objects.delete_pod, "vllm-0")
    await agents[0].until(lambda a: any(r.message == "the pod was deleted" for r in a.counters.refusals))
    # Its token is good for some seconds still; its pod is not.
    await agents[0].until(lambda a: len(a.counters.refusals) > 1)
    assert agents[0].counters.refusals[-1].code in ("UnknownPod", "TokenInvalid")


async def test_a_status_that_somebody_wiped_comes_back(world: Operated) -> None:
    trainer, agents = await started(world)
    await served(agents, trainer.publish(1))
    before = await synced(world, 1, 2)
    await asyncio.to_thread(world.objects.patch_status, None)
    await served(agents, trainer.publish(2))
    after = await synced(world, 2, 2)
    assert after["term"] >= before["term"]


async def test_somebody_who_writes_the_status_all_the_time_does_not_stop_it(world: Operated) -> None:
    trainer, agents = await started(world)
    meddling = asyncio.create_task(meddle(world.objects))
    try:
        for number in (1, 2, 3):
            await served(agents, trainer.publish(number))
    finally:
        meddling.cancel()
        await asyncio.gather(meddling, return_exceptions=True)
    await synced(world, 3, 2)


async def meddle(objects: ClusterObjects) -> None:
    number = 0
    while True:
        number += 1
        await asyncio.to_thread(objects.patch, {"metadata": {"annotations": {"meddler": str(number)}}})
        await asyncio.sleep(0.02)


PHASES = [(), (Stop.JOIN,), (Stop.CHECK,), (Stop.TRANSFER,), (Stop.COMMIT,)]


@pytest.mark.parametrize("stops", PHASES, ids=["idle", "join", "check", "transfer", "commit"])
async def test_an_operator_dies_in_any_phase(world: Operated, stops: tuple[Stop, ...]) -> None:
    trainer, agents = await started(world, 2, *SOON)
    held = agents[1]
    held.hold(*stops)
    version = trainer.publish(1)
    if stops:
        await held.until(lambda a: reached(a, stops[0], version))
    else:
        await served(agents, version)
    world.operators[0].kill()
    del world.operators[0]
    await world.start(*SOON)
    held.let_go()
    await served(agents, version, 30)
    status = await world.until_status(
        lambda s: s["synced"] == "2/2" and row(s, "Ready")["reason"] == "Synced"
    )
    assert status["current"]["version"] == 1
    assert status["term"] == 2
    for each in (trainer, *agents):
        # The status is written before anything is sent.
        await each.until(lambda a: a.terms[-1:] == [2])
        assert each.terms == sorted(each.terms)
    assert all(each.served == [version] for each in agents), "a member was switched twice"


def reached(agent: FakeAgent, stop: Stop, version: VersionId) -> bool:
    """Whether an agent stands where it is held."""
    desired = agent.desired
    if desired is None:
        return False
    if stop is Stop.JOIN:
        return desired.group is not None
    if stop is Stop.CHECK:
        return desired.wanted is not None
    if stop is Stop.TRANSFER:
        return agent.transfer.version == version
    return agent.serving is not None and agent.serving.state is ServingState.APPLYING


async def test_of_two_replicas_one_acts(world: Operated) -> None:
    trainer, agents = await started(world, 2, *SOON)
    leader = world.operators[0]
    follower = await world.start(*SOON)
    assert follower.get("/readyz")[0] == 200
    assert follower.get("/healthz")[0] == 200
    # An agent that asks the follower is sent to the leader, and gets there.
    address = await sent_on(agents[0])
    assert f"http://{address}" == leader.url
    await served(agents, trainer.publish(1))
    assert (await synced(world, 1, 2))["term"] == 1

    leader.kill()
    del world.operators[0]
    await served(agents, trainer.publish(2), 30)
    assert (await synced(world, 2, 2))["term"] == 2
    for each in agents:
        await each.until(lambda a: a.terms == [1, 2])


_PROGRAM = """
import sys
from weightsync_operator import __main__, health
health.MAX_TICK_SECONDS = 3.0
sys.exit(__main__.main())
"""


async def test_a_follower_is_alive_for_as_long_as_it_follows_and_as_the_leader(world: Operated) -> None:
    await started(world, 1, *SOON)
    leader = world.operators[0]
    # It counts as dead when its queue stands still for three seconds instead of sixty.
    follower = await world.start(*SOON, program=("-c", _PROGRAM))
    for number in range(50):
        if number == 25:
            leader.kill()
            del world.operators[0]
        assert await asyncio.to_thread(follower.get, "/healthz") == (200, "ok\n")
        await asyncio.sleep(0.2)


async def sent_on(agent: FakeAgent) -> str:
    """Where a follower sends an agent to; one that has just started may not know yet."""
    async with asyncio.timeout(20):
        while True:
            welcomes = agent.counters.welcomes
            await agent.hang_up()
            await agent.until(lambda a, n=welcomes: a.counters.welcomes > n)
            for each in agent.counters.refusals:
                assert each.code == "NotLeader"
                if each.address:
                    return each.address


async def test_a_leader_that_was_frozen_does_nothing_when_it_wakes(world: Operated) -> None:
    trainer, agents = await started(world, 2, *SOON)
    frozen = world.operators[0]
    await served(agents, trainer.publish(1))
    frozen.freeze()
    del world.operators[0]
    await world.start(*SOON)
    for each in (trainer, *agents):
        # Nobody closes the connections of a frozen process.
        await each.hang_up()
    await served(agents, trainer.publish(2), 30)
    status = await synced(world, 2, 2)
    frozen.thaw()
    assert await asyncio.to_thread(frozen.wait, 10) == 1
    assert "may not go on" in frozen.log.read_text()
    assert (await world.status())["term"] == status["term"] == 2
    for each in agents:
        await each.until(lambda a: a.terms == [1, 2])


async def test_sigterm_hands_over_at_once(world: Operated) -> None:
    patient = ("--lease-duration", "60", "--lease-renew", "40", "--lease-retry", "0.2")
    trainer, agents = await started(world, 1, *patient)
    follower = await world.start(*patient)
    leader = world.operators.pop(0)
    assert await asyncio.to_thread(leader.stop) == 0
    # Long before the Lease would have ended by itself.
    await served(agents, trainer.publish(1), 10)
    assert follower.get("/healthz")[0] == 200


async def test_the_fleet_is_shown_to_whoever_may_read_the_weightsync(
    world: Operated, apiserver: ApiServer
) -> None:
    trainer, agents = await started(world, 2)
    await served(agents, trainer.publish(1))
    await synced(world, 1, 2)
    objects = world.objects
    rules = [{"apiGroups": [GROUP], "resources": [PLURAL], "verbs": ["get"]}]
    await asyncio.to_thread(objects.allow, "viewer", rules)
    viewer = await asyncio.to_thread(lambda: objects.token(audience="", account="viewer"))
    stranger = await asyncio.to_thread(lambda: objects.token(audience=""))
    url = f"{world.operators[0].url}/v1/weightsyncs/{objects.namespace}/policy"
    async with ClientSession() as http:
        answers = {viewer: 200, apiserver.token: 200, stranger: 403, "nonsense": 401, "": 401}
        for token, expected in answers.items():
            headers = {"Authorization": f"Bearer {token}"} if token else {}
            async with http.get(url, headers=headers) as answer:
                assert answer.status == expected
                if token == viewer:
                    view = from_document(FleetView, await answer.json())
    assert (view.epoch, view.world_size, view.current) == (1, 3, VersionId("run-1", 1))
    by_name = {each.name: each for each in view.members}
    assert by_name["vllm-1"].rank == 2
    assert by_name["vllm-1"].serving is not None
    assert by_name["vllm-1"].serving.version == VersionId("run-1", 1)


async def test_an_outcome_is_one_event(world: Operated) -> None:
    trainer, agents = await started(world, 2)
    for number in (1, 2):
        await served(agents, trainer.publish(number))
        await synced(world, number, 2)
    for _ in range(50):
        if len(await completed(world.objects)) >= 2:
            break
        await asyncio.sleep(0.1)
    await asyncio.sleep(0.5)
    assert len(await completed(world.objects)) == 2


async def completed(objects: ClusterObjects) -> list[Any]:
    return [each for each in await asyncio.to_thread(objects.events) if each.reason == "Complete"]


async def test_writes_stay_within_their_budget(world: Operated, api_client: client.ApiClient) -> None:
    trainer, agents = await started(world, 4)
    await served(agents, trainer.publish(1))
    before = (await synced(world, 1, 4))["group"]["epoch"]
    await asyncio.sleep(0.5)
    for number in range(2, 7):
        document = await asyncio.to_thread(world.objects.read)
        await served(agents, trainer.publish(number))
        await synced(world, number, 4)
        await asyncio.sleep(0.3)
        writes = await asyncio.to_thread(versions_since, api_client, document)
        # One at the end and, since it takes longer under load, one on the way.
        assert len(writes) <= 2, [json.dumps(each["status"].get("conditions")) for each in writes]
    assert (await world.status())["group"]["epoch"] == before
    assert world.operators[0].rss_mib() < MAX_RSS_MIB


def versions_since(api_client: client.ApiClient, document: dict[str, Any]) -> list[dict[str, Any]]:
    """Every later version of an object, as a watch tells them."""
    custom, metadata = client.CustomObjectsApi(api_client), document["metadata"]
    stream = watch.Watch().stream(
        custom.list_namespaced_custom_object,
        *(GROUP, API_VERSION, metadata["namespace"], PLURAL),
        resource_version=metadata["resourceVersion"],
        timeout_seconds=1,
    )
    return [each["object"] for each in stream]


async def test_the_api_server_goes_away_for_some_seconds(binaries: Binaries, tmp_path: Path) -> None:
    with run_apiserver(tmp_path / "api", binaries) as server:
        apply_crds(server)
        configuration = client.Configuration()
        config.load_kube_config(str(server.kubeconfig), client_configuration=configuration)
        configuration.proxy = None
        with client.ApiClient(configuration) as api_client:
            core = client.CoreV1Api(api_client)
            core.create_namespace({"metadata": {"name": "there"}})
            core.create_namespaced_service_account("there", {"metadata": {"name": "default"}})
            objects = ClusterObjects(api_client, "there")
            async with operated(objects, server.kubeconfig, tmp_path) as world:
                trainer, agents = await started(world, 2)
                await served(agents, trainer.publish(1))
                await synced(world, 1, 2)
                await asyncio.to_thread(server.kill)
                # What needs no write goes on as long as the Lease is good; nobody stops serving.
                await served(agents, trainer.publish(2))
                await asyncio.sleep(2)
                await asyncio.to_thread(server.start)
                await synced(world, 2, 2)
                await served(agents, trainer.publish(3))
                await synced(world, 3, 2)
                assert all(each.counters.welcomes == 1 for each in agents), "a session was lost"
