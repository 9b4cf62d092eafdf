"""Who may speak for a pod, with real tokens at a real API server and the operator's real process."""

import asyncio
import json
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from aiohttp import ClientSession
from cluster_objects import ClusterObjects
from kubernetes import client
from operated import Operated, operated

from weightsync_contract.messages import PodRef
from weightsync_contract.names import MAX_FRAME_BYTES, SESSION_PATH
from weightsync_demo.kube.apiserver import ApiServer

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.usefixtures("crds")


@pytest.fixture
async def world(
    apiserver: ApiServer, api_client: client.ApiClient, namespace: str, tmp_path: Path
) -> AsyncIterator[Operated]:
    async with operated(ClusterObjects(api_client, namespace), apiserver.kubeconfig, tmp_path) as made:
        yield made


def hello(pod: PodRef, **changes: Any) -> dict[str, Any]:
    return {
        "type": "hello",
        "protocolMin": 1,
        "protocolMax": 1,
        "pod": {"namespace": pod.namespace, "name": pod.name, "uid": pod.uid},
        "role": "inference",
        "incarnation": "one",
        "term": 0,
        **changes,
    }


async def first_answer(
    url: str, token: str, frame: str, context: ssl.SSLContext | bool = True
) -> dict[str, Any]:
    """What the operator says to a first frame."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    async with (
        ClientSession() as http,
        http.ws_connect(url + SESSION_PATH, headers=headers, ssl=context) as socket,
    ):
        await socket.send_str(frame)
        answer: dict[str, Any] = await socket.receive_json(timeout=10)
        return answer


async def settled(world: Operated) -> str:
    """The url of an operator that leads."""
    operator = await world.start()
    # Leading is told by taking an agent.
    probe = await world.trainer()
    await probe.until(lambda a: a.counters.welcomes > 0)
    return operator.url


async def test_each_token_speaks_for_its_pod_only(world: Operated) -> None:
    url, objects = await settled(world), world.objects
    mine = await asyncio.to_thread(objects.pod, "vllm-0", "inference", "vllm")
    other = await asyncio.to_thread(objects.pod, "vllm-1", "inference", "vllm")
    strange = await asyncio.to_thread(objects.pod, "stranger", None, "vllm")

    async def answer(token: str, pod: PodRef, **changes: Any) -> tuple[str, str]:
        said = await first_answer(url, token, json.dumps(hello(pod, **changes)))
        return said.get("code", said["type"]), said.get("message", "")

    def token(pod: PodRef | None, audience: str = "weightsync") -> str:
        return objects.token(pod, audience)

    assert (await answer(token(mine), mine))[0] == "welcome"
    assert (await answer(token(other), mine))[0] == "WrongPod"
    assert (await answer(token(mine, "other"), mine))[0] == "TokenInvalid"
    assert (await answer(token(mine, ""), mine))[0] == "TokenInvalid"
    assert (await answer("", mine))[0] == "TokenInvalid"
    assert (await answer(token(mine)[:-8] + "AAAAAAAA", mine))[0] == "TokenInvalid"
    assert await answer(token(None), mine) == (
        "WrongPod",
        f"the token of system:serviceaccount:{objects.namespace}:default is bound to no pod: "
        "use a projected serviceAccountToken",
    )
    assert (await answer(token(strange), strange))[0] == "UnknownPod"
    assert (await answer(token(mine), mine, role="trainer"))[0] == "WrongPod"
    assert (await answer(token(mine), mine, protocolMin=2, protocolMax=3))[0] == "ProtocolUnsupported"
    assert (await answer(token(mine), PodRef("elsewhere", mine.name, mine.uid)))[0] == "WrongPod"


async def test_the_token_of_a_deleted_pod_is_no_good_for_its_successor(world: Operated) -> None:
    url, objects = await settled(world), world.objects
    first = await asyncio.to_thread(objects.pod, "vllm-0", "inference", "vllm")
    stolen = await asyncio.to_thread(objects.token, first)
    await asyncio.to_thread(objects.delete_pod, "vllm-0")
    second = await asyncio.to_thread(objects.pod, "vllm-0", "inference", "vllm")
    for pod in (first, second):
        said = await first_answer(url, stolen, json.dumps(hello(pod)))
        assert said["code"] in ("WrongPod", "UnknownPod", "TokenInvalid")
    said = await first_answer(url, await asyncio.to_thread(objects.token, second), json.dumps(hello(second)))
    assert said["type"] == "welcome"


@pytest.mark.parametrize(
    ("frame", "code"),
    [("{", "FrameMalformed"), ("[]", "FrameMalformed"), (" " * (MAX_FRAME_BYTES + 1), "FrameTooLarge")],
    ids=["no JSON", "a list", "oversized"],
)
async def test_a_bad_first_frame_is_refused(world: Operated, frame: str, code: str) -> None:
    url = await settled(world)
    said = await first_answer(url, "any", frame)
    assert (said["type"], said["code"]) == ("refused", code)
    # The one that behaves is still there.
    assert (await first_answer(url, "any", frame))["code"] == code


async def test_with_a_certificate_the_session_is_encrypted(world: Operated, apiserver: ApiServer) -> None:
    # A self-signed certificate for 127.0.0.1 that is at hand.
    certificate = apiserver.ca_file
    operator = await world.start(
        *("--session-cert", str(certificate), "--session-key", str(certificate.with_suffix(".key"))),
        *("--session-host", "127.0.0.1"),
    )
    pod = await asyncio.to_thread(world.objects.pod, "vllm-0", "inference", "vllm")
    token = await asyncio.to_thread(world.objects.token, pod)
    url = operator.url.replace("http://", "https://")
    context = ssl.create_default_context(cafile=str(certificate))
    answer = {"code": "NotLeader"}
    for _ in range(100):
        answer = await first_answer(url, token, json.dumps(hello(pod)), context)
        if answer.get("code") != "NotLeader":
            break
        await asyncio.sleep(0.05)
    assert answer["type"] == "welcome"
    with pytest.raises(OSError, match=r"ssl|SSL|certificate"):
        await first_answer(url, token, json.dumps(hello(pod)))


async def test_the_role_in_examples_is_enough_and_nothing_is_too_much(
    world: Operated, apiserver: ApiServer, tmp_path: Path
) -> None:
    """A whole rollout with the rights of examples/operator-rbac.yaml and no others."""
    await asyncio.to_thread(apiserver.kubectl, "apply", "-f", str(ROOT / "examples" / "operator-rbac.yaml"))
    account = ("weightsync-operator", "-n", "weightsync-system")
    token = await asyncio.to_thread(apiserver.kubectl, "create", "token", *account)
    kubeconfig = yaml.safe_load(apiserver.kubeconfig.read_text())
    kubeconfig["users"][0]["user"] = {"token": token.strip()}
    weak = tmp_path / "weak"
    weak.write_text(yaml.safe_dump(kubeconfig))

    await asyncio.to_thread(world.objects.weightsync)
    # For all namespaces, as it is bound.
    operator = await world.start("--all-namespaces", kubeconfig=weak, lease="weightsync-system")
    trainer, agents = await world.trainer(), await world.members(2)
    version = trainer.publish(1)
    await asyncio.gather(*(each.until_serving(version) for each in agents))
    await world.until_condition("Ready", "Synced")
    for _ in range(50):
        if any(each.reason == "Complete" for each in await asyncio.to_thread(world.objects.events)):
            break
        await asyncio.sleep(0.1)
    else:
        raise AssertionError("no Event")
    assert await asyncio.to_thread(operator.stop) == 0
    log = operator.log.read_text()
    assert ": 403 " not in log, log

    def may(verb: str, resource: str) -> bool:
        try:
            apiserver.kubectl(
                *("auth", "can-i", verb, resource, "-A"),
                "--as=system:serviceaccount:weightsync-system:weightsync-operator",
            )
        except Exception:
            return False
        return True

    assert await asyncio.to_thread(may, "list", "pods")
    ours = "weightsyncs.weightsync.dev"
    too_much = [
        ("update", ours),
        ("patch", ours),
        ("delete", "pods"),
        ("create", "pods/exec"),
        ("get", "secrets"),
    ]
    for verb, resource in [*too_much, ("list", "leases.coordination.k8s.io"), ("list", "namespaces")]:
        assert not await asyncio.to_thread(may, verb, resource), f"may {verb} {resource}"
