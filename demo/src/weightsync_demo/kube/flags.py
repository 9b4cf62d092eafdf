"""How kube-apiserver is told to run."""

ETCD_DIRECTORY = "etcd"
# A socket in the server's directory, which is its working directory: etcd asks for no credentials, so a
# port would let every user of the machine past RBAC. Relative, since a socket's path is limited to some 100
# bytes.
ETCD_URL = "unix://etcd.sock"


def apiserver_flags(host: str, port: int) -> list[str]:
    """Flags for an API server on `host` and `port` that keeps everything in its working directory."""
    return [
        f"--etcd-servers={ETCD_URL}",
        f"--bind-address={host}",
        # By default the address of the interface with the default route: a machine may have none.
        f"--advertise-address={host}",
        # The endpoints of the Service `kubernetes` would be that address, which no pod can reach.
        "--endpoint-reconciler-type=none",
        f"--secure-port={port}",
        "--service-cluster-ip-range=10.96.0.0/16",
        "--cert-dir=certs",
        "--token-auth-file=tokens.csv",
        "--authorization-mode=RBAC",
        "--service-account-issuer=https://kubernetes.default.svc",
        # The server makes this key at its first start; the standard library can't make another.
        "--service-account-key-file=certs/apiserver.key",
        "--service-account-signing-key-file=certs/apiserver.key",
        # It refuses every pod in a namespace without the ServiceAccount `default`, which the
        # controller-manager makes, and none runs here.
        "--disable-admission-plugins=ServiceAccount",
        "--profiling=false",
    ]
