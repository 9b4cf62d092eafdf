"""What of the fleets on GPUs can be tried without any: how they are asked, who gets which claim, where pods go.

Devices are allocated by the real scheduler, from a list that no driver stands behind: no pod with a claim starts.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from chart_release import Object
from gpu_fleet import EXAMPLES, ProxiedFleet, api_proxy, gpu_manifests
from pod_fleet import Release

from images import image_name, project_version
from weightsync_cluster.cluster import Cluster
from weightsync_cluster.gpus import DEVICE_CLASS
from weightsync_cluster.kubectl import Namespace
from weightsync_demo.answers import RefusedError
from weightsync_demo.waiting import wait_for

pytestmark = [pytest.mark.timeout(600), pytest.mark.full]


@pytest.fixture(scope="module")
def proxied(own_cluster: Cluster, release: Release, model: Path) -> Iterator[ProxiedFleet]:
    with api_proxy(own_cluster) as port:
        made = ProxiedFleet(own_cluster, "reference", release, model, port, name="proxied")
        made.create()
        try:
            yield made
        finally:
            made.close()


def test_pods_are_asked_through_the_api_server_and_killed_on_their_nodes(proxied: ProxiedFleet) -> None:
    with pytest.raises(OSError, match="Status"):
        proxied.ask("engine-7")
    proxied.watch("engine-0", "engine-1")
    proxied.namespace.wait("pod/trainer-0", "Ready", proxied.up_seconds)
    with pytest.raises(RefusedError):
        proxied.ask("engine-0")
    proxied.wait_served(proxied.publish())

    before = proxied.pods()["engine-0"].restarts
    with proxied.scene("engine killed", "on its node", ("engine-0",)):
        proxied.kill_engine("engine-0")
        wait_for(lambda: proxied.pods()["engine-0"].restarts > before, 60, "the kubelet to restart it")
        proxied.wait_served(proxied.version, seconds=proxied.up_seconds)
    assert proxied.pods()["engine-1"].restarts == 0


DEVICES: list[Object] = [
    {
        "apiVersion": "resource.k8s.io/v1",
        "kind": "DeviceClass",
        "metadata": {"name": DEVICE_CLASS},
        "spec": {"selectors": [{"cel": {"expression": f"device.driver == '{DEVICE_CLASS}'"}}]},
    },
    {
        "apiVersion": "resource.k8s.io/v1",
        "kind": "ResourceSlice",
        "metadata": {"name": "gpus"},
        "spec": {
            "driver": DEVICE_CLASS,
            "pool": {"name": "gpus", "generation": 1, "resourceSliceCount": 1},
            "allNodes": True,
            "devices": [{"name": f"gpu-{number}"} for number in range(4)],
        },
    },
]


@pytest.fixture(scope="module")
def devices(own_cluster: Cluster, release: Release) -> Iterator[None]:
    """GPUs on paper."""
    manifest = json.dumps({"apiVersion": "v1", "kind": "List", "items": DEVICES})
    own_cluster.kubectl("create", "--filename=-", stdin=manifest)
    yield
    own_cluster.kubectl("delete", "--filename=-", stdin=manifest)


def allocated(namespace: Namespace, pods: int) -> list[Object]:
    """The claims, once as many pods as that have a node. Each pod and its agent name the claim."""

    def placed() -> list[Object]:
        found = namespace.read("pods")["items"]
        return found if len(found) == pods and all(each["spec"].get("nodeName") for each in found) else []

    for pod in wait_for(placed, 60, f"{pods} pods to have a node"):
        agent, container = pod["spec"]["initContainers"][0], pod["spec"]["containers"][0]
        assert agent["name"] == "weightsync-agent"
        assert agent["resources"]["claims"] == container["resources"]["claims"] == [{"name": "gpu"}]
    claims: list[Object] = namespace.read("resourceclaims")["items"]
    return claims


def device_of(claim: Object) -> str:
    (result,) = claim["status"]["allocation"]["devices"]["results"]
    return str(result["device"])


@pytest.mark.usefixtures("devices")
def test_the_scenarios_pods_share_one_gpu(namespace: Namespace) -> None:
    image = image_name("vllm", project_version())
    namespace.apply(*gpu_manifests(image, namespace.cluster.nodes[0]))
    (claim,) = allocated(namespace, 3)
    assert device_of(claim).startswith("gpu-")
    reserved = {each["name"] for each in claim["status"]["reservedFor"]}
    assert reserved == {"trainer-0", "engine-0", "engine-1"}
    namespace.kubectl("delete", "statefulsets", "--all", "--cascade=orphan")
    namespace.kubectl("delete", "pods", "--all", "--grace-period=0", "--force")


@pytest.mark.usefixtures("devices")
def test_the_examples_pods_have_a_gpu_each(namespace: Namespace) -> None:
    namespace.kubectl("apply", f"--kustomize={EXAMPLES / 'fleet'}")
    claims = allocated(namespace, 3)
    assert len({device_of(each) for each in claims}) == len(claims) == 3
    namespace.kubectl("delete", "deployments", "--all", "--cascade=orphan")
    namespace.kubectl("delete", "replicasets", "--all", "--cascade=orphan")
    namespace.kubectl("delete", "pods", "--all", "--grace-period=0", "--force")
