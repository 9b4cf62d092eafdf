"""Stands in for the kubelet: starts each pod's processes, restarts what ends, stops what is deleted.

It decides from what is there (the pods at the API server and the processes' exit codes), once every half
second; nothing but it touches the processes, except the demo's own fault.
"""

import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from weightsync_contract.reasons import Role
from weightsync_demo.cluster import Cluster, Pod
from weightsync_demo.processes import Process

_PERIOD: Final = 0.5
_BACKOFF: Final = 1.0
_GRACE: Final = 5.0

Launch = Callable[[Path], Process]
"""Makes the workload's process (not started), given the directory that it shares with its agent."""


@dataclass(frozen=True)
class PodSpec:
    """A pod as the demo describes it."""

    name: str
    role: Role
    app: str
    launch: Launch
    agent_arguments: Sequence[str] = field(default=())


@dataclass
class RunningPod:
    """A pod and its two processes."""

    spec: PodSpec
    pod: Pod
    workload: Process
    agent: Process


class Supervisor:
    """Runs the pods that it was given until stopped."""

    def __init__(
        self,
        cluster: Cluster,
        operator_url: str,
        bundle: Path,
        directory: Path,
        say: Callable[[str], None],
    ) -> None:
        self._cluster = cluster
        self._operator = operator_url
        self._bundle = bundle
        self._directory = directory
        self._say = say
        self._pods: dict[str, RunningPod] = {}
        self._lock = threading.RLock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="supervisor", daemon=True)

    def start(self) -> None:
        """Begin to watch."""
        self._thread.start()

    def stop(self) -> None:
        """End every process."""
        self._ended.set()
        self._thread.join(10)
        with self._lock:
            for running in self._pods.values():
                for process in (running.agent, running.workload):
                    process.stop(_GRACE)

    def run(self, spec: PodSpec) -> RunningPod:
        """Create the pod and start its processes."""
        with self._lock:
            running = self._create(spec)
            self._pods[spec.name] = running
            return running

    def get(self, name: str) -> RunningPod:
        """The pod as it runs now."""
        with self._lock:
            return self._pods[name]

    def _create(self, spec: PodSpec) -> RunningPod:
        pod = self._cluster.create_pod(spec.name, spec.role, spec.app, f"weightsync-demo {spec.app}")
        home = self._directory / "pods" / f"{spec.name}-{pod.uid[:8]}"
        shared, state = home / "run", home / "state"
        for path in (shared, state):
            path.mkdir(parents=True)
        token = home / "token"
        token.write_text(self._cluster.pod_token(pod))
        token.chmod(0o600)
        identity = ["--namespace", self._cluster.namespace, "--pod-name", pod.name, "--pod-uid", pod.uid]
        agent = Process(
            f"{spec.name}/agent",
            [
                *(sys.executable, "-m", "weightsync_engine.agent", "--role", str(spec.role)),
                *("--operator", self._operator, "--operator-ca", str(self._bundle)),
                *("--token-file", str(token), "--pod-ip", "127.0.0.1"),
                *("--directory", str(shared), "--state-directory", str(state), "--log-format", "text"),
                *(*identity, *spec.agent_arguments),
            ],
            home / "agent.log",
            {},
        )
        workload = spec.launch(shared)
        # The agent first, as a native sidecar starts before the containers that lean on it.
        agent.start()
        workload.start()
        return RunningPod(spec, pod, workload, agent)

    def _loop(self) -> None:
        while not self._ended.wait(_PERIOD):
            try:
                self._reconcile()
            except Exception:  # a dead supervisor would look like a fleet that nobody heals
                self._say(f"supervisor: {traceback.format_exc(limit=1).strip().splitlines()[-1]}")

    def _reconcile(self) -> None:
        present = self._cluster.pods()
        with self._lock:
            for name, running in list(self._pods.items()):
                there = present.get(name)
                if there is None or there.uid != running.pod.uid:
                    self._say(f"{name} was deleted: its processes end, a new pod takes its place")
                    for process in (running.agent, running.workload):
                        process.stop(_GRACE)
                    self._pods[name] = self._create(running.spec)
                    continue
                for process in (running.agent, running.workload):
                    if process.restart_if_ended(_BACKOFF):
                        self._say(f"{process.name} had ended: started again")
