"""Keeps the store true: an authoritative LIST at start, each minute and when asked; in between the watch.

A watch alone is not enough: after it lost its place in the stream, an object deleted meanwhile stays.
"""

import asyncio
from collections.abc import Callable
from typing import Any, Final

from weightsync_contract import logs
from weightsync_operator.core.model import PodView
from weightsync_operator.health import Health
from weightsync_operator.kube.api import Api
from weightsync_operator.kube.errors import KubeError, NotFoundError
from weightsync_operator.kube.resources import list_pods, list_weightsyncs
from weightsync_operator.store import Key, Store

log = logs.get(__name__)

RELIST_SECONDS: Final = 60.0
_RETRY_SECONDS: Final = 1.0


class Truth:
    """Tells ``enqueue`` each WeightSync that may have to be looked at again, ``pod_gone`` each deleted pod.

    ``namespace`` empty means all of them.
    """

    def __init__(
        self,
        api: Api,
        store: Store,
        health: Health,
        namespace: str,
        enqueue: Callable[[Key], None],
        pod_gone: Callable[[PodView], None],
    ) -> None:
        self._api = api
        self._store = store
        self._health = health
        self._namespace = namespace
        self._enqueue = enqueue
        self._pod_gone = pod_gone
        self.failures = 0
        """Lists that failed."""

    async def list_until_done(self) -> None:
        """LIST everything, again and again until it succeeds."""
        while True:
            try:
                await self._list_all()
                return
            except NotFoundError as error:
                self.failures += 1
                log.error("no WeightSyncs at the API server: kubectl apply -f crds/", error=error)
            except KubeError as error:
                self.failures += 1
                log.error("list failed, trying again", error=error)
            await asyncio.sleep(_RETRY_SECONDS)

    async def list_for_ever(self) -> None:
        """LIST everything each minute, and have everything looked at."""
        while True:
            await asyncio.sleep(RELIST_SECONDS)
            try:
                await self._list_all()
            except KubeError as error:
                self.failures += 1
                log.warning("list failed", error=error)
                continue
            for each in self._store.weightsyncs():
                self._enqueue(each.key)

    async def refresh_pods(self, namespace: str) -> None:
        """Make the store's pods (of a namespace, if given) what the API server has now. Raises KubeError."""
        pods, version = await list_pods(self._api, namespace)
        for gone in self._store.listed_pods(pods, version, namespace):
            self._gone(gone)
        self._health.heard()

    async def find_pod(self, namespace: str, uid: str) -> PodView | None:
        """A pod with a role; it is looked for at the API server before None is answered. Raises KubeError."""
        pod = self._store.pod(uid)
        if pod is None and self._namespace in ("", namespace):
            await self.refresh_pods(namespace)
            pod = self._store.pod(uid)
        return pod

    def weightsync_event(self, gone: bool, document: dict[str, Any]) -> None:
        """Take a watch event."""
        self._health.heard()
        metadata = document["metadata"]
        uid = metadata["uid"]
        if self._store.drop_weightsync(uid) if gone else self._store.put_weightsync(document):
            self._enqueue((metadata["namespace"], metadata["name"]))

    def pod_event(self, gone: bool, document: dict[str, Any]) -> None:
        """Take a watch event."""
        self._health.heard()
        metadata = document["metadata"]
        if not gone:
            if self._store.put_pod(document):
                self._enqueue_namespace(metadata["namespace"])
            return
        pod = self._store.pod(metadata["uid"])
        self._store.drop_pod(metadata["uid"])
        if pod is not None:
            self._gone(pod)

    async def _list_all(self) -> None:
        weightsyncs, version = await list_weightsyncs(self._api, self._namespace)
        for gone in self._store.listed_weightsyncs(weightsyncs, version, self._namespace):
            self._enqueue(gone.key)
        await self.refresh_pods(self._namespace)
        self._health.listed = True

    def _gone(self, pod: PodView) -> None:
        self._pod_gone(pod)
        self._enqueue_namespace(pod.namespace)

    def _enqueue_namespace(self, namespace: str) -> None:
        for each in self._store.weightsyncs(namespace):
            self._enqueue(each.key)
