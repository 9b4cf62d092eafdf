"""What the demo and all other integration tests take for granted of the API server."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from kubernetes import client

from weightsync_demo.kube import ports
from weightsync_demo.kube.apiserver import ApiServer, run_apiserver
from weightsync_demo.kube.build import Binaries
from weightsync_demo.kube.crd import apply_crds
from weightsync_demo.kube.errors import ApiServerError
from weightsync_demo.kube.https import get_status
from weightsync_demo.kube.source import find_source
from weightsync_demo.waiting import wait_for

GROUP = "test.weightsync.dev"
AUDIENCE = "weightsync"

WIDGETS = """
apiVersion: apiextensions.k8s.io/v1
kind: CustomResourceDefinition
metadata: {name: widgets.test.weightsync.dev}
spec:
  group: test.weightsync.dev
  scope: Namespaced
  names: {kind: Widget, plural: widgets, singular: widget, listKind: WidgetList}
  versions:
    - name: v1
      served: true
      storage: true
      subresources: {status: {}}
      schema:
        openAPIV3Schema:
          type: object
          properties:
            spec:
              type: object
              properties: {size: {type: integer}}
              x-kubernetes-validations: [{rule: "self.size < 100", message: too big}]
            status:
              type: object
              properties: {phase: {type: string}}
"""


class Widgets:
    """Widgets of one namespace, through a client that nobody generated for them."""

    def __init__(self, api_client: client.ApiClient, namespace: str) -> None:
        self._api = client.CustomObjectsApi(api_client)
        self._where = {"group": GROUP, "version": "v1", "namespace": namespace, "plural": "widgets"}

    def create(self, name: str, **fields: Any) -> dict[str, Any]:
        body = {"apiVersion": f"{GROUP}/v1", "kind": "Widget", "metadata": {"name": name}, **fields}
        return self._api.create_namespaced_custom_object(**self._where, body=body)

    def replace(self, widget: dict[str, Any]) -> dict[str, Any]:
        name = widget["metadata"]["name"]
        return self._api.replace_namespaced_custom_object(**self._where, name=name, body=widget)

    def patch(self, name: str, body: dict[str, Any]) -> dict[str, Any]:
        return self._api.patch_namespaced_custom_object(**self._where, name=name, body=body)

    def patch_status(self, name: str, body: dict[str, Any]) -> dict[str, Any]:
        return self._api.patch_namespaced_custom_object_status(**self._where, name=name, body=body)


@pytest.fixture(scope="module")
def widgets_defined(apiserver: ApiServer, tmp_path_factory: pytest.TempPathFactory) -> None:
    directory = tmp_path_factory.mktemp("widgets")
    (directory / "widgets.yaml").write_text(WIDGETS)
    apply_crds(apiserver, directory)


@pytest.fixture
def widgets(widgets_defined: None, api_client: client.ApiClient, namespace: str) -> Widgets:
    return Widgets(api_client, namespace)


@pytest.fixture
def own_server(binaries: Binaries, tmp_path: Path) -> Iterator[ApiServer]:
    """A server that the test may stop and start."""
    with run_apiserver(tmp_path / "apiserver", binaries) as server:
        yield server


def refused(error: pytest.ExceptionInfo[client.ApiException]) -> tuple[int, str]:
    """The status and the reason of a refusal."""
    return error.value.status, json.loads(error.value.body)["reason"]


def test_it_is_ready_and_bound_to_this_machine_only(apiserver: ApiServer) -> None:
    assert get_status(apiserver.url, "/readyz", apiserver.ca_file, apiserver.token) == 200
    assert apiserver.url.startswith("https://127.0.0.1:")


def test_client_and_server_are_the_pinned_version(apiserver: ApiServer) -> None:
    versions = json.loads(apiserver.kubectl("version", "--output=json"))
    pinned = find_source().kubernetes
    assert versions["serverVersion"]["gitVersion"] == pinned
    assert versions["clientVersion"]["gitVersion"] == pinned


def test_nothing_it_keeps_is_readable_by_others(apiserver: ApiServer) -> None:
    assert apiserver.directory.stat().st_mode & 0o077 == 0
    assert apiserver.kubeconfig.stat().st_mode & 0o077 == 0


def test_a_wrong_token_is_refused(apiserver: ApiServer) -> None:
    assert get_status(apiserver.url, "/api/v1/namespaces", apiserver.ca_file, "wrong") == 401


def test_a_write_with_a_stale_version_conflicts(widgets: Widgets) -> None:
    first = widgets.create("one", spec={"size": 1})
    widgets.replace({**first, "spec": {"size": 2}})
    with pytest.raises(client.ApiException) as error:
        widgets.replace({**first, "spec": {"size": 3}})
    assert refused(error) == (409, "Conflict")


def test_spec_and_status_are_written_apart(widgets: Widgets) -> None:
    created = widgets.create("one", spec={"size": 1}, status={"phase": "Early"})
    assert "status" not in created
    assert created["metadata"]["generation"] == 1

    both = {"spec": {"size": 2}, "status": {"phase": "Late"}}
    by_status = widgets.patch_status("one", both)
    assert (by_status["spec"], by_status["status"]) == ({"size": 1}, {"phase": "Late"})
    assert by_status["metadata"]["generation"] == 1

    by_spec = widgets.patch("one", {"spec": {"size": 2}, "status": {"phase": "Never"}})
    assert (by_spec["spec"], by_spec["status"]) == ({"size": 2}, {"phase": "Late"})
    assert by_spec["metadata"]["generation"] == 2


def test_cel_rules_are_evaluated(widgets: Widgets) -> None:
    with pytest.raises(client.ApiException) as error:
        widgets.create("big", spec={"size": 100})
    assert refused(error) == (422, "Invalid")
    assert "too big" in error.value.body


def test_a_lease_taken_by_another_is_not_taken_again(api_client: client.ApiClient, namespace: str) -> None:
    leases = client.CoordinationV1Api(api_client)
    body = {"metadata": {"name": "leader"}, "spec": {"holderIdentity": "nobody"}}
    seen = leases.create_namespaced_lease(namespace, body)
    seen.spec.holder_identity = "first"
    leases.replace_namespaced_lease("leader", namespace, seen)
    seen.spec.holder_identity = "second"
    with pytest.raises(client.ApiException) as error:
        leases.replace_namespaced_lease("leader", namespace, seen)
    assert refused(error) == (409, "Conflict")
    assert leases.read_namespaced_lease("leader", namespace).spec.holder_identity == "first"


class TestPodToken:
    """A token bound to a pod is the pod's identity."""

    @pytest.fixture
    def pod(self, api_client: client.ApiClient, namespace: str) -> Any:
        # serviceAccountName: without the ServiceAccount admission plugin nobody sets it, and a token is bound
        # only to a pod that has it.
        spec = {"serviceAccountName": "default", "containers": [{"name": "engine", "image": "none"}]}
        body = {"metadata": {"name": "engine-0"}, "spec": spec}
        return client.CoreV1Api(api_client).create_namespaced_pod(namespace, body)

    @pytest.fixture
    def token(self, api_client: client.ApiClient, namespace: str, pod: Any) -> str:
        bound = {"kind": "Pod", "apiVersion": "v1", "name": pod.metadata.name, "uid": pod.metadata.uid}
        request = {"spec": {"audiences": [AUDIENCE], "expirationSeconds": 600, "boundObjectRef": bound}}
        core = client.CoreV1Api(api_client)
        answer = core.create_namespaced_service_account_token("default", namespace, request)
        return str(answer.status.token)

    def review(self, api_client: client.ApiClient, token: str, audience: str) -> Any:
        body = {"spec": {"token": token, "audiences": [audience]}}
        return client.AuthenticationV1Api(api_client).create_token_review(body).status

    def test_it_names_the_pod(
        self, api_client: client.ApiClient, namespace: str, pod: Any, token: str
    ) -> None:
        status = self.review(api_client, token, AUDIENCE)
        assert status.authenticated
        assert status.audiences == [AUDIENCE]
        assert status.user.username == f"system:serviceaccount:{namespace}:default"
        assert status.user.extra["authentication.kubernetes.io/pod-name"] == ["engine-0"]
        assert status.user.extra["authentication.kubernetes.io/pod-uid"] == [pod.metadata.uid]

    def test_another_audience_refuses_it(self, api_client: client.ApiClient, token: str) -> None:
        status = self.review(api_client, token, "somebody-else")
        assert not status.authenticated
        assert "audience" in status.error

    def test_the_api_server_is_another_audience(self, apiserver: ApiServer, token: str) -> None:
        assert get_status(apiserver.url, "/api/v1/namespaces", apiserver.ca_file, token) == 401

    def test_rbac_grants_nothing_that_no_role_says(
        self, apiserver: ApiServer, api_client: client.ApiClient, namespace: str
    ) -> None:
        core = client.CoreV1Api(api_client)
        answer = core.create_namespaced_service_account_token("default", namespace, {"spec": {}})
        path = f"/api/v1/namespaces/{namespace}/pods"
        assert get_status(apiserver.url, path, apiserver.ca_file, answer.status.token) == 403


def test_the_projects_custom_resources_are_served(apiserver: ApiServer, crds: None) -> None:
    assert "weightsyncs.weightsync.dev" in apiserver.kubectl(
        "api-resources", "--api-group=weightsync.dev", "--output=name"
    )


@pytest.mark.parametrize("how", ["stop", "kill"])
def test_started_again_it_has_the_same_objects_and_address(own_server: ApiServer, how: str) -> None:
    own_server.kubectl("create", "configmap", "kept", "--from-literal=answer=42")
    before = (own_server.url, own_server.kubeconfig.read_text(), own_server.ca_file.read_text())
    getattr(own_server, how)()
    assert not own_server.running

    own_server.start()
    assert (own_server.url, own_server.kubeconfig.read_text(), own_server.ca_file.read_text()) == before
    assert own_server.kubectl("get", "configmap", "kept", "--output=jsonpath={.data.answer}") == "42"


def test_a_port_taken_in_between_is_given_up_for_another(
    binaries: Binaries, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = ports.choose("127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        choices = [taken.getsockname()[1], free]
        monkeypatch.setattr(ports, "choose", lambda host: choices.pop(0))
        with run_apiserver(tmp_path, binaries) as server:
            assert server.port == free


def test_two_servers_never_share_a_directory(own_server: ApiServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weightsync_demo.kube.apiserver.LOCK_TIMEOUT_S", 0.1)
    second = ApiServer(own_server.directory, own_server.binaries)
    with pytest.raises(ApiServerError, match="another API server runs in"):
        second.start()
    assert get_status(own_server.url, "/readyz", own_server.ca_file, own_server.token) == 200


def test_a_failed_start_shows_the_end_of_the_log(binaries: Binaries, tmp_path: Path) -> None:
    server = ApiServer(tmp_path, binaries)
    (tmp_path / "tokens.csv").write_text("a,line,that,is,no,token\n'\"")
    with pytest.raises(ApiServerError, match=r"(?s)ended while it was starting.*parse error on line 2"):
        server.start()
    assert not server.running


def test_it_outlives_the_thread_that_started_it(binaries: Binaries, tmp_path: Path) -> None:
    server = ApiServer(tmp_path, binaries)
    thread = threading.Thread(target=server.start)
    thread.start()
    thread.join()
    try:
        assert get_status(server.url, "/readyz", server.ca_file, server.token) == 200
    finally:
        server.stop()


STARTER = """
import sys, time
from pathlib import Path
from weightsync_demo.kube.apiserver import ApiServer
from weightsync_demo.kube.build import Binaries
server = ApiServer(Path(sys.argv[1]), Binaries(Path(sys.argv[2])))
server.start()
print(server.pid, server.port, flush=True)
sys.stdin.read()
"""


def test_it_ends_with_a_parent_that_is_killed(binaries: Binaries, tmp_path: Path) -> None:
    command = [sys.executable, "-c", STARTER, str(tmp_path), str(binaries.hyper)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid, port = map(int, parent.stdout.readline().split())
        parent.kill()
    try:
        wait_for(lambda: not answers(port), 10, f"the end of API server {pid}")
    except TimeoutError:
        os.kill(pid, signal.SIGKILL)
        raise
    # Its directory is free for the next one.
    with run_apiserver(tmp_path, binaries) as server:
        assert server.port == port


def answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True
