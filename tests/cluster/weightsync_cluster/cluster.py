"""A Kubernetes cluster of two nodes on this machine, which it leaves as it was."""

import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

from weightsync_cluster import cgroups, control, network, node
from weightsync_cluster.addresses import CONTROL, CONTROL_ADDRESS, Node
from weightsync_cluster.errors import ClusterError
from weightsync_cluster.inside import Answer, get, network_of
from weightsync_cluster.kubectl import KubectlCluster
from weightsync_cluster.machine import Machine
from weightsync_cluster.pki import Authority, write_kubeconfig
from weightsync_cluster.place import Place, Progress
from weightsync_cluster.shell import run
from weightsync_cluster.tools import Tools, ensure_tools
from weightsync_demo.kube import ports
from weightsync_demo.kube.build import Binaries
from weightsync_demo.waiting import wait_for

HOST = "127.0.0.1"
DNS_PORT = 53
READY_TIMEOUT_S = 120.0
IMPORT_TIMEOUT_S = 300.0


class Cluster(KubectlCluster):
    """The cluster `name` of this machine; several can run side by side.

    Its kubeconfig, for the administrator, leads through a port of this machine's loopback.

    It is what its folder says: another process that names it finds the same cluster. All that it has besides
    that folder are its machines' processes and the control groups of its pods.
    """

    def __init__(self, name: str, binaries: Binaries, progress: Progress, nodes: int = 2) -> None:
        self.name = name
        self._place = Place(name)
        self.directory = self._place.directory
        super().__init__(binaries.kubectl, self.directory / "kubeconfig", f"weightsync-{name}")
        self.control = self._place.machine(CONTROL)
        self._nodes = {made.name: made for made in (Node(number + 1) for number in range(nodes))}
        self._machines = {name: self._place.machine(name) for name in self._nodes}
        self._binaries = binaries
        self._progress = progress
        self._cuts: list[network.Cut] = []

    @property
    def nodes(self) -> list[str]:
        """Their names, whether they run or not."""
        return list(self._nodes)

    # Up and down

    def up(self) -> None:
        """Bring it up, unless it is; what a crash has left of it is removed first.

        Raises ClusterError where this machine can't hold it, saying what to do.
        """
        with self._place.alone(self._progress):
            if self.is_up:
                return
            self._place.clear()
            try:
                self._start()
            except BaseException:
                self._place.clear(keep_files=True)
                raise

    def down(self) -> None:
        """Remove it, whatever state it is in; does nothing where there is none."""
        with self._place.alone(self._progress):
            self._place.clear()

    @property
    def is_up(self) -> bool:
        """Whether it was brought up, and all of its machines still run."""
        machines = [self.control, *self._machines.values()]
        return (self.directory / "up").exists() and all(machine.pid for machine in machines)

    def _start(self) -> None:
        started = time.monotonic()
        tools = self._tools
        self.directory.mkdir(mode=0o700)
        authority = Authority(f"weightsync-{self.name}")
        credentials = self.directory / CONTROL / "data"
        credentials.mkdir(parents=True)
        control.write_credentials(credentials, authority)
        for name, made in self._nodes.items():
            group = self._place.group(name)
            node.write_configuration(self.directory / name, made, authority, tools, group)

        port = ports.choose(HOST)
        administrator = authority.issue("admin", groups=[control.ADMINISTRATORS])
        url = f"https://{HOST}:{port}"
        write_kubeconfig(self.kubeconfig, url, authority, administrator, self.context)
        with socket.create_server((HOST, port)) as listener:
            spec = control.spec(
                credentials,
                self.control.log_directory,
                self._binaries,
                self._environment,
                listener.fileno(),
            )
            self.control.start(spec, listener)
        network.prepare(self.control, self._nodes.values())
        self.control.release()
        for name in self._nodes:
            self._start_node(name)
        self._each_node(self._prepare_node)
        self._wait_for_default_account()
        wait_for(self._names_are_answered, READY_TIMEOUT_S, f"DNS; logs: {self.control.log_directory}")
        (self.directory / "up").touch()
        self._progress(f"up after {time.monotonic() - started:.1f} s")

    # Nodes

    def kill_node(self, name: str) -> None:
        """End the node and all that runs on it, as a power cut would."""
        self._machine(name).kill()
        cgroups.remove(self._place.group(name))

    def start_node(self, name: str) -> None:
        """Start a node that was killed, with the disk that it had, and wait until it is Ready."""
        if self._machine(name).pid:
            raise ClusterError(f"{name} runs")
        self._start_node(name)
        self._cut()
        self._wait_for_node(name)

    def load_image(self, archive: Path) -> None:
        """Give every node the images in an OCI or docker archive, under the names that are in it."""
        self._each_node(lambda name: self._import(name, archive))

    def _start_node(self, name: str) -> None:
        made, machine = self._nodes[name], self._machine(name)
        cgroups.make(self._place.group(name))
        spec = node.spec(machine.directory, machine.log_directory, made, self._binaries, self._environment)
        machine.start(spec)
        network.plug(self.control, machine, made, [n for n in self._nodes.values() if n != made])
        machine.release()

    def _prepare_node(self, name: str) -> None:
        for archive in (self._tools.pause, self._tools.busybox):
            self._import(name, archive)
        self._wait_for_node(name)

    def _import(self, name: str, archive: Path) -> None:
        machine = self._machine(name)
        ctr = ["ctr", f"--address={node.CONTAINERD_SOCKET}", "--namespace=k8s.io"]

        def containerd_answers() -> bool:
            machine.running_pid  # noqa: B018 (raises where it ended)
            run([*machine.entering(), *ctr, "version"], environment=self._environment)
            return True

        wait_for(
            containerd_answers, READY_TIMEOUT_S, f"containerd on {name}; logs: {machine.log_directory}",
            ignoring=ClusterError,
        )  # fmt: skip
        command = [*machine.entering(), *ctr, "images", "import", str(archive.resolve())]
        run(command, environment=self._environment, timeout=IMPORT_TIMEOUT_S)

    def _wait_for_node(self, name: str) -> None:
        what = f"{name} to be Ready; logs: {self._machine(name).log_directory}"
        wait_for(lambda: self.node_ready(name), READY_TIMEOUT_S, what, ignoring=ClusterError, interval=0.2)

    def _wait_for_default_account(self) -> None:
        wait_for(
            lambda: self.kubectl("get", "serviceaccount", "default", "--output=name"),
            READY_TIMEOUT_S,
            f"the ServiceAccount that pods need; logs: {self.control.log_directory}",
            ignoring=ClusterError,
        )

    def _names_are_answered(self) -> bool:
        # It listens once it knows what Services there are.
        try:
            with self.inside(), socket.create_connection((CONTROL_ADDRESS, DNS_PORT), 1):
                return True
        except OSError:
            return False

    # What tests do

    def get(self, url: str, timeout: float = 5.0) -> Answer:
        """The answer to one GET from within the cluster's network, by the address of a pod or a Service.

        Raises OSError where nobody answers.
        """
        with self.inside():
            return get(url, timeout)

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Sockets that this thread makes in the block are in the cluster's network.

        There are pods' addresses and nodes' addresses; a Service's address exists on nodes only.
        """
        with network_of(self.control.running_pid):
            yield

    def run_inside(self, *command: str | Path, timeout: float = 30.0) -> str:
        """The output of a command of this machine, run in the cluster's network."""
        return run([*self.control.entering("--net"), *command], timeout=timeout)

    def run_on_node(self, name: str, *command: str | Path, timeout: float = 30.0) -> str:
        """The output of a command of this machine, run among the processes, mounts and wires of a node."""
        return run(
            [*self._machine(name).entering(), *command], timeout=timeout, environment=self._environment
        )

    def partition(self, one: Iterable[str], other: Iterable[str]) -> None:
        """Drop all packets between two sides, in both directions, until `heal`; earlier cuts stay.

        A side is made of addresses of pods, and of names: a node's means it and its pods, `control` the
        control plane's machine. Connections are not closed: their packets get lost.
        """
        self._cuts.append((self._addresses(one), self._addresses(other)))
        self._cut()

    def heal(self) -> None:
        """Undo every partition."""
        self._cuts.clear()
        self._cut()

    def _cut(self) -> None:
        for machine in (self.control, *self._machines.values()):
            if machine.pid:
                network.cut(machine, self._cuts, self._environment)

    def _addresses(self, side: Iterable[str]) -> frozenset[str]:
        found = set()
        for end in side:
            if end == CONTROL:
                found.add(CONTROL_ADDRESS)
            elif end in self._nodes:
                found |= {self._nodes[end].address, self._nodes[end].pods}
            else:
                found.add(end)
        return frozenset(found)

    # Its parts

    @cached_property
    def _tools(self) -> Tools:
        return ensure_tools(self._progress)

    @cached_property
    def _environment(self) -> dict[str, str]:
        """Of programs on machines: nothing of whoever brings the cluster up, his proxies least of all."""
        return {
            "PATH": f"{self._tools.path}:{os.defpath}:/usr/sbin:/sbin:/usr/local/sbin:/usr/local/bin",
            "LD_LIBRARY_PATH": self._tools.libraries,
            "HOME": "/root",
        }

    def _machine(self, name: str) -> Machine:
        try:
            return self._machines[name]
        except KeyError:
            raise ClusterError(f"no node {name}; there are {', '.join(self._nodes)}") from None

    def _each_node(self, do: Callable[[str], None]) -> None:
        with ThreadPoolExecutor(len(self._nodes)) as pool:
            for done in [pool.submit(do, name) for name in self._nodes]:
                done.result()
