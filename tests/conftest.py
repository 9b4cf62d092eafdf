"""A real Kubernetes API server for the tests that ask for one.

One server a test run, one namespace a test. No controller-manager runs: a deleted namespace stays Terminating
and nothing follows an owner reference, so a test leaves its namespace behind and looks only into its own.
"""

import contextlib
import os
import secrets
import threading
from collections.abc import Iterator

import pytest
from chart_release import Helm
from helm_binary import HelmMissingError, ensure_helm
from kubernetes import client, config

from weightsync_demo.kube.apiserver import ApiServer, run_apiserver
from weightsync_demo.kube.build import Binaries, ensure_binaries, find_binaries
from weightsync_demo.kube.crd import apply_crds
from weightsync_demo.kube.errors import KubeError

BUILD_TIMEOUT_S = 3600


def in_ci() -> bool:
    return os.environ.get("CI") == "true"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """In CI begin at once with building what some test needs and isn't there; other tests run meanwhile."""
    needing = [item for item in items if "binaries" in getattr(item, "fixturenames", ())]
    if needing and in_ci() and find_binaries() is None:
        for item in needing:
            # The first of them waits for the compiler.
            item.add_marker(pytest.mark.timeout(BUILD_TIMEOUT_S))
        threading.Thread(target=_begin_building, daemon=True).start()


def _begin_building() -> None:
    # A failure is seen by the fixture, which tries again.
    with contextlib.suppress(KubeError, OSError):
        ensure_binaries(lambda line: None)


@pytest.fixture(scope="session")
def binaries() -> Binaries:
    """kube-apiserver, kubectl and the rest, of the version that tests/cluster/go.mod pins.

    With CI=true they are built where need be, and the test fails if they can't be. Elsewhere a test that
    needs them is skipped until they were built once: nobody asked a test run for some minutes of compiling.
    """
    if in_ci():
        try:
            return ensure_binaries(print)
        except (KubeError, OSError) as error:
            pytest.fail(f"Kubernetes can't be built: {error}")
    found = find_binaries()
    if found is None:
        pytest.skip("Kubernetes isn't built yet: make apiserver ARGS=--build-only")
    return found


@pytest.fixture(scope="session")
def apiserver(binaries: Binaries, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    """A ready API server that the whole test run shares: `.kubeconfig`, `.url`, `.ca_file`, `.kubectl()`.

    It has no custom resources (see `crds`). A test that stops or restarts a server makes one of its own:
    `run_apiserver(tmp_path, binaries)`.
    """
    with run_apiserver(tmp_path_factory.mktemp("apiserver"), binaries) as server:
        yield server


@pytest.fixture(scope="session")
def crds(apiserver: ApiServer) -> None:
    """The custom resource definitions of crds/, applied to `apiserver` and served."""
    apply_crds(apiserver)


@pytest.fixture(scope="session")
def api_client(apiserver: ApiServer) -> Iterator[client.ApiClient]:
    """A client with the admin's rights: `client.CoreV1Api(api_client)`."""
    configuration = client.Configuration()
    config.load_kube_config(str(apiserver.kubeconfig), client_configuration=configuration)
    # The environment's proxy can't reach this machine's loopback.
    configuration.proxy = None
    with client.ApiClient(configuration) as made:
        yield made


@pytest.fixture
def namespace(api_client: client.ApiClient) -> str:
    """The name of a fresh namespace with the ServiceAccount `default`, which nobody else makes here."""
    name = f"test-{secrets.token_hex(4)}"
    core = client.CoreV1Api(api_client)
    core.create_namespace({"metadata": {"name": name}})
    core.create_namespaced_service_account(name, {"metadata": {"name": "default"}})
    return name


@pytest.fixture(scope="session")
def helm(tmp_path_factory: pytest.TempPathFactory) -> Helm:
    """With CI=true the tests fail where helm can't be had; elsewhere they are skipped, saying why."""
    try:
        executable = ensure_helm()
    except HelmMissingError as error:
        if in_ci():
            pytest.fail(str(error))
        pytest.skip(str(error))
    return Helm(executable, tmp_path_factory.mktemp("helm"))
