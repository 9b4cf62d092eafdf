"""The operator as its chart installs it, and the pods that scenarios happen to."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from chart_release import NAMESPACE, Helm
from pod_fleet import PodFleet, Release
from scenario_table import Table

from image_build import SITES, host_site, image_archives
from images import TARGETS
from weightsync_cluster.cluster import Cluster
from weightsync_cluster.kubectl import Namespace
from weightsync_engine.reference.model_files import TINY, write_checkpoint

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
    params=["reference", pytest.param("vllm", marks=[pytest.mark.full, pytest.mark.vllm])],
)
def fleet(
    request: pytest.FixtureRequest, own_cluster: Cluster, release: Release, model: Path
) -> Iterator[PodFleet]:
    """A trainer and two servers, without any version; the servers are the reference engine or vLLM on the CPU."""
    made = PodFleet(own_cluster, request.param, release, model)
    made.create()
    try:
        yield made
    finally:
        made.close()


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
