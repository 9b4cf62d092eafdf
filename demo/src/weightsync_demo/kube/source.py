"""What the binary is built from, and the key under which a finished one is kept."""

import hashlib
import platform
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from weightsync_demo.kube.errors import BuildError

# A change of how the binary is built (flags, what it is linked with) is a change of the binary.
RECIPE = "1"

Version = tuple[int, ...]


def parse_version(text: str) -> Version:
    """The numbers of `go1.26.6`, `1.26`, `go version go1.27rc1 linux/amd64`; a pre-release counts as its
    release.

    Raises ValueError where there is no version in `text`.
    """
    found = re.search(r"\d+(?:\.\d+)+", text)
    if not found:
        raise ValueError(f"no version in {text!r}")
    return tuple(int(part) for part in found[0].split("."))


@dataclass(frozen=True)
class Source:
    """The Go module in `directory`: go.mod, go.sum and hyper/main.go."""

    directory: Path

    @property
    def inputs(self) -> tuple[Path, ...]:
        """Every file that the binary depends on; all other code is pinned by go.sum."""
        return tuple(self.directory / name for name in ("go.mod", "go.sum", "hyper/main.go"))

    @property
    def go_needed(self) -> Version:
        """The oldest Go that can build the module."""
        return parse_version(self._in_go_mod(r"^go (\S+)$"))

    @property
    def kubernetes(self) -> str:
        """Kubernetes' version as it names itself: v1.36.3."""
        return self._in_go_mod(r"^(?:require|\s)\s*k8s\.io/kubernetes (v\S+)")

    def key(self, go_version: str) -> str:
        """A short name for the binary that this Go makes of these files on this platform."""
        digest = hashlib.sha256()
        for part in (RECIPE, go_version, sys.platform, platform.machine()):
            digest.update(part.encode() + b"\0")
        for path in self.inputs:
            # Each file's own digest: a byte moved from one file's end to the next one's start changes the
            # key.
            digest.update(hashlib.sha256(path.read_bytes()).digest())
        return digest.hexdigest()[:16]

    def _in_go_mod(self, pattern: str) -> str:
        path = self.directory / "go.mod"
        found = re.search(pattern, path.read_text(), re.MULTILINE)
        if not found:
            raise BuildError(f"{path} has no line like {pattern}")
        return found[1]


def find_source() -> Source:
    """The module in the checkout that this package is imported from.

    Raises BuildError outside a checkout: the package alone doesn't hold the module.
    """
    for parent in Path(__file__).resolve().parents:
        source = Source(parent / "tests" / "cluster")
        if all(path.is_file() for path in source.inputs):
            return source
    raise BuildError(
        "tests/cluster/go.mod, which pins Kubernetes, is in none of the folders above this package: "
        "install weightsync-demo from a checkout (pip install -e demo)"
    )
