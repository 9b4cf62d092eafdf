"""The live fleet, which the operator alone knows, by the way that is open.

Through the API server's proxy of the operator's Service, with whatever credentials kubectl uses; or straight to
an operator on this machine, or to where ``--operator-url`` says. The operator is shown a token of a ServiceAccount of
the WeightSync's namespace that is good for reading fleets only, and for ten minutes.
"""

import contextlib
import ipaddress
import json
import ssl
import time
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlparse

from weightsync_contract.codec import MalformedError, from_document
from weightsync_contract.fleetview import FleetView
from weightsync_contract.names import (
    CA_FILE,
    CA_NAME,
    FLEET_AUDIENCE,
    FLEET_PATH,
    FLEET_TOKEN_HEADER,
    LABEL_CA_OF,
    LEASE_NAME,
    SESSION_PORT,
)
from weightsync_operator.cli.cluster import Cluster
from weightsync_operator.kube.errors import ForbiddenError, KubeError, NotFoundError, UnavailableError
from weightsync_operator.kube.leases import get_lease

DEFAULT_OPERATOR: Final = "weightsync-system/weightsync-operator"
_TOKEN_SECONDS: Final = 600
_RENEW_SECONDS: Final = 480.0
_SECONDS: Final = 5.0
_TRIES: Final = 8
"""Which replica a Service's proxy asks is chance; one of two leads."""


class NoViewError(Exception):
    """The live fleet can't be had; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Operator:
    """Where the operator is. ``namespace`` and ``service`` name its Service; ``url`` is dialled if given."""

    namespace: str
    service: str
    url: str = ""
    ca: str = ""
    """PEM; what its certificate is checked with."""


async def find_operator(cluster: Cluster, named: str = "", url: str = "") -> Operator:
    """``named``: NAMESPACE/SERVICE. Else the operator whose certificates the namespace has; else the usual place."""
    bundle: dict[str, Any] = {}
    with contextlib.suppress(KubeError):
        bundle = await cluster.api.request(
            "GET", f"/api/v1/namespaces/{cluster.namespace}/configmaps/{CA_NAME}"
        )
    ca = str((bundle.get("data") or {}).get(CA_FILE, ""))
    namespace, _, service = (named or DEFAULT_OPERATOR).partition("/")
    if not named:
        labels = (bundle.get("metadata") or {}).get("labels") or {}
        namespace = labels.get(LABEL_CA_OF) or namespace
    return Operator(namespace, service or LEASE_NAME, url or await _near(cluster, namespace, ca), ca)


async def _near(cluster: Cluster, namespace: str, ca: str) -> str:
    """The leader's address, if it is on this machine: there is no Service for such an operator."""
    try:
        lease = await get_lease(cluster.api, namespace, LEASE_NAME, _SECONDS)
    except KubeError:
        return ""
    host = lease.address.rpartition(":")[0] if lease.holder else ""
    return f"{'https' if ca else 'http'}://{lease.address}" if is_loopback(host) else ""


def is_loopback(host: str) -> bool:
    """Whether it is this machine."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


class Live:
    """Reads one namespace's fleets, again and again."""

    def __init__(self, cluster: Cluster, operator: Operator, account: str = "") -> None:
        self._cluster, self._operator, self._account = cluster, operator, account
        self._token, self._until = "", 0.0

    async def view(self, name: str) -> FleetView:
        """The fleet now. Raises NoViewError."""
        token = await self._fresh_token()
        path = f"{FLEET_PATH}/{self._cluster.namespace}/{name}"
        try:
            if self._operator.url:
                document = await self._dial(path, token)
            else:
                document = await self._through_proxy(path, token)
            return from_document(FleetView, document)
        except MalformedError as error:
            raise NoViewError(
                f"the operator's answer is of another version than this command: {error}"
            ) from error

    async def _fresh_token(self) -> str:
        if time.monotonic() < self._until:
            return self._token
        accounts = f"/api/v1/namespaces/{self._cluster.namespace}/serviceaccounts"
        try:
            self._token = await self._make_token(accounts, self._account or "default")
        except NotFoundError:
            self._token = await self._make_token(accounts, await self._any_account(accounts))
        except ForbiddenError as error:
            raise NoViewError(
                f"the operator shows a fleet to who may act for its namespace, and you may not make a token of a "
                f"ServiceAccount here ({error}): ask for create on serviceaccounts/token, which the role edit has"
            ) from error
        except KubeError as error:
            raise NoViewError(str(error)) from error
        self._until = time.monotonic() + _RENEW_SECONDS
        return self._token

    async def _make_token(self, accounts: str, account: str) -> str:
        body = {
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenRequest",
            "spec": {"audiences": [FLEET_AUDIENCE], "expirationSeconds": _TOKEN_SECONDS},
        }
        answer = await self._cluster.api.request("POST", f"{accounts}/{account}/token", body=body)
        return str(answer["status"]["token"])

    async def _any_account(self, accounts: str) -> str:
        try:
            found = (await self._cluster.api.request("GET", accounts))["items"]
        except KubeError as error:
            raise NoViewError(
                f"no ServiceAccount to speak as: {error}. Name one: --service-account"
            ) from error
        if not found or self._account:
            raise NoViewError(
                "there is no such ServiceAccount in the namespace: name one with --service-account"
            )
        return str(found[0]["metadata"]["name"])

    async def _through_proxy(self, path: str, token: str) -> dict[str, Any]:
        where = self._operator
        service = f"/api/v1/namespaces/{where.namespace}/services/https:{where.service}:{SESSION_PORT}/proxy"
        trouble: KubeError | None = None
        for _ in range(_TRIES):
            try:
                return await self._cluster.api.request(
                    "GET", service + path, headers={FLEET_TOKEN_HEADER: token}, timeout=_SECONDS
                )
            except UnavailableError as error:
                trouble = error
                if "ask the leader" not in str(error):
                    break
            except NotFoundError as error:
                raise NoViewError(_not_found(error, where)) from error
            except ForbiddenError as error:
                raise NoViewError(_forbidden(error, where)) from error
            except KubeError as error:
                raise NoViewError(str(error)) from error
        raise NoViewError(f"the operator in {where.namespace} does not answer: {trouble}")

    async def _dial(self, path: str, token: str) -> dict[str, Any]:
        import aiohttp  # most never dial

        url = self._operator.url.rstrip("/")
        secure = urlparse(url).scheme == "https"
        if not secure and not is_loopback(urlparse(url).hostname or ""):
            raise NoViewError(f"{url} would send a token in the clear: give an https address")
        tls = ssl.create_default_context(cadata=self._operator.ca or None) if secure else False
        # The certificate is for the operator's Service, by whatever address it is dialled.
        name = (
            f"{self._operator.service}.{self._operator.namespace}.svc"
            if secure and self._operator.ca
            else None
        )
        headers = {"Authorization": f"Bearer {token}"}
        try:
            async with (
                aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=_SECONDS)) as http,
                http.get(url + path, headers=headers, ssl=tls, server_hostname=name) as answer,
            ):
                text = await answer.text()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise NoViewError(
                f"the operator at {url} does not answer: {str(error) or type(error).__name__}"
            ) from error
        try:
            document = json.loads(text)
        except ValueError:
            raise NoViewError(f"{url} is no operator: {text[:80]!r}") from None
        if answer.status != 200:
            raise NoViewError(
                f"the operator at {url} says {answer.status}: {document.get('error', text[:200])}"
            )
        return dict(document)


def _not_found(error: KubeError, where: Operator) -> str:
    if FLEET_PATH in str(error) and "WeightSync" in str(error):
        return f"the operator has decided nothing for it yet: {error}"
    return (
        f"there is no Service {where.service} in {where.namespace} ({error}): is the operator installed there? "
        "Name it with --operator NAMESPACE/SERVICE, or an address with --operator-url"
    )


def _forbidden(error: KubeError, where: Operator) -> str:
    return (
        f"{error}. The way to the operator leads through its Service: ask for get on services/proxy, resourceNames "
        f"[https:{where.service}:{SESSION_PORT}], in {where.namespace} (the chart's liveView.readers gives it)"
    )
