"""The machine that holds the control plane and the cluster's DNS."""

import sys
from dataclasses import replace
from pathlib import Path

from weightsync_cluster.addresses import (
    API_PORT,
    API_SERVICE_ADDRESS,
    API_URL,
    CONTROL,
    CONTROL_ADDRESS,
    DOMAIN,
    POD_NETWORK,
    SERVICE_NETWORK,
)
from weightsync_cluster.machine import Spec, Unit
from weightsync_cluster.pki import Authority, key_text, new_key, write_kubeconfig
from weightsync_demo.kube.build import Binaries
from weightsync_demo.kube.credentials import write_private
from weightsync_demo.kube.flags import ETCD_DIRECTORY, ETCD_URL

HERE = Path(__file__).parent
ETCD = {"EMBED_ETCD_DIR": ETCD_DIRECTORY, "EMBED_ETCD_URL": ETCD_URL}
ADMINISTRATORS = "system:masters"
# How long the API server has not heard of a node when its pods stop being Ready. Kubernetes' own 50 s is for
# networks and clocks that are worse than those of one machine.
NODE_GRACE_S = 15

COREFILE = f"""\
.:53 {{
    bind {CONTROL_ADDRESS}
    errors
    kubernetes {DOMAIN} in-addr.arpa {{
        kubeconfig dns.kubeconfig
        ttl 2
    }}
}}
"""


def write_credentials(directory: Path, authority: Authority) -> None:
    """Write what the control plane's programs show, and what they check others by, into `directory`."""
    authority.own.write(directory / "ca")
    names = ("kubernetes", "kubernetes.default", "kubernetes.default.svc", f"kubernetes.default.svc.{DOMAIN}")
    serves = ("127.0.0.1", CONTROL_ADDRESS, API_SERVICE_ADDRESS, "localhost", *names)
    authority.issue("kube-apiserver", serves=serves).write(directory / "apiserver")
    to_kubelets = authority.issue("kube-apiserver-kubelet-client", groups=[ADMINISTRATORS])
    to_kubelets.write(directory / "kubelet-client")
    write_private(directory / "accounts.key", key_text(new_key()))
    for program, user, groups in (
        ("controllers", "system:kube-controller-manager", ()),
        ("scheduler", "system:kube-scheduler", ()),
        ("dns", "dns", (ADMINISTRATORS,)),
    ):
        leaf = authority.issue(user, groups=groups)
        write_kubeconfig(directory / f"{program}.kubeconfig", API_URL, authority, leaf, program)
    (directory / "Corefile").write_text(COREFILE)


def spec(
    directory: Path, log_directory: Path, binaries: Binaries, environment: dict[str, str], listener: int
) -> Spec:
    """What runs there, with its credentials and data in `directory`.

    `listener` is the descriptor of a socket outside of the machine, from where the API server is reached.
    """

    def unit(name: str, *command: str, after: tuple[str, ...] = (f"{API_URL}/readyz",), **more: str) -> Unit:
        log = str(log_directory / f"{name}.log")
        return Unit(name, command, str(directory), {**environment, **more}, log, after)

    def program(name: str) -> str:
        return str(binaries.program(name))

    forward = [sys.executable, "-IS", str(HERE / "forward.py"), str(listener), CONTROL_ADDRESS, str(API_PORT)]
    return Spec(
        setup=[["hostname", CONTROL], ["mount", "-t", "tmpfs", "tmpfs", "/run"]],
        units=[
            unit("apiserver", program("kube-apiserver"), *_apiserver_flags(), after=(), **ETCD),
            replace(unit("forward", *forward, after=()), descriptors=[listener]),
            unit("controllers", program("kube-controller-manager"), *_controller_flags()),
            unit("scheduler", program("kube-scheduler"), *_internal("scheduler")),
            unit("dns", program("coredns"), "-conf", "Corefile"),
        ],
    )


def _apiserver_flags() -> list[str]:
    return [
        f"--etcd-servers={ETCD_URL}",
        f"--bind-address={CONTROL_ADDRESS}",
        f"--secure-port={API_PORT}",
        f"--advertise-address={CONTROL_ADDRESS}",
        f"--service-cluster-ip-range={SERVICE_NETWORK}",
        "--tls-cert-file=apiserver.crt",
        "--tls-private-key-file=apiserver.key",
        "--client-ca-file=ca.crt",
        f"--service-account-issuer=https://kubernetes.default.svc.{DOMAIN}",
        "--service-account-key-file=accounts.key",
        "--service-account-signing-key-file=accounts.key",
        "--authorization-mode=Node,RBAC",
        "--enable-admission-plugins=NodeRestriction",
        "--allow-privileged=true",
        "--kubelet-client-certificate=kubelet-client.crt",
        "--kubelet-client-key=kubelet-client.key",
        "--kubelet-certificate-authority=ca.crt",
        "--kubelet-preferred-address-types=InternalIP",
        "--profiling=false",
    ]


def _internal(name: str) -> list[str]:
    """Flags of a program that nobody but the API server knows of."""
    files = ("kubeconfig", "authentication-kubeconfig", "authorization-kubeconfig")
    return [
        *(f"--{flag}={name}.kubeconfig" for flag in files),
        "--bind-address=127.0.0.1",
        "--leader-elect=false",
        "--kube-api-qps=200",
        "--kube-api-burst=400",
        "--profiling=false",
    ]


def _controller_flags() -> list[str]:
    return [
        *_internal("controllers"),
        "--controllers=*",
        "--use-service-account-credentials=true",
        "--service-account-private-key-file=accounts.key",
        "--root-ca-file=ca.crt",
        "--cluster-signing-cert-file=ca.crt",
        "--cluster-signing-key-file=ca.key",
        "--allocate-node-cidrs=false",
        f"--cluster-cidr={POD_NETWORK}",
        f"--node-monitor-grace-period={NODE_GRACE_S}s",
        "--node-monitor-period=1s",
    ]
