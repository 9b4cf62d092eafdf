"""How to reach the API server, found as kubectl finds it."""

import ipaddress
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlparse

from kubernetes import client, config

from weightsync_operator.kube.errors import ConfigurationError

if TYPE_CHECKING:
    import kopf

_DEFAULT_KUBECONFIG: Final = "~/.kube/config"
_POD_NAMESPACE_FILE: Final = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
_CONNECTIONS: Final = 32


class Connection:
    """The official client's configuration, and the namespace that goes with it.

    ``kubeconfig`` and ``context`` are what the command line says. Without them: KUBECONFIG, ~/.kube/config,
    the pod's ServiceAccount. Raises ConfigurationError saying what was tried.
    """

    def __init__(
        self, kubeconfig: str = "", context: str = "", environ: Mapping[str, str] = os.environ
    ) -> None:
        self.configuration = client.Configuration()
        path = kubeconfig or environ.get("KUBECONFIG", "")
        if not path and Path(_DEFAULT_KUBECONFIG).expanduser().exists():
            path = _DEFAULT_KUBECONFIG
        try:
            if path:
                self.namespace = _load_kubeconfig(path, context, self.configuration)
            else:
                config.load_incluster_config(client_configuration=self.configuration)
                self.namespace = _POD_NAMESPACE_FILE.read_text().strip()
        except (config.ConfigException, OSError) as error:
            where = path or "KUBECONFIG, ~/.kube/config and the pod's ServiceAccount"
            raise ConfigurationError(
                f"no API server to talk to by {where}: {error}. Give --kubeconfig and, if need be, --context"
            ) from error
        # A retry inside the client would outlive the caller's deadline, and a write may only be tried again
        # by somebody who has read again.
        self.configuration.retries = False
        self.configuration.connection_pool_maxsize = _CONNECTIONS
        if _is_loopback(self.configuration.host):
            self.configuration.proxy = None

    def client(self) -> Any:
        """An ApiClient; it belongs to the caller."""
        return client.ApiClient(self.configuration)

    def for_kopf(self) -> "kopf.ConnectionInfo":
        """The same way for kopf, with a token that is fresh now."""
        # The command line has no use for it, and would wait half a second for it.
        import kopf

        settings = self.configuration
        header = settings.get_api_key_with_prefix("BearerToken", alias="authorization")
        return kopf.ConnectionInfo(
            server=settings.host,
            ca_path=settings.ssl_ca_cert,
            ca_data=settings.ca_cert_data if not settings.ssl_ca_cert else None,
            insecure=not settings.verify_ssl,
            token=header.split()[-1] if header else None,
            certificate_path=settings.cert_file,
            private_key_path=settings.key_file,
            proxy_url=settings.proxy,
        )


def _load_kubeconfig(path: str, context: str, configuration: Any) -> str:
    config.load_kube_config(
        config_file=path,
        context=context or None,
        client_configuration=configuration,
        persist_config=False,
    )
    contexts, active = config.list_kube_config_contexts(config_file=path)
    chosen = next((each for each in contexts if each["name"] == context), active)
    namespace: str = chosen["context"].get("namespace") or "default"
    return namespace


def _is_loopback(url: str) -> bool:
    host = urlparse(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
