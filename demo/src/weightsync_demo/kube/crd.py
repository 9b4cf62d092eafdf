"""The custom resources in a cluster."""

from pathlib import Path

from weightsync_demo.kube.apiserver import ApiServer
from weightsync_demo.kube.errors import KubeError
from weightsync_demo.kube.source import find_source

FIELD_MANAGER = "weightsync-demo"


def crd_directory() -> Path:
    """The checkout's `crds/`, the one source of the definitions."""
    return find_source().directory.parent.parent / "crds"


def apply_crds(server: ApiServer, directory: Path | None = None, timeout: float = 30.0) -> None:
    """Apply every definition in `directory` (by default the checkout's), and wait until each is served.

    Definitions that are there already are brought up to date. Raises KubeError where the folder has none,
    where the API server refuses one, and where one isn't established after `timeout` seconds.
    """
    directory = directory or crd_directory()
    files = sorted(directory.glob("*.yaml"))
    if not files:
        raise KubeError(f"no definitions of custom resources (*.yaml) in {directory}")
    named = [f"--filename={path}" for path in files]
    server.kubectl("apply", "--server-side", "--force-conflicts", f"--field-manager={FIELD_MANAGER}", *named)
    # Not --for=condition: that fails at once as long as a definition that was just made has no status.
    established = '{.status.conditions[?(@.type=="Established")].status}=True'
    server.kubectl(
        "wait", f"--for=jsonpath={established}", f"--timeout={timeout:g}s", *named, timeout=timeout + 30
    )
