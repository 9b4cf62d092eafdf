"""One request to the API server from asyncio: JSON documents in and out, errors by what can be done."""

import asyncio
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import urllib3.exceptions
from kubernetes.client.exceptions import ApiException

from weightsync_operator.kube.connection import Connection
from weightsync_operator.kube.errors import (
    ConflictError,
    ForbiddenError,
    InvalidError,
    KubeError,
    NotFoundError,
    UnavailableError,
)

TIMEOUT_SECONDS: Final = 10.0
USER_AGENT: Final = "weightsync-operator"
_THREADS: Final = 32


class Api:
    """The official client's transport and credentials, without its models: documents stay what was sent."""

    def __init__(self, connection: Connection) -> None:
        self._client = connection.client()
        self._client.user_agent = USER_AGENT
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="kube")

    async def request(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
        timeout: float = TIMEOUT_SECONDS,
    ) -> dict[str, Any]:
        """The answer's document. Raises a KubeError; every request ends within ``timeout`` seconds.

        ``headers`` go beside, or in place of, those that make it JSON.
        """
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(timeout + 1.0):
                return await loop.run_in_executor(
                    self._threads,
                    self._request,
                    method,
                    path,
                    dict(query or {}),
                    body,
                    headers or {},
                    timeout,
                )
        except TimeoutError as error:
            raise UnavailableError(f"{method} {path}: no answer within {timeout:g} s") from error

    def close(self) -> None:
        """Give connections back; a request under way is not waited for."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._client.close()

    def _request(
        self,
        method: str,
        path: str,
        query: dict[str, str],
        body: Mapping[str, Any] | None,
        headers: Mapping[str, str],
        timeout: float,
    ) -> dict[str, Any]:
        arguments = self._client.param_serialize(
            method=method,
            resource_path=path,
            query_params=list(query.items()),
            header_params={"Accept": "application/json", "Content-Type": "application/json", **headers},
            body=body,
            auth_settings=["BearerToken"],
        )
        try:
            response = self._client.call_api(*arguments, _request_timeout=timeout)
            data = response.read()
        except (urllib3.exceptions.HTTPError, ApiException, OSError) as error:
            raise UnavailableError(f"{method} {path}: {error}") from error
        if 200 <= response.status < 300:
            document: dict[str, Any] = json.loads(data)
            return document
        raise _error(response.status, f"{method} {path}: {response.status} {_message(data)}")


def _message(data: bytes) -> str:
    try:
        document = json.loads(data)
        return str(document.get("message") or document["error"])
    except (ValueError, KeyError, TypeError, AttributeError):
        return data[:200].decode(errors="replace")


def _error(status: int, message: str) -> KubeError:
    kinds: dict[int, type[KubeError]] = {
        400: InvalidError,
        401: ForbiddenError,
        403: ForbiddenError,
        404: NotFoundError,
        409: ConflictError,
        410: UnavailableError,
        422: InvalidError,
        429: UnavailableError,
    }
    return kinds.get(status, UnavailableError if status >= 500 else InvalidError)(message)
