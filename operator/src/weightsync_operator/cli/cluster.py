"""The cluster as the command line needs it: WeightSyncs, pods, and the live fleet through the API server."""

import contextlib
from collections.abc import Mapping
from typing import Any, Final

from weightsync_contract.names import API_VERSION, GROUP, LABEL_ROLE, PLURAL
from weightsync_operator.core.spec import matches, parse_spec
from weightsync_operator.kube.api import Api
from weightsync_operator.kube.connection import Connection
from weightsync_operator.kube.errors import KubeError

MERGE: Final = "application/merge-patch+json"


class Cluster:
    """One namespace, reached as kubectl reaches it. Every call may raise a KubeError."""

    def __init__(self, kubeconfig: str = "", context: str = "", namespace: str = "") -> None:
        connection = Connection(kubeconfig, context)
        self.api = Api(connection)
        self.namespace = namespace or connection.namespace
        self.server: str = connection.configuration.host

    def close(self) -> None:
        """Give connections back."""
        self.api.close()

    async def weightsync(self, name: str) -> dict[str, Any]:
        """One WeightSync. Raises NotFoundError."""
        return await self.api.request("GET", self._weightsync(name))

    async def weightsyncs(self, everywhere: bool = False) -> list[dict[str, Any]]:
        """Those of the namespace, or of all."""
        path = f"/apis/{GROUP}/{API_VERSION}/{PLURAL}" if everywhere else self._weightsync("")
        answer = await self.api.request("GET", path.rstrip("/"))
        return list(answer["items"])

    async def patch(self, name: str, patch: Mapping[str, Any]) -> dict[str, Any]:
        """Merge this into a WeightSync; answers it as it is then."""
        return await self.api.request(
            "PATCH", self._weightsync(name), body=patch, headers={"Content-Type": MERGE}
        )

    async def pods(self) -> list[dict[str, Any]]:
        """Pods of the namespace that have a role."""
        path = f"/api/v1/namespaces/{self.namespace}/pods"
        answer = await self.api.request("GET", path, query={"labelSelector": LABEL_ROLE})
        return list(answer["items"])

    async def selected_pods(self, document: Mapping[str, Any]) -> list[dict[str, Any]] | None:
        """The pods that a WeightSync selects, trainers first; None if they may not be listed."""
        with contextlib.suppress(KubeError, ValueError):
            spec = parse_spec(document["spec"])
            pods = await self.pods()
            chosen = []
            for selector in (spec.trainer, spec.inference):
                chosen += [pod for pod in pods if matches(selector, pod["metadata"].get("labels") or {})]
            return chosen
        return None

    def _weightsync(self, name: str) -> str:
        return f"/apis/{GROUP}/{API_VERSION}/namespaces/{self.namespace}/{PLURAL}/{name}"
