"""The cluster that end-to-end tests run on.

Without options they make one of their own: real nodes in namespaces of this machine, or kind where docker and
kind are. They use a cluster that is there already only if the command line names it.
"""

import os
import secrets
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from weightsync_cluster import kind
from weightsync_cluster.cluster import Cluster
from weightsync_cluster.errors import ClusterError
from weightsync_cluster.kind import KindCluster
from weightsync_cluster.kubectl import KubectlCluster, Namespace
from weightsync_cluster.slots import own_place
from weightsync_cluster.tools import ensure_tools
from weightsync_demo.kube.build import Binaries


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("cluster", "a cluster that is there already (both or none)")
    group.addoption("--kubeconfig", type=Path, help="the file that names it")
    group.addoption("--context", help="which of the file's contexts it is")
    parser.addoption("--table", type=Path, help="write what the scenarios measured there (.md or .json)")


def pytest_configure(config: pytest.Config) -> None:
    if (config.getoption("--kubeconfig") is None) != (config.getoption("--context") is None):
        raise pytest.UsageError("--kubeconfig and --context go together: tests use no cluster by chance")


@pytest.fixture(scope="session")
def cluster(
    request: pytest.FixtureRequest, binaries: Binaries, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[KubectlCluster]:
    """The cluster of this test run: `.kubectl()`, `.nodes`, `.load_image()` and so on; see KubectlCluster."""
    kubeconfig = request.config.getoption("--kubeconfig")
    if kubeconfig is not None:
        context = request.config.getoption("--context")
        yield KubectlCluster(binaries.kubectl, kubeconfig.absolute(), context)
        return
    with ExitStack() as stack:
        try:
            if kind.available():
                made: KubectlCluster = stack.enter_context(
                    _on_kind(binaries, tmp_path_factory.mktemp("kind"))
                )
            else:
                made = stack.enter_context(_on_this_machine(binaries))
        except (ClusterError, OSError) as error:
            if os.environ.get("CI") == "true":
                pytest.fail(f"no cluster: {error}")
            pytest.skip(f"no cluster: {error}")
        yield made


@contextmanager
def _on_this_machine(binaries: Binaries) -> Iterator[KubectlCluster]:
    with own_place("e2e") as place:
        made = Cluster(place.name, binaries, print)
        made.up()
        try:
            yield made
        finally:
            made.down()


@contextmanager
def _on_kind(binaries: Binaries, directory: Path) -> Iterator[KubectlCluster]:
    made = KindCluster("weightsync-e2e", binaries.kubectl, directory)
    # What a run that was killed has left.
    made.down()
    made.up()
    try:
        made.load_image(ensure_tools(print).busybox)
        yield made
    finally:
        made.down()


@pytest.fixture(scope="session")
def own_cluster(cluster: KubectlCluster) -> Cluster:
    """`cluster`, for tests that kill its nodes or cut its wires; skipped on one that was there already."""
    if not isinstance(cluster, Cluster):
        pytest.skip("needs a cluster whose machines are made here")
    return cluster


@pytest.fixture
def namespace(cluster: KubectlCluster) -> Iterator[Namespace]:
    """A fresh namespace of `cluster`."""
    made = Namespace(cluster, f"test-{secrets.token_hex(4)}")
    made.create()
    yield made
    made.delete()
