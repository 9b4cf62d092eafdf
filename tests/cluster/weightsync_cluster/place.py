"""What a cluster has on this machine: a folder, processes, control groups; and how all of it goes away."""

import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from weightsync_cluster import cgroups
from weightsync_cluster.errors import ClusterError
from weightsync_cluster.machine import Machine
from weightsync_demo.kube.build import cache_directory
from weightsync_demo.kube.locking import exclusive

NEEDED = ("ip", "mount", "nsenter", "unshare")
# Folders that are a node's own, whatever the machine has there. The rest of /var is the machine's: a checkout
# may be there.
SHADOWED = ("/var/lib", "/var/log")
LOCK_TIMEOUT_S = 300.0

Progress = Callable[[str], None]


class Place:
    """The place of the cluster `name`, whether there is one or not."""

    def __init__(self, name: str) -> None:
        if not re.fullmatch(r"[a-z0-9-]{1,20}", name):
            raise ClusterError(f"a cluster's name has letters, digits and hyphens, at most 20: not {name!r}")
        self.name = name
        self.directory = cache_directory() / "clusters" / name
        self._machines: dict[str, Machine] = {}

    def machine(self, name: str) -> Machine:
        """The machine `name` of this cluster; it need not run."""
        return self._machines.setdefault(name, Machine(name, self.directory / name))

    def group(self, node: str) -> str:
        """The name of the control group that a node's pods are in; `*` for the pattern of all of them."""
        return f"weightsync.{self.name}.{node}"

    @contextmanager
    def alone(self, progress: Progress) -> Iterator[None]:
        """No other process brings this cluster up or down within the block.

        Raises ClusterError where this machine can't hold a cluster, TimeoutError where another process takes
        too long.
        """
        self._check_machine()
        self.directory.parent.mkdir(parents=True, exist_ok=True)
        lock = self.directory.with_suffix(".lock")
        with exclusive(lock, LOCK_TIMEOUT_S, lambda: progress(f"another process holds {lock}: waiting")):
            yield

    def clear(self, *, keep_files: bool = False) -> None:
        """End every machine and remove all that the cluster has; only within `alone`."""
        for path in self.directory.glob("*/process.json"):
            self.machine(path.parent.name)
        for machine in self._machines.values():
            machine.kill()
        cgroups.remove(self.group("*"))
        if self.directory.exists() and not keep_files:
            self._check_unmounted()
            shutil.rmtree(self.directory)

    def _check_unmounted(self) -> None:
        # What is mounted below the folder may be a folder of somebody else, and would be emptied with it.
        mounts = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
        below = [mount for mount in mounts if mount.startswith(f"{self.directory}/")]
        if below:
            raise ClusterError(f"unmount {', '.join(below)}, then take the cluster down again")

    def _check_machine(self) -> None:
        if sys.platform != "linux" or os.geteuid() != 0:
            raise ClusterError("a cluster needs Linux and root, for namespaces and control groups")
        missing = [program for program in NEEDED if shutil.which(program) is None]
        if missing:
            raise ClusterError(f"{', '.join(missing)} not found: install iproute2 and util-linux")
        if any(self.directory.resolve().is_relative_to(folder) for folder in SHADOWED):
            raise ClusterError(
                f"{self.directory} can't hold a node's disk, since a node has a {' and a '.join(SHADOWED)} of "
                "its own: set XDG_CACHE_HOME to another folder"
            )
