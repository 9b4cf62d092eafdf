"""A fleet in real pods, what a test does to it, and what its users meet meanwhile."""

import json
import os
import signal
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from http import HTTPStatus
from pathlib import Path
from typing import Any

import pod_manifests
import pod_trainer
import torch
from chart_release import Helm, Object
from kubernetes import client, config
from pod_manifests import ENGINE_PORT, LIMIT_RATE

from image_build import SITES, host_site
from images import image_name, project_version
from weightsync_cluster.cluster import Cluster
from weightsync_cluster.errors import ClusterError
from weightsync_cluster.kubectl import KubectlCluster, Namespace
from weightsync_demo.answers import TOKENS, Answer, Expected, RefusedError, Tally, Traffic, ask
from weightsync_demo.waiting import wait_for
from weightsync_engine.reference.llama import Cache, Config, Llama
from weightsync_engine.reference.model_files import TINY, random_weights

PROMPT = (72, 101, 80, 115, 90, 33)
WEIGHTSYNC = "policy"
TRANSFERRING = "Transferring"
UP_SECONDS = {"reference": 180.0, "vllm": 600.0, "gpu": 600.0}
"""For a server, from the wish for it to its first answer, on two cores that start others too."""
MARKERS = {
    "reference": "weightsync_engine.reference",
    "vllm": "vllm.entrypoints",
    "gpu": "vllm.entrypoints",
}
"""What is in the command line of an engine's process."""
LEADER_SECONDS = 60.0
"""The Lease of one who is gone lasts 15 s."""
PERIOD = 0.1
"""Seconds between two requests to one server."""


@dataclass(frozen=True)
class Pod:
    """What is to be known of one."""

    name: str
    uid: str
    node: str
    ip: str
    ready: bool
    restarts: int


@dataclass
class Scene:
    """One scenario: what happened, when, how long it took, and what the servers' users met."""

    engine: str
    scenario: str
    event: str
    when: str = ""
    seconds: float = 0.0
    touched: tuple[str, ...] = ()
    """Servers that may refuse or fail: they were killed, are new, or were cut off."""
    tallies: dict[str, Tally] = field(default_factory=dict)
    _began: float = 0.0

    def begin(self, when: str) -> None:
        """The event is now."""
        self.when, self._began = when, time.monotonic()

    def end(self) -> None:
        """All serve the right version now."""
        self.seconds = time.monotonic() - self._began

    def row(self) -> dict[str, Any]:
        """For the table."""
        tallies = list(self.tallies.items())
        others = [tally for name, tally in tallies if name not in self.touched]
        return {
            "engine": self.engine,
            "scenario": self.scenario,
            "event": self.event,
            "when": self.when,
            "seconds": round(self.seconds, 1),
            "right": sum(tally.right for _, tally in tallies),
            "across": sum(tally.across for _, tally in tallies),
            "unanswered_by_others": sum(tally.refused + tally.failed for tally in others),
            "unanswered_by_touched": sum(
                tally.refused + tally.failed for name, tally in tallies if name in self.touched
            ),
            "wrong": sum(len(tally.wrong) for _, tally in tallies),
        }

    def check(self) -> None:
        """Nobody was answered wrong; whoever was not touched answered everybody."""
        for name, tally in self.tallies.items():
            assert not tally.wrong, f"{self.scenario}: {tally.wrong}"
            if name not in self.touched:
                assert (tally.refused, tally.failed) == (0, 0), f"{self.scenario}: {name} {tally}"
                assert tally.right > 0, f"{self.scenario}: nobody asked {name}"


class Release:
    """The operator, installed by its chart as a user would."""

    def __init__(self, helm: Helm, namespace: Namespace, **values: Any) -> None:
        self._helm, self.namespace, self._values = helm, namespace, values

    def install(self, **values: Any) -> None:
        """Install it, or upgrade it with these values on top of those that it has."""
        self._helm.install(self.namespace.name, **self._values, **values)


class PodFleet:
    """A trainer and servers in the pods of one namespace; ``release`` is the operator's.

    ``model`` is the directory of the checkpoint that the servers begin with, ``name`` is for the namespace: two fleets
    of one kind have to differ.
    """

    least_margin = 1e-3
    """By how many logits each token of a version's answer has to be ahead, for the answer to be a fair test."""

    def __init__(
        self, cluster: KubectlCluster, kind: str, release: Release, model: Path, name: str = ""
    ) -> None:
        self.cluster, self.kind, self.model = cluster, kind, model
        self.namespace = Namespace(cluster, f"fleet-{name or kind}")
        self.release, self.upgrade = release.namespace, release.install
        self.up_seconds = UP_SECONDS[kind]
        self.version = 0
        self._traffic: dict[str, Traffic] = {}
        self._expected: dict[int, Expected] = {}
        self._answers: dict[int, Expected] = {}
        self._pods: dict[str, Pod] = {}
        self._ended = threading.Event()
        self._looking = threading.Thread(target=self._look, name="pods", daemon=True)
        self._looking.start()

    def create(self) -> None:
        """Make the namespace, the WeightSync, the trainer, and two servers."""
        self.namespace.create()
        self.apply(*self.manifests())

    def manifests(self) -> list[Object]:
        """What is applied."""
        image, site = image_name("vllm", project_version()), (host_site(), SITES["vllm"])
        return [
            pod_manifests.weightsync(),
            *pod_manifests.trainer(image, site, LIMIT_RATE, self.cluster.nodes[0]),
            *pod_manifests.engines(self.kind, image, site, self.model, 2),
        ]

    def close(self) -> None:
        """End the steady requests, and remove the namespace."""
        self._ended.set()
        for traffic in self._traffic.values():
            traffic.stop()
        self._looking.join(10)
        self.namespace.delete()

    # --------------------------------------------------------------------------------- what is seen

    @cached_property
    def _core(self) -> client.CoreV1Api:
        configuration = client.Configuration()
        config.load_kube_config(str(self.cluster.kubeconfig), client_configuration=configuration)
        configuration.proxy = None
        return client.CoreV1Api(client.ApiClient(configuration))

    @cached_property
    def _custom(self) -> client.CustomObjectsApi:
        return client.CustomObjectsApi(self._core.api_client)

    def pods(self, app: str = "") -> dict[str, Pod]:
        """The pods that are not about to go, by name; of one application, if it is named."""
        answer = self._core.list_namespaced_pod(
            self.namespace.name, label_selector=f"app={app}" if app else "", _preload_content=False
        )
        found = {}
        for item in json.loads(answer.data)["items"]:
            if "deletionTimestamp" in item["metadata"]:
                continue
            status = item["status"]
            ready = any(c["type"] == "Ready" and c["status"] == "True" for c in status.get("conditions", ()))
            statuses = (*status.get("containerStatuses", ()), *status.get("initContainerStatuses", ()))
            name = item["metadata"]["name"]
            found[name] = Pod(
                name,
                item["metadata"]["uid"],
                item["spec"].get("nodeName", ""),
                status.get("podIP", ""),
                ready,
                sum(each["restartCount"] for each in statuses),
            )
        return found

    def _look(self) -> None:
        while not self._ended.wait(0.3):
            try:
                self._pods = self.pods()
            except (OSError, client.ApiException):
                continue

    @property
    def engines(self) -> list[str]:
        """The servers that are asked."""
        return list(self._traffic)

    def status(self) -> dict[str, Any]:
        """The WeightSync's status; empty before the first, and without a WeightSync."""
        try:
            found = self._custom.get_namespaced_custom_object(
                "weightsync.dev", "v1alpha1", self.namespace.name, "weightsyncs", WEIGHTSYNC
            )
        except client.ApiException as error:
            if error.status == HTTPStatus.NOT_FOUND:
                return {}
            raise
        return dict(found.get("status", {}))

    def moment(self, version: int) -> str:
        """Where the rollout of ``version`` is, for the table."""
        phase = self._phase_of(version)
        return "in mid-transfer" if phase == TRANSFERRING else f"as of {phase or 'no rollout'}"

    def _phase_of(self, version: int) -> str:
        status = self.status()
        if status.get("rollout", {}).get("version") != version:
            return ""
        return str(next(each["reason"] for each in status["conditions"] if each["type"] == "Progressing"))

    def wait_rollout(
        self, version: int, *phases: str, then: Callable[[], None] = lambda: None, seconds: float = 60.0
    ) -> str:
        """Until the rollout of ``version`` is in one of these phases; ``then`` is called at once. Which it was."""

        def found() -> str:
            now = self._phase_of(version)
            return now if now in phases else ""

        what = f"version {version} in phase {' or '.join(phases)}"
        seen = wait_for(found, seconds, what, interval=0.005)
        then()
        return seen

    def back(self, name: str, restarts: int) -> bool:
        """Whether a pod had more restarts than that, and is Ready."""
        pod = self.pods().get(name)
        return pod is not None and pod.restarts > restarts and pod.ready

    # ---------------------------------------------------------------------------------- what is asked

    def ask(self, name: str) -> Answer:
        """One completion by a server. Raises RefusedError, OSError."""
        with self.reaching(name, ENGINE_PORT) as (host, port, path):
            return ask(port, PROMPT, TOKENS, host, path)

    @contextmanager
    def reaching(self, pod: str, port: int) -> Iterator[tuple[str, int, str]]:
        """Host, port and the path's beginning, by which this thread reaches a pod's port within the block."""
        found = self._pods.get(pod)
        if found is None or not found.ip:
            raise ConnectionError(f"{pod} has no address")
        assert isinstance(self.cluster, Cluster)
        with self.cluster.inside():
            yield found.ip, port, ""

    def expected(self, version: int) -> Expected | None:
        """What the trainer's weights answer; None for a version that was never published."""
        return self._expected.get(version)

    def up(self, name: str) -> bool:
        """Whether its engine answers at all, and if only that it has no permit."""
        try:
            self.ask(name)
        except RefusedError:
            return True
        except OSError:
            return False
        return True

    def watch(self, *names: str) -> None:
        """Wait until these servers are up, then ask them all the time."""
        for name in names:
            wait_for(partial(self.up, name), self.up_seconds, f"{name}'s engine to answer")
            self._traffic[name] = Traffic(name, partial(self.ask, name), self.expected, PERIOD)
            self._traffic[name].start()

    def forget(self, *names: str) -> None:
        """Ask these no more."""
        for name in names:
            self._traffic.pop(name).stop()

    # ------------------------------------------------------------------------------------- what is done

    @property
    def next_version(self) -> int:
        """The one that `publish` publishes: the next whose answer is a fair test."""
        version = self.version + 1
        while self._answer(version).margin < self.least_margin:
            version += 1
        return version

    def _answer(self, version: int) -> Expected:
        if version not in self._answers:
            self._answers[version] = _answer_of(self.model, version)
        return self._answers[version]

    def publish(self) -> int:
        """The next version, published; returns it."""
        self.version = self.next_version
        self._expected[self.version] = self._answer(self.version)
        with self.reaching("trainer-0", pod_trainer.PORT) as (host, port, path):
            url = f"http://{host}:{port}{path}/publish?version={self.version}"
            opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            with opener.open(urllib.request.Request(url, data=b""), timeout=90) as answer:
                assert json.loads(answer.read())["digest"]
        return self.version

    def publish_into_transfer(self) -> int:
        """The next version, published, with its bytes on the way; returns it."""
        version = self.publish()
        self.wait_rollout(version, TRANSFERRING)
        return version

    def serves(self, name: str, version: int) -> bool:
        """Does it answer as that version? RefusedError and OSError count as not yet."""
        answer, expected = self.ask(name), self._expected[version]
        return answer.version == version and answer.tokens == expected.tokens

    def wait_served(self, version: int, names: list[str] | None = None, seconds: float = 90.0) -> None:
        """Until all these servers, else all that are asked, answer as ``version``."""
        for name in self.engines if names is None else names:
            what = f"{name} to serve version {version}"
            try:
                wait_for(partial(self.serves, name, version), seconds, what, ignoring=(RefusedError, OSError))
            except TimeoutError as error:
                raise TimeoutError(f"{error}; status {json.dumps(self.status(), indent=1)}") from error

    def apply(self, *objects: Object) -> None:
        self.namespace.apply(*objects)

    def kill_container(self, pod: str, marker: str, namespace: Namespace | None = None) -> None:
        """SIGKILL the processes of a pod that have ``marker`` in their command line; the kubelet starts it again."""
        self.killer(pod, marker, namespace)()

    def killer(self, pod: str, marker: str, namespace: Namespace | None = None) -> Callable[[], None]:
        """The same, prepared: what is called kills at once."""
        uid = (namespace or self.namespace).read("pod", pod)["metadata"]["uid"]
        # cgroupfs has a pod's uid as it is, systemd with underscores. Nodes' processes are this machine's, too.
        names = (uid, uid.replace("-", "_"))
        found = [
            int(entry.name)
            for entry in Path("/proc").iterdir()
            if entry.name.isdecimal()
            and marker in _text(entry / "cmdline")
            and any(name in _text(entry / "cgroup") for name in names)
        ]
        assert found, f"{pod} has no process with {marker!r}"

        def kill() -> None:
            for pid in found:
                os.kill(pid, signal.SIGKILL)

        return kill

    def kill_engine(self, pod: str) -> None:
        """SIGKILL a server's engine; its agent lives on."""
        self.kill_container(pod, MARKERS[self.kind])

    def kill_pod(self, pod: str) -> None:
        """Take a pod away at once, as an eviction without grace does."""
        self.namespace.kubectl("delete", "pod", pod, "--grace-period=0", "--force", "--wait=false")

    def replace_trainer(self) -> None:
        """Take the trainer's pod away at once, and wait until another is Ready."""
        before = self.pods("trainer")["trainer-0"].uid
        self.kill_pod("trainer-0")

        def another() -> bool:
            pod = self.pods("trainer").get("trainer-0")
            return pod is not None and pod.uid != before and pod.ready

        wait_for(another, self.up_seconds, "another trainer-0")

    def leader(self) -> str:
        """The pod of the operator that leads, once one does: who held the Lease may be gone."""

        def found() -> str:
            lease = self.release.read("lease", "weightsync-operator")
            holder = str(lease["spec"].get("holderIdentity") or "")
            pods = self.release.read("pods")["items"]
            names = [pod["metadata"]["name"] for pod in pods if "deletionTimestamp" not in pod["metadata"]]
            return next((name for name in names if holder.startswith(name)), "")

        return wait_for(found, LEADER_SECONDS, "a replica of the operator to lead")

    def wait_operator(self) -> None:
        """Until all of its replicas are there and Ready."""
        self.release.kubectl(
            "rollout", "status", "deployment/weightsync-operator", "--timeout=120s", timeout=130
        )

    def operator_nodes(self) -> list[str]:
        """Where its replicas are, one entry each."""
        pods = self.release.read("pods")["items"]
        return sorted(
            pod["spec"].get("nodeName", "") for pod in pods if "deletionTimestamp" not in pod["metadata"]
        )

    @contextmanager
    def scene(self, scenario: str, event: str, touched: tuple[str, ...] = ()) -> Iterator[Scene]:
        """Tallies of the steady requests within the block, checked at its end."""
        made = Scene(self.kind, scenario, event, touched=touched)
        for traffic in self._traffic.values():
            traffic.tally = Tally()
        try:
            yield made
            made.tallies = {name: traffic.tally for name, traffic in self._traffic.items()}
            made.check()
        except BaseException:
            print(self.story())
            raise

    def story(self) -> str:
        """What was said lately, for whoever looks for the reason of a failure."""
        told = [json.dumps(self.status(), indent=1)]
        for space in (self.namespace, self.release):
            told.append(space.kubectl("get", "pods", "--output=wide"))
            for name in space.read("pods")["items"]:
                pod = name["metadata"]["name"]
                try:
                    log = space.kubectl("logs", pod, "--all-containers", "--prefix", "--tail=25", timeout=10)
                except ClusterError as error:
                    # Its node may be what was killed.
                    log = str(error)
                told += [f"---- {pod}", log]
        return "\n".join(told)


def _answer_of(model: Path, version: int) -> Expected:
    """Computed from the weights themselves, greedily, with the least lead of a token over the next one."""
    llama = Llama(Config.read(model), random_weights(TINY, pod_trainer.SEED + version))
    cache, made, margin, new = Cache(), list[int](), float("inf"), list(PROMPT)
    with torch.inference_mode():
        for _ in range(TOKENS):
            top = torch.topk(llama.forward(torch.tensor(new), cache), 2)
            margin = min(margin, float(top.values[0] - top.values[1]))
            new = [int(top.indices[0])]
            made += new
    return Expected(tuple(made), "", margin)


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        # It ended meanwhile.
        return ""
