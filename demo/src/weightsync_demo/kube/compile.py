"""Running `go build` with its progress told, and its failures explained."""

import os
import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from weightsync_demo.kube.errors import BuildError
from weightsync_demo.kube.source import Source

Progress = Callable[[str], None]

# Some minutes on two cores; a machine that needs longer than this is stuck.
DEADLINE_S = 3600.0
PROGRESS_EVERY_S = 5.0

# (what the Go command says, what to do about it), the first that fits.
_ADVICE = (
    (r"no space left on device", "the disk is full: the build needs about 4 GB for a while"),
    (r"signal: killed|cannot allocate memory", "out of memory: linking needs about 2 GB"),
    (
        r"dial tcp|no such host|i/o timeout|TLS handshake|connection refused|proxyconnect|unexpected EOF",
        "the Go module proxy can't be reached: go online, or set GOPROXY to one that can",
    ),
    (
        r"x509:",
        "the Go module proxy's certificate isn't trusted: point SSL_CERT_FILE at the machine's authorities",
    ),
    (
        r"missing go\.sum entry|updates to go\.mod needed|checksum mismatch",
        "go.mod and go.sum disagree: run update.sh beside them",
    ),
)


def explain(output: str) -> str:
    """What to do about a failed Go command that wrote `output`, with the end of that output."""
    tail = "\n".join(output.strip().splitlines()[-15:])
    for pattern, advice in _ADVICE:
        if re.search(pattern, output):
            return f"{advice}\n{tail}"
    return tail


def version_flags(kubernetes: str) -> str:
    """Linker flags that make every program name itself `kubernetes` (v1.36.3): unset, each says v0.0.0."""
    major, minor = kubernetes.removeprefix("v").split(".")[:2]
    flags = ["-s", "-w", "-X k8s.io/component-base/version.gitTreeState=clean"]
    for package in ("k8s.io/component-base/version", "k8s.io/client-go/pkg/version"):
        values = {"gitVersion": kubernetes, "gitMajor": major, "gitMinor": minor}
        flags += [f"-X {package}.{name}={value}" for name, value in values.items()]
    return " ".join(flags)


def compile_hyper(
    go: Path, source: Source, workspace: Path, output: Path, progress: Progress, lock: int
) -> None:
    """Compile the module in `source` into the file `output`.

    Modules and compiled packages stay in `workspace`, so that a build that was cut short goes on where it
    was. `lock` is a descriptor that the compiler inherits: should this process be killed, the lock that it
    belongs to is held until the compiler has ended too. Raises BuildError.
    """
    env = _environment(os.environ, workspace)
    progress("downloading the sources of Kubernetes and etcd (some 200 modules)")
    packages = _lines([str(go), "list", "-deps", "./hyper"], source, env, lock)
    total = sum(_is_package(line) for line in packages)
    flags = version_flags(source.kubernetes)
    command = [str(go), "build", "-v", "-trimpath", "-ldflags", flags, "-o", str(output), "./hyper"]
    started = told = time.monotonic()
    compiled = 0
    progress(f"compiling Kubernetes {source.kubernetes}: {total:,} packages, some minutes, only once")
    for line in _lines(command, source, env, lock):
        compiled += _is_package(line)
        if time.monotonic() - told >= PROGRESS_EVERY_S:
            told = time.monotonic()
            progress(f"compiling {compiled:,} of {total:,} packages ({told - started:.0f} s)")
    progress(f"compiled and linked in {time.monotonic() - started:.0f} s")


def _is_package(line: str) -> bool:
    """Whether `line` names a package, rather than a module that is downloaded or a compiler's message."""
    return bool(line) and not line.startswith(("#", "go: ")) and " " not in line


def _environment(inherited: Mapping[str, str], workspace: Path) -> dict[str, str]:
    # GOROOT of another toolchain, and another target, would make a binary that its key doesn't name.
    env = {
        name: value
        for name, value in inherited.items()
        if name not in ("GOROOT", "GOOS", "GOARCH", "GOEXPERIMENT")
    }
    return env | {
        "CGO_ENABLED": "0",
        "GOCACHE": str(workspace / "cache"),
        # -modcacherw: without it modules are read-only and can't be removed as other folders are.
        "GOFLAGS": "-mod=readonly -modcacherw -buildvcs=false",
        "GOMODCACHE": str(workspace / "mod"),
        "GOTOOLCHAIN": "local",
        "GOWORK": "off",
    }


def _lines(command: list[str], source: Source, env: Mapping[str, str], lock: int) -> Iterator[str]:
    """The lines that a Go command writes, as they come; BuildError if it fails or outlasts the deadline."""
    process = subprocess.Popen(
        command,
        cwd=source.directory,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        pass_fds=(lock,),
    )
    assert process.stdout is not None
    deadline = threading.Timer(DEADLINE_S, process.kill)
    deadline.start()
    seen: list[str] = []
    try:
        for line in process.stdout:
            seen.append(line)
            yield line.rstrip("\n")
        if process.wait() != 0:
            raise BuildError(f"`{' '.join(command[:2])}` failed: {explain(''.join(seen))}")
    finally:
        deadline.cancel()
        process.kill()
        process.wait()
        process.stdout.close()
