"""A cluster by kind, where docker and kind are. Its nodes are docker's containers."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import yaml

from weightsync_cluster.errors import ClusterError
from weightsync_cluster.kubectl import KubectlCluster
from weightsync_cluster.shell import run
from weightsync_demo.waiting import wait_for

CREATE_TIMEOUT_S = 600.0
LOAD_TIMEOUT_S = 300.0
READY_TIMEOUT_S = 120.0
CONFIGURATION: dict[str, Any] = {
    "kind": "Cluster",
    "apiVersion": "kind.x-k8s.io/v1alpha4",
    "nodes": [{"role": "control-plane"}, {"role": "worker"}, {"role": "worker"}],
}


def available() -> bool:
    """Whether kind is on PATH and a docker daemon answers: a client alone makes no node."""
    if shutil.which("kind") is None or shutil.which("docker") is None:
        return False
    try:
        done = subprocess.run(["docker", "info"], capture_output=True, check=False, timeout=20)
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


class KindCluster(KubectlCluster):
    """The cluster that kind calls `name`, with its kubeconfig in `directory`; never the user's own file."""

    def __init__(self, name: str, kubectl_program: Path, directory: Path) -> None:
        super().__init__(kubectl_program, directory / "kubeconfig", f"kind-{name}")
        self.name = name

    @property
    def configuration(self) -> dict[str, Any]:
        """What kind is to make."""
        return CONFIGURATION

    def up(self) -> None:
        """Make it. Raises ClusterError with what kind says."""
        named = [f"--name={self.name}", f"--kubeconfig={self.kubeconfig}"]
        configuration = yaml.safe_dump(self.configuration)
        command = ["kind", "create", "cluster", *named, "--config=-", f"--wait={READY_TIMEOUT_S:g}s"]
        run(command, stdin=configuration, timeout=CREATE_TIMEOUT_S)

    def down(self) -> None:
        """Remove it; does nothing where there is none."""
        run(["kind", "delete", "cluster", f"--name={self.name}", f"--kubeconfig={self.kubeconfig}"])

    def load_image(self, archive: Path) -> None:
        """Give every node the images in an archive."""
        command = ["kind", "load", "image-archive", str(archive), f"--name={self.name}"]
        run(command, timeout=LOAD_TIMEOUT_S)

    def kill_node(self, name: str) -> None:
        """End the node and all that runs on it, as a power cut would."""
        run(["docker", "kill", name])

    def start_node(self, name: str) -> None:
        """Start a node that was killed, and wait until it is Ready."""
        run(["docker", "start", name])
        wait_for(
            lambda: self.node_ready(name),
            READY_TIMEOUT_S,
            f"{name} to be Ready",
            ignoring=ClusterError,
            interval=0.5,
        )
