"""buildah and mmdebstrap from the machine's own Debian or Ubuntu packages, unpacked beside it, not installed."""

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from weightsync_demo.kube.build import cache_directory
from weightsync_demo.kube.locking import exclusive

RECIPE = "1"
PROGRAMS = ("buildah", "mmdebstrap")
LIBRARIES = "libraries.cache"
# The libraries of a package, and theirs, are as deep as buildah's go.
DEPTH = 2
LOCK_TIMEOUT_S = 600.0
APT_TIMEOUT_S = 300.0


class ImageError(Exception):
    """An image can't be built here; the message says why and what to do."""


@dataclass(frozen=True)
class Tools:
    """The folder that the packages were unpacked into."""

    root: Path

    @property
    def buildah(self) -> list[str]:
        """Its command line. It sees an index of libraries that has its own among them, and mounts in private:
        an environment variable would not do, for what it starts has none of it.
        """
        mounted = 'mount --bind "$0" /etc/ld.so.cache && exec "$@"'
        return [
            *("unshare", "--mount", "sh", "-c", mounted, str(self.root / LIBRARIES)),
            str(self.root / "usr/bin/buildah"),
        ]

    @property
    def mmdebstrap(self) -> list[str]:
        return ["perl", str(self.root / "usr/bin/mmdebstrap")]


def run(
    command: Sequence[str], what: str, seconds: float, environment: Mapping[str, str] | None = None
) -> str:
    """Its output. Raises ImageError with the last lines where it fails or takes too long."""
    try:
        done = subprocess.run(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=seconds,
            check=False,
        )
    except FileNotFoundError:
        raise ImageError(f"{what} needs {command[0]}, which is not on this machine") from None
    except subprocess.TimeoutExpired:
        raise ImageError(f"{what} took longer than {seconds:.0f} s") from None
    if done.returncode != 0:
        tail = "\n".join(done.stdout.splitlines()[-25:])
        raise ImageError(f"{what} failed:\n{re.sub(r'[a-z+]+://[^ ]+', '<address>', tail)}")
    return done.stdout


def overlays_work(folder: Path) -> bool:
    """Whether the kernel can lay folders of this file system over one another."""
    with tempfile.TemporaryDirectory(dir=folder) as name:
        for part in ("lower", "upper", "work", "merged"):
            (Path(name) / part).mkdir()
        layers = f"lowerdir={name}/lower,upperdir={name}/upper,workdir={name}/work"
        command = ["unshare", "--mount", "mount", "-t", "overlay", "-o", layers, "overlay", f"{name}/merged"]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0


def apt_sources() -> list[Path]:
    """Where this machine takes its packages from."""
    listed = [Path("/etc/apt/sources.list"), *sorted(Path("/etc/apt/sources.list.d").glob("*"))]
    return [path for path in listed if path.suffix in {".list", ".sources"} and path.is_file()]


def ensure_tools() -> Tools:
    """The unpacked programs, downloaded first where need be (7 MB, some seconds). Raises ImageError."""
    if os.geteuid() != 0:
        raise ImageError("building images for the tests needs root: file owners, mounts and chroot")
    missing = [name for name in ("apt-get", "dpkg", "perl") if shutil.which(name) is None]
    if missing:
        raise ImageError(f"no {missing[0]} here: the images of the tests are built on Debian and Ubuntu only")
    cache = cache_directory() / "images"
    tools = Tools(cache / f"tools-{_key()}")
    cache.mkdir(parents=True, exist_ok=True)
    with exclusive(cache / "tools.lock", LOCK_TIMEOUT_S, lambda: None):
        if not tools.root.exists():
            with tempfile.TemporaryDirectory(dir=cache) as scratch:
                _unpack(Path(scratch))
                (Path(scratch) / "root").rename(tools.root)
                try:
                    _index_libraries(tools.root)
                except ImageError:
                    shutil.rmtree(tools.root)
                    raise
    return tools


def _key() -> str:
    digest = hashlib.sha256(RECIPE.encode())
    for path in (Path("/etc/os-release"), *apt_sources()):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _unpack(scratch: Path) -> None:
    root, downloads = scratch / "root", scratch / "downloads"
    root.mkdir()
    downloads.mkdir()
    # A machine whose lists are empty or old gets lists of its own here; its own state stays as it is.
    (scratch / "state/lists/partial").mkdir(parents=True)
    apt = [
        *("-o", f"Dir::State::Lists={scratch}/state/lists", "-o", f"Dir::Cache={scratch}/state"),
        *("-o", "APT::Sandbox::User=root", "-q"),
    ]
    run(["apt-get", *apt, "update"], "apt-get update", APT_TIMEOUT_S)
    names = _closure(apt)
    command = ["sh", "-c", 'cd "$0" && apt-get "$@"', str(downloads), *apt, "download", *names]
    run(command, f"downloading {', '.join(PROGRAMS)}", APT_TIMEOUT_S)
    for package in sorted(downloads.glob("*.deb")):
        run(["dpkg", "-x", str(package), str(root)], f"unpacking {package.name}", APT_TIMEOUT_S)


def _closure(apt: Sequence[str]) -> list[str]:
    """The programs' packages and the libraries that they need, but libc, which the machine has."""
    found, level = set(PROGRAMS), set(PROGRAMS)
    for _ in range(DEPTH):
        command = ["apt-cache", *apt[:-1], "depends", "--no-recommends", "--no-suggests", *sorted(level)]
        text = run(command, "asking apt what they need", APT_TIMEOUT_S)
        needed = set(re.findall(r"(?m)^ *(?:Pre)?Depends: ([a-z0-9.+-]+)", text))
        level = {
            name for name in needed if re.match(r"lib(?!c6|gcc|perl)|golang-github-containers", name)
        } - found
        found |= level
    return sorted(found)


def _index_libraries(root: Path) -> None:
    """What `ldconfig` knows of this machine, and the unpacked libraries."""
    folders = sorted({str(path.parent) for path in root.rglob("*.so.*")})
    settings = root / "libraries.conf"
    settings.write_text("\n".join([*folders, "include /etc/ld.so.conf", ""]))
    path = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin"))
    ldconfig = shutil.which("ldconfig", path=path)
    if ldconfig is None:
        raise ImageError("no ldconfig here: the images of the tests are built on Debian and Ubuntu only")
    command = [ldconfig, "-X", "-f", str(settings), "-C", str(root / LIBRARIES)]
    run(command, "indexing the unpacked libraries", APT_TIMEOUT_S)
