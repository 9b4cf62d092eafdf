"""What a node needs besides Kubernetes: containerd, runc and so on, as files in the cache.

They are Debian's packages, unpacked; nothing is installed on the machine.
"""

import hashlib
import platform
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from weightsync_cluster import images
from weightsync_cluster.errors import ClusterError
from weightsync_cluster.shell import run
from weightsync_demo.kube.build import cache_directory
from weightsync_demo.kube.locking import exclusive

PACKAGES = (
    "busybox-static",
    "catatonit",
    "containerd",
    "containernetworking-plugins",
    "nftables",
    "runc",
    # What those are linked with and a bare machine may not have.
    "libbsd0",
    "libedit2",
    "libgmp10",
    "libjansson4",
    "libmd0",
    "libmnl0",
    "libnftables1",
    "libnftnl11",
    "libseccomp2",
    "libxtables12",
)
# A change of what is made of the packages.
RECIPE = "2"
NEEDED = ("apt-get", "dpkg")
LOCK_TIMEOUT_S = 900.0
DOWNLOAD_TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Tools:
    """The unpacked packages below `root`, and images made of them."""

    root: Path

    @property
    def path(self) -> str:
        """For PATH."""
        return ":".join(str(self.root / folder) for folder in ("usr/bin", "usr/sbin", "bin", "sbin"))

    @property
    def libraries(self) -> str:
        """For LD_LIBRARY_PATH."""
        found = [*self.root.glob("usr/lib/*-linux-gnu"), *self.root.glob("lib/*-linux-gnu")]
        return ":".join(str(folder) for folder in found)

    @property
    def network_plugins(self) -> Path:
        return self.root / "usr/lib/cni"

    @property
    def pause(self) -> Path:
        """The image of the process that holds a pod's namespaces."""
        return self.root / "images" / "pause.tar"

    @property
    def busybox(self) -> Path:
        """The image that tests make small pods of."""
        return self.root / "images" / "busybox.tar"


def ensure_tools(progress: Callable[[str], None]) -> Tools:
    """The tools, downloaded first where need be (40 MB).

    Raises ClusterError where they can't be had, saying what to do.
    """
    cache = cache_directory()
    target = cache / f"node-{_key()}"
    if target.exists():
        return Tools(target)
    missing = [program for program in NEEDED if shutil.which(program) is None]
    if missing:
        raise ClusterError(
            f"{' and '.join(missing)} not found: nodes are made of the packages of Debian or Ubuntu, on one of "
            "these; elsewhere name a cluster by --kubeconfig and --context"
        )
    cache.mkdir(parents=True, exist_ok=True)
    with exclusive(cache / "node.lock", LOCK_TIMEOUT_S, lambda: progress("another process is downloading")):
        if not target.exists():
            progress("downloading containerd, runc and network plugins (40 MB), only once")
            workspace = cache / "node-new"
            shutil.rmtree(workspace, ignore_errors=True)
            (workspace / "packages").mkdir(parents=True)
            _download(workspace / "packages", workspace / "lists")
            root = workspace / "root"
            for package in sorted((workspace / "packages").glob("*.deb")):
                run(["dpkg", "-x", package, root])
            images.write(root, root / "images")
            root.rename(target)
            shutil.rmtree(workspace)
    return Tools(target)


def _key() -> str:
    release = platform.freedesktop_os_release()
    parts = (RECIPE, *PACKAGES, release.get("ID", ""), release.get("VERSION_ID", ""), platform.machine())
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _download(directory: Path, lists: Path) -> None:
    # Without it apt drops its rights, and then can't write here.
    options = ["-q", "-o", "APT::Sandbox::User=root"]
    command = ["apt-get", *options, "download", *PACKAGES]
    try:
        run(command, directory=directory, timeout=DOWNLOAD_TIMEOUT_S)
    except ClusterError:
        # The machine has no list of packages, or an old one: fetch one, and not into its own place.
        (lists / "partial").mkdir(parents=True)
        options += ["-o", f"Dir::State::Lists={lists}", "-o", "Dir::Cache::pkgcache="]
        options += ["-o", "Dir::Cache::srcpkgcache="]
        run(["apt-get", *options, "update"], timeout=DOWNLOAD_TIMEOUT_S)
        run(["apt-get", *options, "download", *PACKAGES], directory=directory, timeout=DOWNLOAD_TIMEOUT_S)
