"""A kind cluster whose worker has this machine's GPUs, by docker's NVIDIA runtime and NVIDIA's DRA driver.

Never tried on a machine with GPUs and docker yet: what runs is what NVIDIA's own tests of such clusters run.
"""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import yaml

from weightsync_cluster import kind
from weightsync_cluster.kind import KindCluster
from weightsync_cluster.shell import run
from weightsync_demo.waiting import wait_for

DRIVER_CHART = "nvidia/nvidia-dra-driver-gpu"
DRIVER_VERSION = "25.12.0"
DRIVER_NAMESPACE = "nvidia-dra-driver-gpu"
DEVICE_CLASS = "gpu.nvidia.com"
DRIVER_VALUES = (
    # The driver's libraries are in the node itself, where docker's runtime puts them.
    "nvidiaDriverRoot=/",
    "gpuResourcesEnabledOverride=true",
    "resources.computeDomains.enabled=false",
)
INSTALL_TIMEOUT_S = 420.0
IMAGE_TIMEOUT_S = 1800.0
SLICES_TIMEOUT_S = 120.0
ASK_TIMEOUT_S = 20.0


def missing() -> str:
    """What this machine lacks for such a cluster, and what to do; empty if nothing."""
    gpus = _output("nvidia-smi", "-L")
    if "GPU 0" not in gpus:
        return "no NVIDIA GPU here: nvidia-smi -L lists none"
    if not kind.available():
        return "no docker daemon that answers, or no kind on PATH: install both"
    if _output("docker", "info", "--format={{.DefaultRuntime}}").strip() != "nvidia":
        return (
            "docker gives containers no GPU: install NVIDIA's container toolkit, then sudo nvidia-ctk runtime configure"
            " --runtime=docker --set-as-default --cdi.enabled; sudo nvidia-ctk config --in-place --set"
            " accept-nvidia-visible-devices-as-volume-mounts=true; sudo systemctl restart docker"
        )
    for program in ("kubectl", "helm"):
        if shutil.which(program) is None:
            return f"no {program} on PATH: install it"
    if DRIVER_CHART not in _output("helm", "search", "repo", DRIVER_CHART):
        return (
            f"helm does not know {DRIVER_CHART}: helm repo add nvidia, as the driver's documentation says it"
        )
    return ""


def _output(*command: str) -> str:
    """What a command prints; nothing where it is not there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=ASK_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


class GpuCluster(KindCluster):
    """One worker, with all GPUs; pods get them by claims of the class gpu.nvidia.com."""

    def __init__(self, name: str, kubectl_program: Path, directory: Path, configuration: Path) -> None:
        super().__init__(name, kubectl_program, directory)
        self._configuration = configuration

    @property
    def configuration(self) -> dict[str, Any]:
        loaded: dict[str, Any] = yaml.safe_load(self._configuration.read_text())
        return loaded

    def up(self) -> None:
        """Make it, with the driver. Raises ClusterError where no GPU can be claimed in the end."""
        super().up()
        context = [f"--kubeconfig={self.kubeconfig}", f"--kube-context={self.context}"]
        release = [
            "helm",
            "upgrade",
            "--install",
            "dra",
            DRIVER_CHART,
            f"--version={DRIVER_VERSION}",
            *context,
        ]
        values = [f"--set={value}" for value in DRIVER_VALUES]
        place = [f"--namespace={DRIVER_NAMESPACE}", "--create-namespace", "--wait"]
        run([*release, *values, *place], timeout=INSTALL_TIMEOUT_S)
        wait_for(self._has_gpus, SLICES_TIMEOUT_S, f"a GPU in the ResourceSlices of {DEVICE_CLASS}")

    def _has_gpus(self) -> bool:
        slices = self.read("resourceslices")["items"]
        return any(each["spec"]["driver"] == DEVICE_CLASS and each["spec"].get("devices") for each in slices)

    def load_docker_image(self, name: str) -> None:
        """Give the nodes that pods are put on an image of docker's."""
        nodes = f"--nodes={','.join(self.nodes)}"
        run(["kind", "load", "docker-image", name, f"--name={self.name}", nodes], timeout=IMAGE_TIMEOUT_S)

    def run_on_node(self, name: str, *command: str, timeout: float = 30.0) -> str:
        """The output of a command run on a node."""
        return run(["docker", "exec", name, *command], timeout=timeout)
