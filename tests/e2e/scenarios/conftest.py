"""The operator as its chart installs it, and the pods that scenarios happen to."""

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from chart_release import NAMESPACE, ROOT, Helm
from gpu_fleet import EXAMPLES, GpuFleet, api_proxy
from pod_fleet import PodFleet, Release
from scenario_table import Table

from image_build import SITES, host_site, image_archives
from images import TARGETS, image_name, project_version
from weightsync_cluster import gpus
from weightsync_cluster.cluster import Cluster
from weightsync_cluster.gpus import GpuCluster
from weightsync_cluster.kubectl import Namespace
from weightsync_cluster.shell import run
from weightsync_engine.reference.model_files import TINY, write_checkpoint

IMAGES_TIMEOUT_S = 3600.0
FIRST = ("engine-0", "engine-1")


@pytest.fixture(scope="session")
def table(request: pytest.FixtureRequest) -> Iterator[Table]:
    made = Table()
    yield made
    path = request.config.getoption("--table")
    print(f"\n{made.markdown()}")
    if path is not None and made.rows:
        made.write(path)


@pytest.fixture(scope="session")
def release(own_cluster: Cluster, helm: Helm) -> Release:
    """The operator, on images that were built from the Dockerfile."""
    for archive in image_archives(TARGETS).values():
        own_cluster.load_image(archive)
    made = Release(helm.on(own_cluster.kubeconfig), Namespace(own_cluster, NAMESPACE), agent=_agent())
    made.install()
    return made


def _agent() -> dict[str, object]:
    """No image has torch where no registry can be reached: pods mount this machine's."""
    return {
        "volumes": [{"name": "torch", "hostPath": {"path": str(host_site()), "type": "Directory"}}],
        "volumeMounts": [{"name": "torch", "mountPath": SITES["agent"], "readOnly": True}],
    }


@pytest.fixture(scope="session")
def model(own_cluster: Cluster) -> Path:
    """The checkpoint that servers begin with, for the pods' user."""
    made = own_cluster.directory / "model"
    write_checkpoint(made, TINY, seed=7)
    for path in (made, *made.iterdir()):
        path.chmod(path.stat().st_mode | 0o555)
    return made


@pytest.fixture(
    scope="session",
    params=[
        "reference",
        pytest.param("vllm", marks=[pytest.mark.full, pytest.mark.vllm]),
        pytest.param("gpu", marks=[pytest.mark.full, pytest.mark.vllm, pytest.mark.gpu]),
    ],
)
def fleet(request: pytest.FixtureRequest) -> Iterator[PodFleet]:
    """A trainer and two servers, without any version.

    The servers are the reference engine, or vLLM on the CPU, or vLLM with all pods on one GPU.
    """
    if request.param == "gpu":
        made: PodFleet = request.getfixturevalue("gpu_fleet")
    else:
        own_cluster, release = request.getfixturevalue("own_cluster"), request.getfixturevalue("release")
        made = PodFleet(own_cluster, request.param, release, request.getfixturevalue("model"))
    made.create()
    try:
        yield made
    finally:
        made.close()


@pytest.fixture(scope="session")
def gpu_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GpuCluster]:
    """kind, with the images of this checkout as docker builds them, and NVIDIA's driver for claims."""
    lacking = gpus.missing()
    if lacking:
        pytest.skip(f"{lacking} (examples/on-gpus/README.md)")
    run([sys.executable, ROOT / "scripts/images.py", "--tool=docker", *TARGETS], timeout=IMAGES_TIMEOUT_S)
    kubectl = Path(str(shutil.which("kubectl")))
    configuration = EXAMPLES / "kind/cluster.yaml"
    made = GpuCluster("weightsync-gpus", kubectl, tmp_path_factory.mktemp("kind"), configuration)
    # What a run that was killed has left.
    made.down()
    try:
        made.up()
        for target in TARGETS:
            made.load_docker_image(image_name(target, project_version()))
        yield made
    finally:
        made.down()


@pytest.fixture(scope="session")
def gpu_fleet(
    gpu_cluster: GpuCluster, helm: Helm, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[GpuFleet]:
    """The operator there, and a fleet that is not created yet."""
    values = yaml.safe_load((EXAMPLES / "one-gpu/values.yaml").read_text())
    release = Release(helm.on(gpu_cluster.kubeconfig), Namespace(gpu_cluster, NAMESPACE), **values)
    release.install()
    release.namespace.wait("deployment/weightsync-operator", "Available", 120)
    model = tmp_path_factory.mktemp("model")
    write_checkpoint(model, TINY, seed=7)
    with api_proxy(gpu_cluster) as port:
        yield GpuFleet(gpu_cluster, release, model, port)


@pytest.fixture
def started(fleet: PodFleet) -> PodFleet:
    """The same, with its first two servers up and asked all the time."""
    if not fleet.engines:
        fleet.watch(*FIRST)
        fleet.namespace.wait("pod/trainer-0", "Ready", fleet.up_seconds)
    return fleet


@pytest.fixture
def synced(started: PodFleet) -> PodFleet:
    """The same, with everybody on the newest version."""
    if started.version == 0:
        started.publish()
    started.wait_served(started.version)
    started.namespace.wait("weightsync/policy", "Ready", 60)
    return started
