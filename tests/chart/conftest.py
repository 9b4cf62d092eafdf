"""helm, and an API server of these tests' own: a policy of admission is for all of a cluster's namespaces."""

from collections.abc import Iterator

import pytest

from chart_release import Helm
from helm_binary import HelmMissingError, ensure_helm
from weightsync_demo.kube.apiserver import ApiServer, run_apiserver
from weightsync_demo.kube.build import Binaries


@pytest.fixture(scope="session")
def helm(tmp_path_factory: pytest.TempPathFactory, in_ci: bool) -> Helm:
    try:
        executable = ensure_helm()
    except HelmMissingError as error:
        if in_ci:
            pytest.fail(str(error))
        pytest.skip(str(error))
    return Helm(executable, tmp_path_factory.mktemp("helm"))


@pytest.fixture(scope="session")
def cluster(binaries: Binaries, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    with run_apiserver(tmp_path_factory.mktemp("cluster"), binaries) as server:
        yield server
