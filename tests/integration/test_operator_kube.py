"""The operator's edges at a real API server: errors, stale writes, tokens, Events."""

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
import yaml
from cluster_objects import ClusterObjects
from kubernetes import client

from weightsync_contract.messages import ObjectRef
from weightsync_demo.kube.apiserver import ApiServer
from weightsync_operator.core.model import Note, Status
from weightsync_operator.documents import parse_weightsync, status_document
from weightsync_operator.kube.api import Api
from weightsync_operator.kube.connection import Connection
from weightsync_operator.kube.errors import (
    ConfigurationError,
    ConflictError,
    ForbiddenError,
    InvalidError,
    NotFoundError,
    UnavailableError,
)
from weightsync_operator.kube.resources import (
    create_event,
    get_weightsync,
    list_pods,
    list_weightsyncs,
    put_status,
)
from weightsync_operator.kube.reviews import User, may_read, review_token

pytestmark = pytest.mark.usefixtures("crds")


@pytest.fixture
def objects(api_client: client.ApiClient, namespace: str) -> ClusterObjects:
    return ClusterObjects(api_client, namespace)


@pytest.fixture
async def api(apiserver: ApiServer) -> AsyncIterator[Api]:
    api = Api(Connection(str(apiserver.kubeconfig)))
    yield api
    api.close()


async def test_a_status_is_written_once_and_stale_writes_are_refused(
    api: Api, objects: ClusterObjects
) -> None:
    created = objects.weightsync()
    first = await put_status(api, created, status_document(Status(term=1)))
    assert parse_weightsync(first).status == Status(term=1)
    with pytest.raises(ConflictError):
        await put_status(api, created, status_document(Status(term=2)))
    again = await get_weightsync(api, objects.namespace, "policy")
    assert parse_weightsync(again).status == Status(term=1)
    assert again["spec"] == created["spec"]


async def test_a_status_is_not_written_to_another_object_of_the_same_name(
    api: Api, objects: ClusterObjects
) -> None:
    created = objects.weightsync()
    objects.delete()
    with pytest.raises(NotFoundError):
        await put_status(api, created, status_document(Status(term=1)))
    objects.weightsync()
    with pytest.raises(ConflictError):
        await put_status(api, created, status_document(Status(term=1)))


async def test_a_field_that_goes_away_goes_away(api: Api, objects: ClusterObjects) -> None:
    created = objects.weightsync()
    first = await put_status(api, created, {"term": 1, "synced": "1/2"})
    second = await put_status(api, first, {"term": 1})
    assert second["status"] == {"term": 1}


async def test_an_invalid_status_is_told_apart(api: Api, objects: ClusterObjects) -> None:
    created = objects.weightsync()
    with pytest.raises(InvalidError, match="term"):
        await put_status(api, created, {"term": -1})


async def test_lists_see_pods_with_a_role_only(api: Api, objects: ClusterObjects) -> None:
    objects.pod("trainer-0", "trainer", "trainer")
    objects.pod("stranger", None, "vllm")
    pods, _ = await list_pods(api, objects.namespace)
    assert [each["metadata"]["name"] for each in pods] == ["trainer-0"]
    objects.weightsync()
    weightsyncs, version = await list_weightsyncs(api, objects.namespace)
    assert [each["metadata"]["name"] for each in weightsyncs] == ["policy"]
    assert int(version) >= int(weightsyncs[0]["metadata"]["resourceVersion"])


async def test_a_pod_bound_token_says_whose_it_is(api: Api, objects: ClusterObjects) -> None:
    pod = objects.pod("vllm-0", "inference", "vllm")
    user = await review_token(api, objects.token(pod), "weightsync")
    assert user is not None
    assert (user.namespace, user.pod_name, user.pod_uid) == (pod.namespace, pod.name, pod.uid)
    assert user.name == f"system:serviceaccount:{objects.namespace}:default"


async def test_other_tokens_are_no_good(api: Api, objects: ClusterObjects) -> None:
    pod = objects.pod("vllm-0", "inference", "vllm")
    assert await review_token(api, objects.token(pod, audience="somebody-else"), "weightsync") is None
    assert await review_token(api, objects.token(pod, audience=""), "weightsync") is None
    assert await review_token(api, "no.token.atall", "weightsync") is None
    unbound = await review_token(api, objects.token(), "weightsync")
    assert unbound is not None and unbound.pod_uid == ""


async def test_the_admin_s_static_token_is_not_taken_for_our_audience(api: Api, apiserver: ApiServer) -> None:
    assert await review_token(api, apiserver.token, "weightsync") is None
    admin = await review_token(api, apiserver.token)
    assert admin is not None and admin.name == "admin"


async def test_who_may_read_is_asked_of_the_api_server(api: Api, objects: ClusterObjects) -> None:
    nobody = User(f"system:serviceaccount:{objects.namespace}:default")
    assert not await may_read(api, nobody, objects.namespace, "policy")
    assert await may_read(api, User("admin", groups=("system:masters",)), objects.namespace, "policy")


async def test_an_event_is_shown_by_describe(api: Api, objects: ClusterObjects, apiserver: ApiServer) -> None:
    created = objects.weightsync()
    ref = ObjectRef(objects.namespace, "policy", created["metadata"]["uid"])
    await create_event(api, ref, Note("JoinTimeout", "vllm-1 did not join", warning=True), "replica-1", "abc")
    await create_event(api, ref, Note("Complete", "m" * 3000), "replica-1", "def")
    text = apiserver.kubectl("describe", "weightsync", "policy", "-n", objects.namespace)
    assert "Warning  JoinTimeout" in text
    assert "vllm-1 did not join" in text
    assert "weightsync.dev/operator" in text


async def test_nobody_there_is_told_apart_from_not_allowed(
    apiserver: ApiServer, objects: ClusterObjects, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    kubeconfig = yaml.safe_load(apiserver.kubeconfig.read_text())
    kubeconfig["users"][0]["user"] = {"token": objects.token(audience="")}
    (tmp_path / "weak").write_text(json.dumps(kubeconfig))
    # As kubectl: without a flag the environment counts.
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "weak"))
    weak = Api(Connection())
    with pytest.raises(ForbiddenError, match="cannot list resource"):
        await list_weightsyncs(weak)
    weak.close()
    kubeconfig["clusters"][0]["cluster"]["server"] = "https://127.0.0.1:1"
    (tmp_path / "dead").write_text(json.dumps(kubeconfig))
    dead = Api(Connection(str(tmp_path / "dead")))
    with pytest.raises(UnavailableError):
        await list_weightsyncs(dead)
    dead.close()


def test_a_context_is_chosen_by_name(apiserver: ApiServer, tmp_path: Any) -> None:
    kubeconfig = yaml.safe_load(apiserver.kubeconfig.read_text())
    other = json.loads(json.dumps(kubeconfig["contexts"][0]))
    other["name"], other["context"]["namespace"] = "other", "elsewhere"
    kubeconfig["contexts"].append(other)
    path = tmp_path / "two"
    path.write_text(json.dumps(kubeconfig))
    assert Connection(str(path), "other").namespace == "elsewhere"
    with pytest.raises(ConfigurationError, match="--context"):
        Connection(str(path), "third")


def test_without_any_way_to_a_cluster_it_says_what_was_tried(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ConfigurationError, match="KUBECONFIG, "):
        Connection(environ={})
    with pytest.raises(ConfigurationError, match="missing"):
        Connection(str(tmp_path / "missing"))
