"""The fleet of the scenarios on GPUs: real vLLM in the project's image, NCCL from GPU to GPU, in a kind cluster.

All its pods share one GPU by one claim, so that one is enough. Whoever runs it need not be root. The part of it that
needs no GPU is tried in the cluster of the other end-to-end tests.
"""

import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pod_manifests
import yaml
from chart_release import ROOT, Object
from pod_fleet import PodFleet, Release
from pod_manifests import MODEL, RESTRICTED

from images import image_name, project_version
from weightsync_cluster.cluster import Cluster
from weightsync_cluster.gpus import GpuCluster
from weightsync_cluster.kubectl import KubectlCluster, Namespace
from weightsync_demo.answers import Answer, RefusedError

EXAMPLES = ROOT / "examples" / "on-gpus"
CLAIM = "gpu"
MARGIN = 0.03
"""GPUs round otherwise than the CPU that says what is right: versions with a token less ahead are left out."""
WRITE_MODEL = f"""
from pathlib import Path
from weightsync_engine.reference.model_files import TINY, write_checkpoint
write_checkpoint(Path("{MODEL}"), TINY, seed=7)
"""
# Everything of a pod: cgroupfs has its uid as it is, systemd with underscores.
FIND = r"""
for process in /proc/[0-9]*; do
  grep -qE "$1|$2" $process/cgroup 2>/dev/null || continue
  tr '\0' ' ' < $process/cmdline 2>/dev/null | grep -qF -- "$3" && echo "${process#/proc/}"
done
true
"""


class ProxiedFleet(PodFleet):
    """As its base, for whoever is not root: pods are asked through the API server, nodes by programs run on them.

    ``port`` is that of `api_proxy`.
    """

    def __init__(
        self,
        cluster: Cluster | GpuCluster,
        kind: str,
        release: Release,
        model: Path,
        port: int,
        name: str = "",
    ) -> None:
        super().__init__(cluster, kind, release, model, name)
        self._machines, self._port = cluster, port

    def ask(self, name: str) -> Answer:
        try:
            return super().ask(name)
        except RefusedError as error:
            # The API server's own words for a pod that it can't reach.
            if '"kind":"Status"' in str(error).replace(" ", ""):
                raise ConnectionError(f"{name}: {error}") from error
            raise

    @contextmanager
    def reaching(self, pod: str, port: int) -> Iterator[tuple[str, int, str]]:
        yield "127.0.0.1", self._port, f"/api/v1/namespaces/{self.namespace.name}/pods/{pod}:{port}/proxy"

    def killer(self, pod: str, marker: str, namespace: Namespace | None = None) -> Callable[[], None]:
        found = (namespace or self.namespace).read("pod", pod)
        uid, node = found["metadata"]["uid"], found["spec"]["nodeName"]
        script = ["sh", "-c", FIND, "find", uid, uid.replace("-", "_"), marker]
        processes = self._machines.run_on_node(node, *script).split()
        assert processes, f"{pod} has no process with {marker!r}"

        def kill() -> None:
            self._machines.run_on_node(node, "kill", "-KILL", *processes)

        return kill


class GpuFleet(ProxiedFleet):
    """The servers are vLLM, and all pods share one GPU."""

    least_margin = MARGIN

    def __init__(self, cluster: GpuCluster, release: Release, model: Path, port: int) -> None:
        super().__init__(cluster, "gpu", release, model, port)

    def manifests(self) -> list[Object]:
        return gpu_manifests(image_name("vllm", project_version()), self.cluster.nodes[0])


@contextmanager
def api_proxy(cluster: KubectlCluster) -> Iterator[int]:
    """A port of this machine's loopback that leads to the API server, with the kubeconfig's rights."""
    who = [f"--kubeconfig={cluster.kubeconfig}", f"--context={cluster.context}"]
    command: list[str | Path] = [cluster.kubectl_program, *who, "proxy", "--port=0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            # Starting to serve on 127.0.0.1:45678
            yield int(process.stdout.readline().rpartition(":")[2])
        finally:
            process.terminate()


def gpu_manifests(image: str, node: str) -> list[Object]:
    """What is applied: the scenarios' own pods, with one claim for all, and all of the image's own torch and vLLM."""
    nowhere = (Path("/"), "/nowhere")
    weightsync = pod_manifests.weightsync(dataPlane={"type": "Sidecar", "staging": "Device"})
    workloads = [
        *pod_manifests.trainer(image, nowhere, pod_manifests.LIMIT_RATE, node),
        *pod_manifests.engines("vllm", image, nowhere, Path("/"), 2),
    ]
    claim = yaml.safe_load((EXAMPLES / "one-gpu/claim.yaml").read_text())
    for each in workloads:
        if each["kind"] == "StatefulSet":
            _on_the_gpu(each["spec"]["template"], claim["metadata"]["name"], image)
    return [weightsync, claim, *workloads]


def _on_the_gpu(pod: Object, claim: str, image: str) -> None:
    spec, (container,) = pod["spec"], pod["spec"]["containers"]
    pod["metadata"]["annotations"]["weightsync.dev/claim"] = CLAIM
    spec["resourceClaims"] = [{"name": CLAIM, "resourceClaimName": claim}]
    container["resources"] = {"claims": [{"name": CLAIM}]}
    container.setdefault("env", []).append({"name": "DEVICE", "value": "cuda"})
    spec["volumes"] = [_without_host_path(each) for each in spec["volumes"] if each["name"] != "site"]
    container["volumeMounts"] = [each for each in container["volumeMounts"] if each["name"] != "site"]
    if any(each["name"] == "model" for each in spec["volumes"]):
        mounts = [{"name": "model", "mountPath": MODEL}, {"name": "tmp", "mountPath": "/tmp"}]
        write: dict[str, Any] = {"name": "model", "image": image, "command": ["python3", "-c", WRITE_MODEL]}
        spec["initContainers"] = [write | {"securityContext": RESTRICTED, "volumeMounts": mounts}]


def _without_host_path(volume: Object) -> Object:
    return {"name": volume["name"], "emptyDir": {}} if "hostPath" in volume else volume
