"""Sets the scene: API server, CRD, operator, trainer, models; and takes it down again."""

import json
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from weightsync_contract.reasons import Role
from weightsync_demo.cluster import Cluster
from weightsync_demo.engines import engine_process
from weightsync_demo.fleet import FleetReader, fleet_url
from weightsync_demo.kube.apiserver import run_apiserver
from weightsync_demo.kube.build import ensure_binaries
from weightsync_demo.kube.crd import apply_crds
from weightsync_demo.kube.source import find_source
from weightsync_demo.processes import Process
from weightsync_demo.scenario import Server, Story
from weightsync_demo.supervisor import PodSpec, Supervisor
from weightsync_demo.trainer_handle import Trainer
from weightsync_demo.view import View
from weightsync_demo.waiting import wait_for

WEIGHTSYNC: Final = "policy"
"""Name of the WeightSync in examples/weightsync.yaml."""

_OPERATOR_SECONDS: Final = 60.0
_TRAINER_SECONDS: Final = 120.0
_MEMBERS: Final = ("vllm-0", "vllm-1", "vllm-2")


@dataclass(frozen=True)
class Options:
    """What the command line asked for."""

    engine: str
    directory: Path
    limit_rate: str
    kubeconfig: Path | None
    context: str | None


@contextmanager
def cluster_for(options: Options, view: View) -> Iterator[Cluster]:
    """The cluster named on the command line, else an API server of the demo's own."""
    binaries = ensure_binaries(view.say)
    if options.kubeconfig is not None:
        cluster = Cluster(options.kubeconfig, options.context, "weightsync-demo", binaries.kubectl)
        cluster.kubectl("apply", "--server-side", "--force-conflicts", f"--filename={_checkout() / 'crds'}")
        view.say(
            f"using {options.kubeconfig}'s cluster: the namespace weightsync-demo goes again, the CRD stays"
        )
        try:
            yield cluster
        finally:
            cluster.kubectl("delete", "namespace", "weightsync-demo", "--wait=false")
        return
    view.say("starting an API server")
    with run_apiserver(options.directory / "kube", binaries) as server:
        apply_crds(server)
        view.say(f"API server ready; in a second terminal: export KUBECONFIG={server.kubeconfig}")
        view.say(f"  {binaries.kubectl} get weightsync -w")
        yield Cluster(server.kubeconfig, None, "default", binaries.kubectl)


@contextmanager
def story(
    options: Options, view: View, seconds: dict[str, float]
) -> Iterator[tuple[Story, list[Server], Server]]:
    """Everything up and running, with the WeightSync applied; yields the story and its servers."""
    with ExitStack() as stack:
        began = time.monotonic()

        def lap(name: str) -> None:
            nonlocal began
            seconds[name] = round(time.monotonic() - began, 2)
            began = time.monotonic()

        cluster = stack.enter_context(cluster_for(options, view))
        cluster.prepare()
        lap("api_server")
        model = _make_model(options.directory, view)
        lap("model")
        port = _start_operator(stack, cluster, options.directory, view)
        lap("operator")

        bundle = options.directory / "ca.crt"
        supervisor = Supervisor(cluster, f"wss://127.0.0.1:{port}", bundle, options.directory, view.say)
        stack.callback(supervisor.stop)
        servers = [_server(name, model, options) for name in _MEMBERS]
        first, late = servers[:-1], servers[-1]
        for server in first:
            supervisor.run(server.spec)
        view.say(f"{', '.join(s.spec.name for s in first)} start ({options.engine}, on weights of their own)")
        running = supervisor.run(_trainer_pod(model, options))
        trainer = Trainer(running.workload)
        supervisor.start()
        cluster.kubectl("apply", f"--filename={_checkout() / 'examples' / 'weightsync.yaml'}")
        view.say("applied examples/weightsync.yaml")

        url = fleet_url(port, cluster.namespace, WEIGHTSYNC)
        # The operator publishes it where there is a WeightSync; the kubelet would bring it into each pod.
        published = wait_for(cluster.bundle, _OPERATOR_SECONDS, "ConfigMap weightsync-ca")
        bundle.write_text(published)
        fleet = FleetReader(url, cluster.viewer_token(), published, view.fleet)
        fleet.start()
        stack.callback(fleet.stop)
        ready = trainer.wait("ready", _TRAINER_SECONDS)
        lap("trainer")
        played = Story(supervisor, fleet, trainer, view, ready["run"], tuple(ready["prompt"]), seconds)
        stack.callback(played.stop)
        yield played, first, late


def _checkout() -> Path:
    return find_source().directory.parent.parent


def _make_model(directory: Path, view: View) -> Path:
    from weightsync_engine.reference.model_files import DEMO, write_checkpoint

    path = directory / "model"
    size = write_checkpoint(path, DEMO, seed=0)
    view.say(f"made a model of {size / 2**20:.0f} MiB for the servers to start from")
    return path


def _start_operator(stack: ExitStack, cluster: Cluster, directory: Path, view: View) -> int:
    ports = directory / "operator-ports.json"
    command = [
        *(sys.executable, "-m", "weightsync_operator", "--kubeconfig", str(cluster.kubeconfig)),
        *("--namespace", cluster.namespace, "--lease-namespace", cluster.namespace),
        *("--session-service", "weightsync-operator", "--session-host", "127.0.0.1"),
        *("--session-port", "0", "--health-port", "0", "--metrics-port", "0"),
        *("--ports-file", str(ports), "--log-format", "text"),
        *(("--context", cluster.context) if cluster.context else ()),
    ]
    operator = Process("operator", command, directory / "operator.log", {})
    operator.start()
    stack.callback(operator.stop, 10.0)

    def told() -> int:
        if not operator.alive:
            raise RuntimeError(f"the operator ended; its log says:\n{operator.tail()}")
        return int(json.loads(ports.read_text())["session"])

    port = wait_for(told, _OPERATOR_SECONDS, "the operator's ports", ignoring=(OSError, ValueError, KeyError))
    view.say("operator started")
    return port


def _server(name: str, model: Path, options: Options) -> Server:
    port = _free_port()

    def launch(shared: Path) -> Process:
        return engine_process(options.engine, model, port, shared, shared.parent / "engine.log")

    arguments = ("--engine-url", f"http://127.0.0.1:{port}")
    return Server(PodSpec(name, Role.INFERENCE, "vllm", launch, arguments), port)


def _trainer_pod(model: Path, options: Options) -> PodSpec:
    def launch(shared: Path) -> Process:
        command = [sys.executable, "-m", "weightsync_demo.trainer", "--model", str(model)]
        env = {"WEIGHTSYNC_DIR": str(shared)}
        return Process("trainer-0/trainer", command, shared.parent / "trainer.log", env, pipes=True)

    return PodSpec("trainer-0", Role.TRAINER, "trainer", launch, ("--limit-rate", options.limit_rate))


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
