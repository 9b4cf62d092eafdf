"""kopf as the watch layer: what it hands on, what it never does."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import kopf
import pytest
from cluster_objects import ClusterObjects
from kubernetes import client

from weightsync_demo.kube.apiserver import ApiServer, run_apiserver
from weightsync_demo.kube.build import Binaries
from weightsync_demo.kube.crd import apply_crds
from weightsync_operator.kube.connection import Connection
from weightsync_operator.watch import Watch


class Seen:
    """Events in the order in which they were handed over."""

    def __init__(self) -> None:
        self.names: list[tuple[str, bool]] = []
        self._changed = asyncio.Event()

    def take(self, gone: bool, document: dict[str, Any]) -> None:
        self.names.append((document["metadata"]["name"], gone))
        self._changed.set()

    async def until(self, condition: Callable[[list[tuple[str, bool]]], bool], seconds: float = 20) -> None:
        async with asyncio.timeout(seconds):
            while not condition(self.names):
                self._changed.clear()
                await self._changed.wait()


@asynccontextmanager
async def watching(kubeconfig: Path, namespace: str) -> AsyncIterator[tuple[Seen, Seen]]:
    weightsyncs, pods = Seen(), Seen()
    watch = Watch(Connection(str(kubeconfig)), namespace, weightsyncs.take, pods.take)
    watch.start()
    try:
        yield weightsyncs, pods
    finally:
        async with asyncio.timeout(10):
            await watch.stop()


@pytest.fixture
def objects(api_client: client.ApiClient, namespace: str) -> ClusterObjects:
    return ClusterObjects(api_client, namespace)


@pytest.mark.usefixtures("crds")
async def test_only_pods_with_a_role_are_handed_on(apiserver: ApiServer, objects: ClusterObjects) -> None:
    objects.pod("stranger-before", None, "vllm")
    objects.pod("vllm-before", "inference", "vllm")
    async with watching(apiserver.kubeconfig, objects.namespace) as (_, pods):
        await pods.until(lambda names: ("vllm-before", False) in names)
        objects.pod("stranger-after", None, "vllm")
        objects.pod("vllm-after", "inference", "vllm")
        await pods.until(lambda names: ("vllm-after", False) in names)
        assert {name for name, _ in pods.names} == {"vllm-before", "vllm-after"}


@pytest.mark.usefixtures("crds")
async def test_a_whole_life_is_handed_on(apiserver: ApiServer, objects: ClusterObjects) -> None:
    async with watching(apiserver.kubeconfig, objects.namespace) as (weightsyncs, pods):
        objects.weightsync()
        await weightsyncs.until(lambda names: names == [("policy", False)])
        objects.patch({"spec": {"paused": True}})
        await weightsyncs.until(lambda names: len(names) == 2)
        objects.delete()
        await weightsyncs.until(lambda names: names[-1] == ("policy", True))
        objects.pod("vllm-0", "inference", "vllm")
        await pods.until(bool)
        objects.delete_pod("vllm-0")
        await pods.until(lambda names: names[-1] == ("vllm-0", True))


@pytest.mark.usefixtures("crds")
async def test_a_pod_that_loses_its_role_is_gone(apiserver: ApiServer, objects: ClusterObjects) -> None:
    objects.pod("vllm-0", "inference", "vllm")
    async with watching(apiserver.kubeconfig, objects.namespace) as (_, pods):
        await pods.until(bool)
        patch = {"metadata": {"labels": {"weightsync.dev/role": None}}}
        objects.core.patch_namespaced_pod("vllm-0", objects.namespace, patch)
        await pods.until(lambda names: names[-1] == ("vllm-0", True))


@pytest.mark.usefixtures("crds")
async def test_kopf_writes_nothing(apiserver: ApiServer, objects: ClusterObjects) -> None:
    weightsync = objects.weightsync()
    pod = objects.pod("vllm-0", "inference", "vllm")
    before = objects.core.read_namespaced_pod(pod.name, objects.namespace).metadata
    async with watching(apiserver.kubeconfig, objects.namespace) as (weightsyncs, pods):
        await weightsyncs.until(bool)
        await pods.until(bool)
    assert objects.read()["metadata"] == weightsync["metadata"]
    after = objects.core.read_namespaced_pod(pod.name, objects.namespace).metadata
    assert (after.resource_version, after.finalizers) == (before.resource_version, None)
    assert objects.events() == []


@pytest.mark.usefixtures("crds")
async def test_watching_begins_again_when_kopf_ends(
    apiserver: ApiServer, objects: ClusterObjects, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = []

    async def ends_at_first(**arguments: Any) -> None:
        runs.append(arguments)
        if len(runs) == 1:
            raise RuntimeError("an error in the stream")
        await operator(**arguments)

    operator = kopf.operator
    monkeypatch.setattr(kopf, "operator", ends_at_first)
    objects.weightsync()
    async with watching(apiserver.kubeconfig, objects.namespace) as (weightsyncs, _):
        await weightsyncs.until(bool)
    assert len(runs) == 2


async def test_watching_goes_on_after_the_api_server_was_away(binaries: Binaries, tmp_path: Path) -> None:
    with run_apiserver(tmp_path, binaries) as server:
        apply_crds(server)
        server.kubectl("create", "namespace", "there")
        async with watching(server.kubeconfig, "there") as (weightsyncs, _):
            create(server, "before")
            await weightsyncs.until(lambda names: ("before", False) in names)
            await asyncio.to_thread(server.kill)
            await asyncio.to_thread(server.start)
            await asyncio.to_thread(create, server, "after")
            await weightsyncs.until(lambda names: ("after", False) in names, 60)


def create(server: ApiServer, name: str) -> None:
    document = f"""
apiVersion: weightsync.dev/v1alpha1
kind: WeightSync
metadata: {{name: {name}}}
spec:
  trainer: {{selector: {{matchLabels: {{app: trainer}}}}}}
  inference: {{selector: {{matchLabels: {{app: vllm}}}}}}
"""
    server.kubectl("create", "-n", "there", "-f", "-", stdin=document)
