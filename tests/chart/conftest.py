"""helm, and an API server of these tests' own: a policy of admission is for all of a cluster's namespaces."""

from collections.abc import Iterator

import pytest
from chart_pods import POLICY_SECONDS, create, make_namespace, new_pod
from chart_release import NAMESPACE, Helm

from weightsync_demo.kube.apiserver import ApiServer, run_apiserver
from weightsync_demo.kube.build import Binaries
from weightsync_demo.waiting import wait_for


@pytest.fixture(scope="session")
def cluster(binaries: Binaries, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    with run_apiserver(tmp_path_factory.mktemp("cluster"), binaries) as server:
        yield server


@pytest.fixture(scope="session")
def installed(helm: Helm, cluster: ApiServer) -> ApiServer:
    """The cluster with the chart in it, as it comes, and its policies in force."""
    helm.on(cluster.kubeconfig).install(NAMESPACE)
    probe = make_namespace(cluster)

    def injects() -> bool:
        return "initContainers" in create(cluster, new_pod(probe))["spec"]

    wait_for(injects, POLICY_SECONDS, "the injection's policy to be in force", ignoring=(Exception,))
    return cluster


@pytest.fixture
def place(cluster: ApiServer) -> str:
    """A namespace that takes only what is `restricted`, by Pod Security's own admission."""
    return make_namespace(cluster)
