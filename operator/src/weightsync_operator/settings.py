"""What the command line says, checked."""

import argparse
import ipaddress
import os
import re
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from weightsync_contract import logs
from weightsync_contract.names import HEALTH_PORT, METRICS_PORT, SESSION_PORT
from weightsync_operator.lease import LeaseTimes
from weightsync_operator.pki.times import PkiTimes

_DESCRIPTION: Final = """\
Keep fleets of inference pods on their trainers' newest weights.

Watches WeightSyncs and the pods that carry the label weightsync.dev/role, and speaks to the agents in those
pods over the session port. Any number of replicas may run; one of them leads, by the Lease
weightsync-operator.
"""

_EPILOG: Final = """\
examples:
  on your machine, for the cluster that kubectl talks to:
      weightsync-operator --namespace default
  in a pod, for the whole cluster, with an authority of its own:
      weightsync-operator --session-service weightsync-operator --log-format json
  the same with a certificate that somebody else keeps, as cert-manager does:
      weightsync-operator --session-cert /tls/tls.crt --session-key /tls/tls.key --log-format json
"""

_LABEL: Final = "[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?"
_SERVICE: Final = re.compile(rf"{_LABEL}(\.{_LABEL}(\.svc)?)?")


@dataclass(frozen=True, slots=True)
class Settings:
    """How to run the operator. Empty: ``namespace`` means all, ``lease_namespace`` the connection's own."""

    kubeconfig: str = ""
    context: str = ""
    namespace: str = ""
    session_host: str = "127.0.0.1"
    session_port: int = SESSION_PORT
    session_cert: str = ""
    session_key: str = ""
    session_service: str = ""
    pki: PkiTimes = field(default_factory=PkiTimes)
    advertise_host: str = ""
    health_port: int = HEALTH_PORT
    metrics_port: int = METRICS_PORT
    ports_file: str = ""
    identity: str = ""
    lease_namespace: str = ""
    lease: LeaseTimes = field(default_factory=LeaseTimes)
    log_format: str = "text"

    @property
    def advertised_host(self) -> str:
        """Where other machines find the session server of this replica."""
        return self.advertise_host or self.session_host

    @property
    def session_addresses(self) -> tuple[str, ...]:
        """IP addresses that the replica is dialled at."""
        try:
            address = ipaddress.ip_address(self.advertised_host)
        except ValueError:
            return ()
        return () if address.is_unspecified else (str(address),)


def parse(arguments: Sequence[str] | None = None, environ: Mapping[str, str] = os.environ) -> Settings:
    """Read the command line. Exits, as argparse does, with a sentence for what can't be."""
    parser = _parser()
    given = parser.parse_args(arguments)
    if bool(given.session_cert) != bool(given.session_key):
        parser.error("--session-cert and --session-key go together: give both or none")
    if given.session_cert and given.session_service:
        parser.error("--session-service makes certificates, --session-cert reads one: give one of the two")
    encrypted = bool(given.session_cert or given.session_service)
    host = given.session_host or ("0.0.0.0" if encrypted else "127.0.0.1")  # noqa: S104
    if not encrypted and not is_loopback(host):
        parser.error(
            f"--session-host {host} without a certificate would send tokens in the clear: give "
            "--session-service, or --session-cert and --session-key, or leave --session-host out"
        )
    try:
        lease = LeaseTimes(given.lease_duration, given.lease_renew, given.lease_retry)
        pki = PkiTimes(given.ca_lifetime, given.certificate_lifetime, given.ca_grace, given.ca_check)
    except ValueError as error:
        parser.error(str(error))
    return Settings(
        kubeconfig=given.kubeconfig,
        context=given.context,
        namespace=given.namespace,
        session_host=host,
        session_port=given.session_port,
        session_cert=given.session_cert,
        session_key=given.session_key,
        session_service=given.session_service,
        pki=pki,
        advertise_host=given.advertise_host or environ.get("POD_IP", ""),
        health_port=given.health_port,
        metrics_port=given.metrics_port,
        ports_file=given.ports_file,
        identity=given.identity or environ.get("POD_NAME", "") or socket.gethostname(),
        lease_namespace=given.lease_namespace or environ.get("POD_NAMESPACE", ""),
        lease=lease,
        log_format=given.log_format,
    )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches ``host``."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "weightsync-operator",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    cluster = parser.add_argument_group("the cluster")
    cluster.add_argument(
        "--kubeconfig",
        default="",
        metavar="FILE",
        help="how to reach the API server; else KUBECONFIG, ~/.kube/config, the pod's ServiceAccount",
    )
    cluster.add_argument("--context", default="", help="context of the kubeconfig; else its current one")
    scope = cluster.add_mutually_exclusive_group()
    scope.add_argument("--namespace", default="", help="look after this namespace only")
    scope.add_argument("--all-namespaces", action="store_true", help="look after all of them (the default)")

    session = parser.add_argument_group("the session, where agents dial in and the fleet can be read")
    session.add_argument(
        "--session-host",
        default="",
        metavar="HOST",
        help="listen here; else everywhere with a certificate, on loopback without",
    )
    session.add_argument(
        "--session-port", type=_port, default=SESSION_PORT, metavar="PORT", help=_port_help(SESSION_PORT)
    )
    session.add_argument(
        "--session-service",
        type=_service,
        default="",
        metavar="NAME",
        help="keep an authority of its own (Secret weightsync-ca; its certificates in a ConfigMap of the same "
        "name wherever there is a WeightSync) and serve wss:// as this Service of its namespace",
    )
    session.add_argument(
        "--session-cert",
        default="",
        metavar="FILE",
        help="certificate chain (PEM) for wss://, read again when it changes",
    )
    session.add_argument(
        "--session-key", default="", metavar="FILE", help="its private key (PEM), not encrypted"
    )
    session.add_argument(
        "--advertise-host",
        default="",
        metavar="HOST",
        help="where followers send agents to when this replica leads; else POD_IP, else --session-host",
    )

    defaults = PkiTimes()
    authority = parser.add_argument_group("the operator's own authority (--session-service); seconds")
    authority.add_argument(
        "--ca-lifetime",
        type=float,
        default=defaults.authority,
        metavar="S",
        help="of an authority; the next one is made at two thirds; a year",
    )
    authority.add_argument(
        "--certificate-lifetime",
        type=float,
        default=defaults.certificate,
        metavar="S",
        help="of a serving certificate, renewed at half; a day",
    )
    authority.add_argument(
        "--ca-grace",
        type=float,
        default=defaults.grace,
        metavar="S",
        help="what kubelets are given to bring a changed ConfigMap into pods before a new authority signs; 600",
    )
    authority.add_argument(
        "--ca-check", type=float, default=defaults.check, metavar="S", help="between two looks at it all; 30"
    )

    replica = parser.add_argument_group("this replica")
    replica.add_argument(
        "--health-port", type=_port, default=HEALTH_PORT, metavar="PORT", help=_port_help(HEALTH_PORT)
    )
    replica.add_argument(
        "--metrics-port", type=_port, default=METRICS_PORT, metavar="PORT", help=_port_help(METRICS_PORT)
    )
    replica.add_argument(
        "--ports-file",
        default="",
        metavar="FILE",
        help='write the ports that were taken to this file, as JSON {"session": ..., "health": ..., "metrics": ...}',
    )
    replica.add_argument(
        "--identity",
        default="",
        help="name in the Lease; else POD_NAME, else the host's. Made unique by itself",
    )
    replica.add_argument("--log-format", choices=logs.FORMATS, default="text", help="default: text")

    lease = parser.add_argument_group("the Lease; seconds")
    lease.add_argument(
        "--lease-namespace",
        default="",
        metavar="NS",
        help="the operator's own, with the Secret weightsync-ca, too; else POD_NAMESPACE, else the context's",
    )
    lease.add_argument(
        "--lease-duration",
        type=float,
        default=15.0,
        metavar="S",
        help="a silent leader is replaced after this; 15",
    )
    lease.add_argument(
        "--lease-renew", type=float, default=10.0, metavar="S", help="it ends by itself after this; 10"
    )
    lease.add_argument("--lease-retry", type=float, default=2.0, metavar="S", help="between two tries; 2")
    return parser


def _service(text: str) -> str:
    if text and not _SERVICE.fullmatch(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no Service: give NAME or NAME.NAMESPACE.svc")
    return text


def _port(text: str) -> int:
    value = int(text)
    if not 0 <= value <= 65535:
        raise argparse.ArgumentTypeError(f"{value} is no port: give 1 to 65535, or 0 for a free one")
    return value


def _port_help(default: int) -> str:
    return f"default: {default}; 0 takes a free one"
