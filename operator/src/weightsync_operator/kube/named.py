"""Secrets and ConfigMaps by name, each read and written whole."""

from collections.abc import Mapping
from typing import Any

from weightsync_operator.kube.api import Api
from weightsync_operator.kube.errors import NotFoundError


async def find_secret(api: Api, namespace: str, name: str) -> dict[str, Any] | None:
    """A Secret; None if it is not there."""
    return await _find(api, _path("secrets", namespace, name))


async def find_configmap(api: Api, namespace: str, name: str) -> dict[str, Any] | None:
    """A ConfigMap; None if it is not there."""
    return await _find(api, _path("configmaps", namespace, name))


async def write_secret(api: Api, document: Mapping[str, Any]) -> dict[str, Any]:
    """Create it, or write it over the one that was read if it has a resourceVersion.

    Raises ConflictError if anybody was faster.
    """
    return await _write(api, "secrets", document)


async def write_configmap(api: Api, document: Mapping[str, Any]) -> dict[str, Any]:
    """The same for a ConfigMap."""
    return await _write(api, "configmaps", document)


async def _find(api: Api, path: str) -> dict[str, Any] | None:
    try:
        return await api.request("GET", path)
    except NotFoundError:
        return None


async def _write(api: Api, plural: str, document: Mapping[str, Any]) -> dict[str, Any]:
    metadata = document["metadata"]
    if metadata.get("resourceVersion"):
        path = _path(plural, metadata["namespace"], metadata["name"])
        return await api.request("PUT", path, body=document)
    return await api.request("POST", _path(plural, metadata["namespace"]), body=document)


def _path(plural: str, namespace: str, name: str = "") -> str:
    return f"/api/v1/namespaces/{namespace}/{plural}" + (f"/{name}" if name else "")
