"""``weightsync`` as a process, against a real API server, a real operator and fake agents."""

import asyncio
import json
import os
import re
import socket
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cluster_objects import ClusterObjects
from fake_agents import FakeAgent, Stop
from kubernetes import client
from operated import Operated, operated, row

from weightsync_demo.kube.apiserver import ApiServer

pytestmark = pytest.mark.usefixtures("crds")


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
async def world(
    apiserver: ApiServer, api_client: client.ApiClient, namespace: str, tmp_path: Path
) -> AsyncIterator[Operated]:
    async with operated(ClusterObjects(api_client, namespace), apiserver.kubeconfig, tmp_path) as made:
        yield made


async def cli(world: Operated, apiserver: ApiServer, *arguments: str) -> Done:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "weightsync_operator.cli.main", *arguments),
        *("-n", world.objects.namespace),
        # As kubectl does: the environment says where the cluster is.
        env={**os.environ, "KUBECONFIG": str(apiserver.kubeconfig)},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await asyncio.wait_for(process.communicate(), 60)
    return Done(process.returncode or 0, out.decode(), err.decode())


def operator_of(world: Operated) -> str:
    return f"{world.objects.namespace}/weightsync-operator"


async def started(world: Operated) -> tuple[FakeAgent, list[FakeAgent]]:
    await asyncio.to_thread(world.objects.weightsync)
    await world.start()
    trainer = await world.trainer()
    agents = await world.members(2)
    for each in (trainer, *agents):
        await each.until(lambda agent: agent.desired is not None)
    return trainer, agents


async def test_status_shows_the_live_fleet(world: Operated, apiserver: ApiServer) -> None:
    trainer, agents = await started(world)
    version = trainer.publish(7)
    await asyncio.gather(*(each.until_serving(version, 20) for each in agents))
    await world.until_condition("Ready", "Synced")
    done = await cli(world, apiserver, "status", "policy", "-o", "json", "--operator", operator_of(world))
    assert done.code == 0, done.err
    page = done.json
    assert (page["live"], page["hint"], page["ready"], page["current"]) == (True, "", "True", "run-1/7")
    rows = {row["name"]: row for row in page["members"]}
    assert [rows[name]["rank"] for name in ("trainer-0", "vllm-0", "vllm-1")] == [0, 1, 2]
    assert {rows[name]["version"] for name in ("vllm-0", "vllm-1")} == {"run-1/7"}
    assert {rows[name]["phase"] for name in ("vllm-0", "vllm-1")} == {"Serving"}
    assert rows["vllm-0"]["age"] >= 0
    text = (await cli(world, apiserver, "status", "policy", "--operator", operator_of(world))).out
    assert "fleet run-1/7" in text
    assert text.count("Serving") == 2


def own_address() -> str:
    """An address of this machine's that an API server will proxy to: no loopback."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            # Nothing is sent: the kernel only looks which address it would send from.
            probe.connect(("192.0.2.1", 9))
        except OSError:
            pytest.skip("this machine has no network but its loopback")
        address: str = probe.getsockname()[0]
    return address


def serve(world: Operated, address: str, ports: list[int]) -> None:
    """What a controller-manager would make of a Service with these pods behind it; each has its own port here."""
    core, namespace, name = world.objects.core, world.objects.namespace, "weightsync-operator"
    core.create_namespaced_service(
        namespace, {"metadata": {"name": name}, "spec": {"ports": [{"name": "session", "port": 8443}]}}
    )
    subsets = []
    for port in ports:
        container = {"name": "operator", "image": "none.invalid/none"}
        pod = core.create_namespaced_pod(
            namespace,
            {
                "metadata": {"name": f"{name}-{port}"},
                "spec": {"serviceAccountName": "default", "containers": [container]},
            },
        ).metadata
        # An API server proxies to what is a pod, and to nothing else.
        told = {"status": {"podIP": address, "podIPs": [{"ip": address}]}}
        core.patch_namespaced_pod_status(pod.name, namespace, told)
        target = {"kind": "Pod", "namespace": namespace, "name": pod.name, "uid": pod.uid}
        subsets.append(
            {
                "addresses": [{"ip": address, "targetRef": target}],
                "ports": [{"name": "session", "port": port}],
            }
        )
    core.create_namespaced_endpoints(namespace, {"metadata": {"name": name}, "subsets": subsets})


async def until_live(world: Operated, apiserver: ApiServer, *arguments: str) -> dict[str, Any]:
    """The page, once the operator has decided something."""
    page: dict[str, Any] = {}
    async with asyncio.timeout(30):
        while not page.get("live"):
            done = await cli(world, apiserver, "status", "policy", "-o", "json", *arguments)
            assert done.code == 0, done.err
            page = done.json
            assert page["live"] or "decided nothing" in page["hint"], page["hint"]
    return page


def kubeconfig_of(world: Operated, apiserver: ApiServer, account: str, directory: Path) -> str:
    """A kubeconfig for a ServiceAccount of the namespace."""
    token = world.objects.token(None, "", account)
    path = directory / account
    path.write_text(apiserver.kubeconfig.read_text().replace(apiserver.token, token))
    return str(path)


async def test_the_way_through_the_api_server(world: Operated, apiserver: ApiServer, tmp_path: Path) -> None:
    # Two replicas with an authority of their own; the operator is found by the namespace's certificates.
    address = own_address()
    await asyncio.to_thread(world.objects.weightsync)
    settings = ("--session-service", f"weightsync-operator.{world.objects.namespace}.svc")
    reach = ("--session-host", "0.0.0.0", "--advertise-host", address)
    operators = [await world.start(*settings, *reach) for _ in range(2)]
    await world.until_status(lambda s: len(s["conditions"]) == 4)
    await asyncio.to_thread(serve, world, address, [each.ports["session"] for each in operators])
    page = await until_live(world, apiserver)
    assert page["reason"] == "NoMembers"
    # The two rights that the page names, and not one of them alone.
    edit = [
        {"apiGroups": ["weightsync.dev"], "resources": ["weightsyncs"], "verbs": ["get"]},
        {"apiGroups": [""], "resources": ["pods"], "verbs": ["list"]},
        {"apiGroups": [""], "resources": ["configmaps"], "verbs": ["get"]},
        {"apiGroups": [""], "resources": ["serviceaccounts/token"], "verbs": ["create"]},
    ]
    service = {
        "apiGroups": [""],
        "resources": ["services/proxy"],
        "resourceNames": ["https:weightsync-operator:8443"],
        "verbs": ["get"],
    }
    for account, rules, live in (("editor", edit, False), ("reader", [*edit, service], True)):
        await asyncio.to_thread(world.objects.allow, account, rules)
        kubeconfig = await asyncio.to_thread(kubeconfig_of, world, apiserver, account, tmp_path)
        done = await cli(world, apiserver, "status", "policy", "-o", "json", "--kubeconfig", kubeconfig)
        assert (done.code, done.json["live"]) == (0, live), done
        assert live or "ask for get on services/proxy" in done.json["hint"]


async def test_a_certificate_is_checked_where_the_operator_is_dialled(
    world: Operated, apiserver: ApiServer
) -> None:
    await asyncio.to_thread(world.objects.weightsync)
    settings = ("--session-service", f"weightsync-operator.{world.objects.namespace}.svc")
    operator = await world.start(*settings, "--session-host", "127.0.0.1")
    await world.until_status(lambda s: len(s["conditions"]) == 4)
    assert (await until_live(world, apiserver))["phase"] == "NoMembers"
    # The same operator, said to be another one: the certificate is not for that name.
    url = f"https://127.0.0.1:{operator.ports['session']}"
    done = await cli(
        world,
        apiserver,
        "status",
        "policy",
        "-o",
        "json",
        "--operator",
        "elsewhere/other",
        "--operator-url",
        url,
    )
    assert done.code == 0
    assert not done.json["live"]
    assert "certificate" in done.json["hint"].lower()


async def test_without_the_operator_status_and_pods_are_shown_and_what_is_missing(
    world: Operated, apiserver: ApiServer
) -> None:
    await asyncio.to_thread(world.objects.weightsync)
    await asyncio.to_thread(world.objects.pod, "vllm-0", "inference", "vllm")
    done = await cli(world, apiserver, "status", "policy", "--operator", operator_of(world))
    assert done.code == 0
    assert "vllm-0" in done.out
    assert "no operator has looked at this WeightSync yet" in " ".join(done.out.split())
    assert "no live view: there is no Service weightsync-operator in" in " ".join(done.out.split())


async def test_a_watch_ends_when_the_rollout_is_done(world: Operated, apiserver: ApiServer) -> None:
    trainer, agents = await started(world)
    agents[0].hold(Stop.TRANSFER)
    version = trainer.publish(3)
    watching = asyncio.create_task(
        cli(world, apiserver, "get", "policy", "--watch", "--timeout", "40", "--operator", operator_of(world))
    )
    await world.until_condition("Progressing", "Transferring")
    assert not watching.done()
    agents[0].let_go()
    await asyncio.gather(*(each.until_serving(version, 20) for each in agents))
    done = await watching
    assert (done.code, done.err.strip()) == (0, "run-1/3 is the newest version"), done
    assert "synced 2/2" in done.out.splitlines()[-1]


async def test_a_watch_of_a_rollout_that_fails_ends_with_1(world: Operated, apiserver: ApiServer) -> None:
    timeouts = {"joinSeconds": 1, "transferSeconds": 1, "commitSeconds": 1, "progressSeconds": 4}
    await asyncio.to_thread(
        lambda: world.objects.weightsync(timeouts=timeouts, strategy={"maxUnavailable": 0})
    )
    await world.start()
    trainer = await world.trainer()
    (agent,) = await world.members(1)
    await agent.until(lambda each: each.desired is not None)
    agent.hold(Stop.TRANSFER)
    trainer.publish(1)
    done = await cli(world, apiserver, "get", "policy", "--watch", "--timeout", "50s", "-o", "json")
    assert done.code == 1, done
    assert "run-1/1" in done.err
    assert all(json.loads(line)["name"] == "policy" for line in done.out.splitlines())


async def test_a_watch_that_ends_at_its_timeout_says_so(world: Operated, apiserver: ApiServer) -> None:
    await asyncio.to_thread(world.objects.weightsync)
    done = await cli(world, apiserver, "get", "policy", "--watch", "--timeout", "1s")
    assert (done.code, done.err.strip()) == (3, "not done after 1 s")


async def test_pause_and_resume_wait_for_the_operators_answer(world: Operated, apiserver: ApiServer) -> None:
    trainer, agents = await started(world)
    paused = await cli(world, apiserver, "pause", "policy")
    assert paused.code == 0, paused.err
    assert "no new phase starts" in paused.out
    trainer.publish(1)
    await world.until_condition("Progressing", "Paused")
    assert not any(agent.served for agent in agents)
    resumed = await cli(world, apiserver, "resume", "policy", "-o", "json")
    assert resumed.json["exit"] == 0
    await world.until_status(lambda s: row(s, "Ready")["reason"] == "Synced" and s["synced"] == "2/2")


async def test_abort_retry_and_rollback_are_answered(world: Operated, apiserver: ApiServer) -> None:
    trainer, agents = await started(world)
    first = trainer.publish(1)
    await asyncio.gather(*(each.until_serving(first, 20) for each in agents))
    await world.until_status(lambda s: s["current"]["version"] == 1)
    agents[0].hold(Stop.TRANSFER)
    trainer.publish(2)
    await world.until_condition("Progressing", "Transferring")
    stale = await cli(world, apiserver, "promote", "policy", "--version", "run-1/2")
    assert (stale.code, "is not paused" in stale.err) == (1, True), stale
    aborted = await cli(world, apiserver, "abort", "policy")
    assert (aborted.code, "abort run-1/2: run-1/2 is given up" in aborted.out) == (0, True), aborted
    assert (await cli(world, apiserver, "get", "policy", "--watch", "--timeout", "20")).code == 1
    agents[0].let_go()
    retried = await cli(world, apiserver, "retry", "policy", "-o", "json")
    assert (retried.code, retried.json["about"]) == (0, "run-1/2"), retried
    await world.until_status(lambda s: s["current"]["version"] == 2 and s["synced"] == "2/2")
    back = await cli(world, apiserver, "rollback", "policy")
    assert (back.code, "all go from run-1/2 to run-1/1" in back.out) == (0, True), back
    done = await cli(world, apiserver, "get", "policy", "--watch", "--timeout", "40")
    assert (done.code, "run-1/2 was given up; run-1/1 stays" in done.err) == (0, True), done
    # The same word again is another word.
    again = await cli(world, apiserver, "rollback", "policy", "--version", "1")
    assert (again.code, "run-1/1 is the current version" in again.err) == (1, True), again


async def test_a_canary_is_promoted(world: Operated, apiserver: ApiServer) -> None:
    steps = {"steps": [{"members": 1, "pause": {}}]}
    await asyncio.to_thread(lambda: world.objects.weightsync(strategy=steps))
    await world.start()
    trainer = await world.trainer()
    agents = await world.members(2)
    for each in (trainer, *agents):
        await each.until(lambda agent: agent.desired is not None)
    # The first version of all goes to everybody.
    first = trainer.publish(1)
    await asyncio.gather(*(each.until_serving(first, 20) for each in agents))
    await world.until_status(lambda s: s["current"]["version"] == 1)
    trainer.publish(2)
    await world.until_condition("Progressing", "CanaryPaused")
    early = await cli(world, apiserver, "get", "policy", "--watch", "--timeout", "1")
    assert early.code == 3, "a pause is waited through"
    promoted = await cli(world, apiserver, "promote", "policy")
    assert (promoted.code, "run-1/2 goes on after step 1 of 1" in promoted.out) == (0, True), promoted
    await world.until_status(lambda s: s["current"]["version"] == 2 and s["synced"] == "2/2")


async def test_a_pin_is_a_target_and_latest_ends_it(world: Operated, apiserver: ApiServer) -> None:
    trainer, agents = await started(world)
    for number in (1, 2):
        version = trainer.publish(number)
        await asyncio.gather(*(each.until_serving(version, 20) for each in agents))
        await world.until_status(lambda s, n=number: s["current"]["version"] == n)
    pinned = await cli(world, apiserver, "pin", "policy", "1")
    assert pinned.code == 0, pinned.err
    await world.until_status(lambda s: s["current"]["version"] == 1 and s["synced"] == "2/2")
    spec = (await asyncio.to_thread(world.objects.read))["spec"]
    assert spec["target"] == {"policy": "Pinned", "run": "run-1", "version": 1}
    freed = await cli(world, apiserver, "pin", "policy", "latest")
    assert freed.code == 0, freed.err
    await world.until_status(lambda s: s["current"]["version"] == 2 and s["synced"] == "2/2")


async def test_a_verb_without_an_operator_ends_at_its_timeout(world: Operated, apiserver: ApiServer) -> None:
    await asyncio.to_thread(world.objects.weightsync)
    done = await cli(world, apiserver, "pause", "policy", "--timeout", "1")
    assert done.code == 3
    assert "no answer within 1 s" in done.err
    # It was asked for all the same, and whoever starts next obeys.
    assert (await asyncio.to_thread(world.objects.read))["spec"]["paused"] is True


async def test_every_command_of_the_page_does_something(world: Operated, apiserver: ApiServer) -> None:
    page = (Path(__file__).parents[2] / "docs/cli.md").read_text()
    blocks = re.findall(r"^```\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    lines = re.findall(r"^weightsync ([^#\n>]+)", "".join(blocks), re.MULTILINE)
    trainer, agents = await started(world)
    for number in (899, 900, 901):
        version = trainer.publish(number)
        await asyncio.gather(*(each.until_serving(version, 20) for each in agents))
        await world.until_status(lambda s, n=number: s["current"]["version"] == n)
    codes: dict[str, int] = {}
    said = []
    for line in lines:
        words = line.replace("run-7f3a/", "run-1/").split()
        if words[0] != "completion":
            done = await cli(world, apiserver, *words)
            assert "Traceback" not in done.err, done.err
            assert done.out or done.err
            codes[" ".join(line.split())] = done.code
            said.append((line, done))
    # A fleet at rest has nothing to abort, retry or promote, and its pods here have no agent's container.
    refused = {"abort policy", "retry policy", "promote policy", "doctor policy", "doctor"}
    assert {line for line, code in codes.items() if code == 1} == refused, said
    assert {code for line, code in codes.items() if line not in refused} == {0}
    assert len(codes) >= 12


async def test_what_is_not_there_is_said(world: Operated, apiserver: ApiServer) -> None:
    done = await cli(world, apiserver, "status", "polcy")
    assert done.code == 4
    assert '"polcy" not found' in done.err
    nothing = await cli(world, apiserver, "get")
    assert (nothing.code, nothing.out) == (0, "")
    assert world.objects.namespace in nothing.err


async def test_kubectl_finds_and_completes_it(world: Operated, apiserver: ApiServer) -> None:
    await asyncio.to_thread(world.objects.weightsync)
    scripts = Path(sys.executable).parent
    env = {**os.environ, "KUBECONFIG": str(apiserver.kubeconfig), "PATH": f"{scripts}:{os.environ['PATH']}"}

    async def kubectl(*arguments: str) -> str:
        process = await asyncio.create_subprocess_exec(
            str(apiserver.binaries.kubectl), *arguments, env=env, stdout=asyncio.subprocess.PIPE
        )
        out, _ = await asyncio.wait_for(process.communicate(), 60)
        assert process.returncode == 0
        return out.decode()

    got = await kubectl("weightsync", "get", "-n", world.objects.namespace, "-o", "json")
    assert [each["name"] for each in json.loads(got)] == ["policy"]
    assert (await kubectl("__complete", "weightsync", "roll")).splitlines()[0] == "rollback"
    names = await kubectl("__complete", "weightsync", "status", "-n", world.objects.namespace, "")
    assert names.splitlines()[0] == "policy"


async def test_all_weightsyncs_of_a_namespace(world: Operated, apiserver: ApiServer) -> None:
    for name in ("one", "two"):
        await asyncio.to_thread(world.objects.weightsync, name, app=name)
    done = await cli(world, apiserver, "get")
    assert [line.split()[0] for line in done.out.splitlines()] == ["NAME", "one", "two"]
    offered = await cli(world, apiserver, "__complete", "status", "-n", world.objects.namespace, "t")
    assert "one" not in offered.out


async def test_the_doctor_finds_what_is_missing(world: Operated, apiserver: ApiServer) -> None:
    await started(world)
    await asyncio.to_thread(world.objects.weightsync, "other", app="nobody-")
    place = ("--operator", operator_of(world))
    done = await cli(world, apiserver, "doctor", "-o", "json", *place)
    assert done.code == 1
    found = {(each["check"], each["level"], each["subject"]) for each in done.json}
    # These pods have fake agents outside of them, and this operator makes no certificates.
    assert {("agent", "problem", f"pod {name}") for name in ("trainer-0", "vllm-0", "vllm-1")} <= found
    assert ("bundle", "problem", f"ConfigMap {world.objects.namespace}/weightsync-ca") in found
    assert ("selectors", "problem", "other spec.trainer.selector") in found
    messages = " ".join(each["message"] for each in done.json)
    assert "all 3 agents of policy are connected" in messages
    assert " leads" in messages
    text = (await cli(world, apiserver, "doctor", "policy", *place)).out
    assert "-> label its template weightsync.dev/inject=true" in " ".join(text.split())
    assert "other" not in text


async def test_who_may_do_little_is_told_what_he_may_not(
    world: Operated, apiserver: ApiServer, tmp_path: Path
) -> None:
    rules = [{"apiGroups": ["weightsync.dev"], "resources": ["weightsyncs"], "verbs": ["get", "list"]}]
    await asyncio.to_thread(world.objects.weightsync)
    await asyncio.to_thread(world.objects.allow, "reader", rules)
    kubeconfig = await asyncio.to_thread(kubeconfig_of, world, apiserver, "reader", tmp_path)
    status = await cli(world, apiserver, "status", "policy", "-o", "json", "--kubeconfig", kubeconfig)
    assert status.code == 0
    assert "ask for create on serviceaccounts/token" in status.json["hint"]
    doctor = await cli(world, apiserver, "doctor", "-o", "json", "--kubeconfig", kubeconfig)
    assert {"pods can't be listed", "it can't be read"} <= {
        each["message"].partition(":")[0] for each in doctor.json if each["level"] == "unknown"
    }
    pause = await cli(world, apiserver, "pause", "policy", "--kubeconfig", kubeconfig)
    assert pause.code == 4
    assert "cannot patch resource" in pause.err
