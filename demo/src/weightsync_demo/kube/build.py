"""The one binary that holds all programs of Kubernetes and its DNS: found in the cache, else built."""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from weightsync_demo.kube import toolchain
from weightsync_demo.kube.compile import compile_hyper
from weightsync_demo.kube.errors import BuildError
from weightsync_demo.kube.locking import exclusive
from weightsync_demo.kube.source import Source, find_source

PROGRAMS = (
    "coredns",
    "etcd",
    "kube-apiserver",
    "kube-controller-manager",
    "kube-proxy",
    "kube-scheduler",
    "kubectl",
    "kubelet",
    "kwok",
)
# Modules, compiled packages, a toolchain and the binary, with a margin.
DISK_NEEDED_BYTES = 4 * 1024**3
# How long to wait for another process that is building.
LOCK_TIMEOUT_S = 3600.0


@dataclass(frozen=True)
class Binaries:
    """Paths of the programs: links to `hyper`, which looks at the name that it is called by."""

    hyper: Path

    @property
    def kube_apiserver(self) -> Path:
        return self.program("kube-apiserver")

    @property
    def kubectl(self) -> Path:
        return self.program("kubectl")

    def program(self, name: str) -> Path:
        """The path of one of PROGRAMS."""
        return self.hyper.parent / name


def cache_directory() -> Path:
    """Where finished binaries are kept, each in a folder named by its key."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "weightsync"


def find_binaries(source: Source | None = None) -> Binaries | None:
    """The finished binaries for this checkout and machine; None where they have yet to be built."""
    source = source or find_source()
    go = toolchain.choose(toolchain.find_on_path(), source.go_needed)
    return _finished(cache_directory() / source.key(go.version))


def ensure_binaries(progress: Callable[[str], None], source: Source | None = None) -> Binaries:
    """The binaries, built first where need be: some minutes on two cores, once for each version and machine.

    `progress` is given lines that say what is going on. Processes that call this at the same time build once.
    Raises BuildError, saying what to do; TimeoutError if another process holds the build for over an hour.
    """
    source = source or find_source()
    go = toolchain.choose(toolchain.find_on_path(), source.go_needed)
    cache = cache_directory()
    target = cache / source.key(go.version)
    if finished := _finished(target):
        return finished
    cache.mkdir(parents=True, exist_ok=True)

    def waiting() -> None:
        progress("another process is building Kubernetes: waiting for it")

    with exclusive(cache / "build.lock", LOCK_TIMEOUT_S, waiting) as lock:
        if finished := _finished(target):
            return finished
        workspace = cache / "build"
        _check_disk(cache, workspace)
        if go.executable is None:
            go = toolchain.install(workspace / "go", progress)
        assert go.executable is not None
        new = workspace / "new"
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        compile_hyper(go.executable, source, workspace, new / "hyper", progress, lock)
        for program in PROGRAMS:
            (new / program).symlink_to("hyper")
        # What is there is no finished binary, and a folder can only take the place of an empty one.
        shutil.rmtree(target, ignore_errors=True)
        # A reader finds either nothing or all of it.
        new.rename(target)
        # Only the binary (150 MB) is kept. Sources and compiled packages are 2.5 GB, and of no use until
        # Kubernetes or Go is another version, when nearly all of them are too.
        shutil.rmtree(workspace, ignore_errors=True)
        return Binaries(target / "hyper")


def _finished(target: Path) -> Binaries | None:
    binaries = Binaries(target / "hyper")
    usable = all(os.access(binaries.program(name), os.X_OK) for name in PROGRAMS)
    return binaries if usable else None


def _check_disk(cache: Path, workspace: Path) -> None:
    # What an interrupted build left behind has taken its part of the space already.
    if workspace.exists():
        return
    free = shutil.disk_usage(cache).free
    if free < DISK_NEEDED_BYTES:
        raise BuildError(
            f"building Kubernetes needs {DISK_NEEDED_BYTES / 1e9:.1f} GB for some minutes and {cache} has "
            f"{free / 1e9:.1f} GB free: make room, or set XDG_CACHE_HOME to a folder on another disk"
        )
