"""The project's images, built from its Dockerfile where no image registry can be reached.

``image_archive("agent")`` answers a tar file for ``ctr images import`` or ``docker load``. It is made once for
each state of the sources and kept in the cache. What differs from a release: BASE is made here from the
machine's own distribution, VLLM_BASE is that with no vLLM in it, and no torch is in the agent's image. Pods of
the tests mount the packages of .venv in their place: see ``SITES``.
"""

import contextlib
import hashlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import image_tools
from image_tools import ImageError, Tools, run

import images
from weightsync_demo.kube.build import cache_directory
from weightsync_demo.kube.locking import exclusive

ROOT: Final = Path(__file__).resolve().parents[2]
# A change of how images are built here is a change of the images.
RECIPE: Final = "1"
BASE: Final = "localhost/weightsync-base"
VLLM_BASE: Final = "localhost/weightsync-vllm-base"
PACKAGES: Final = ("ca-certificates", "python3", "python3-venv")
SITES: Final = {"agent": "/opt/torch", "vllm": "/opt/vllm"}
"""Where a pod mounts ``host_site()``, read-only: importable there, after what the image itself has."""
MEMBERS: Final = {
    "operator": ("contract", "operator"),
    "agent": ("contract", "engine"),
    "vllm": ("contract", "engine"),
}
KEPT: Final = 3
BASE_TIMEOUT_S: Final = 600.0
BUILD_TIMEOUT_S: Final = 900.0
LOCK_TIMEOUT_S: Final = 1800.0
# A line of apt's configuration that says how to reach packages.
_REACH: Final = ("Acquire::http::", "Acquire::https::", "Acquire::Check-", "Acquire::Retries")


def host_site() -> Path:
    """The folder of .venv with torch and vLLM, for machines without a GPU. Raises ImageError."""
    found = sorted((ROOT / ".venv/lib").glob("python3.*/site-packages"))
    if not found or not (found[0] / "torch").is_dir():
        raise ImageError("there is no torch in .venv, which the tests' pods mount: make setup")
    return found[0]


@dataclass(frozen=True)
class Archive:
    """One image that is, or is to be, in the cache."""

    target: str
    version: str
    key: str

    @property
    def name(self) -> str:
        return images.image_name(self.target, self.version)

    @property
    def path(self) -> Path:
        return _cache() / f"{self.target}-{self.key}.tar"


def archive_of(target: str, root: Path = ROOT) -> Archive:
    """What the archive of a target's present sources is called."""
    digest = hashlib.sha256(f"{RECIPE} {target} {_base_key()}".encode())
    folders = [root / member / "src" for member in MEMBERS[target]]
    files = [
        path for folder in folders for path in folder.rglob("*") if path.suffix != ".pyc" and path.is_file()
    ]
    files += [root / member / "pyproject.toml" for member in MEMBERS[target]]
    files += [root / name for name in ("Dockerfile", ".dockerignore", "LICENSE", "NOTICE")]
    files += (root / "requirements").glob("*.txt")
    for path in sorted(files):
        digest.update(str(path.relative_to(root)).encode() + b"\0")
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return Archive(target, images.project_version(root), digest.hexdigest()[:16])


def image_archive(target: str, progress: Callable[[str], None] = print) -> Path:
    """The archive of ``operator``, ``agent`` or ``vllm``, built first where need be. Raises ImageError."""
    return image_archives((target,), progress)[target]


def image_archives(targets: tuple[str, ...], progress: Callable[[str], None] = print) -> dict[str, Path]:
    """Several of them; those that are missing share what can be shared. Raises ImageError."""
    wanted = {target: archive_of(target) for target in targets}
    if any(not archive.path.exists() for archive in wanted.values()):
        _cache().mkdir(parents=True, exist_ok=True)
        waiting = "images: another process is building: waiting for it"
        with exclusive(_cache() / "build.lock", LOCK_TIMEOUT_S, lambda: progress(waiting)):
            _build([archive for archive in wanted.values() if not archive.path.exists()], progress)
    return {target: archive.path for target, archive in wanted.items()}


def _cache() -> Path:
    return cache_directory() / "images"


def _base_key() -> str:
    digest = hashlib.sha256(" ".join((RECIPE, *PACKAGES)).encode())
    for path in (Path("/etc/os-release"), *image_tools.apt_sources()):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _build(wanted: list[Archive], progress: Callable[[str], None]) -> None:
    if not wanted:
        return
    tools = image_tools.ensure_tools()
    base = _ensure_base(tools, progress)
    with _workshop(tools) as shop:
        progress("images: base")
        shop.build_base(base)
        for archive in wanted:
            progress(f"images: {archive.name}")
            shop.build(archive)
            _forget_old(archive)


def _forget_old(archive: Archive) -> None:
    others = sorted(_cache().glob(f"{archive.target}-*.tar"), key=lambda path: path.stat().st_mtime)
    for path in others[:-KEPT]:
        path.unlink(missing_ok=True)


def _ensure_base(tools: Tools, progress: Callable[[str], None]) -> Path:
    """A root file system with Python, made from the machine's own package sources."""
    base = _cache() / f"base-{_base_key()}.tar"
    if base.exists():
        return base
    sources = image_tools.apt_sources()
    if not sources:
        raise ImageError("apt has no sources on this machine: nothing to make a base image from")
    progress("images: a base image from this machine's distribution, once")
    with tempfile.TemporaryDirectory(dir=_cache()) as scratch:
        options, made = Path(scratch) / "reach.conf", Path(scratch) / "base.tar"
        dump = run(["apt-config", "dump"], "reading apt's configuration", 30)
        options.write_text("".join(f"{line}\n" for line in dump.splitlines() if line.startswith(_REACH)))
        command = [
            *(*tools.mmdebstrap, "--mode=root", "--variant=minbase", f"--include={','.join(PACKAGES)}"),
            f"--aptopt={options}",
            # How this machine reaches its packages is nobody else's business.
            '--customize-hook=rm -rf "$1"/etc/apt/sources.list* "$1"/etc/apt/apt.conf.d/99mmdebstrap',
            *("", str(made), *map(str, sources)),
        ]
        run(command, "making a base image", BASE_TIMEOUT_S)
        made.rename(base)
    return base


@dataclass(frozen=True)
class _Workshop:
    """buildah with a store and settings of its own."""

    tools: Tools
    folder: Path
    secrets: images.Secrets

    def buildah(self, *arguments: str) -> list[str]:
        store, runs = self.folder / "store", self.folder / "run"
        return [*self.tools.buildah, "--root", str(store), "--runroot", str(runs), *arguments]

    @property
    def environment(self) -> dict[str, str]:
        containers = self.tools.root / "etc/containers"
        return {
            **os.environ,
            "STORAGE_DRIVER": "vfs",
            "BUILDAH_ISOLATION": "chroot",
            "BUILDAH_FORMAT": "docker",
            "CONTAINERS_CONF": str(self.folder / "containers.conf"),
            "CONTAINERS_REGISTRIES_CONF": str(containers / "registries.conf"),
            "TMPDIR": str(self.folder / "tmp"),
        }

    @property
    def options(self) -> list[str]:
        return [*self.policy, "--pull-never", "--network", "host", "--timestamp", "0"]

    @property
    def policy(self) -> list[str]:
        return ["--signature-policy", str(self.tools.root / "etc/containers/policy.json")]

    def build_base(self, base: Path) -> None:
        context = self.folder / "base"
        context.mkdir()
        os.link(base, context / "base.tar")
        site = "/usr/lib/python3/dist-packages/vllm-site.pth"
        text = (
            f"FROM scratch AS plain\nADD base.tar /\nFROM plain AS vllm\nRUN echo {SITES['vllm']} > {site}\n"
        )
        (context / "Dockerfile").write_text(text)
        for target, name in (("plain", BASE), ("vllm", VLLM_BASE)):
            self._run(
                ["build", *self.options, "--target", target, "--tag", name, str(context)],
                "building a base image",
            )

    def build(self, archive: Archive) -> None:
        given = {"BASE": BASE, "VLLM_BASE": VLLM_BASE, "TORCH": "none", "VERSION": archive.version}
        build = images.Build(archive.target, given, archive.name)
        command = build.command(["buildah"], self.secrets, ROOT)[1:]
        wheels = _cache() / "pip"
        wheels.mkdir(exist_ok=True)
        cached = ["--volume", f"{wheels}:/root/.cache/pip"]
        self._run([command[0], *self.options, *cached, *command[1:]], f"building {archive.name}")
        with tempfile.TemporaryDirectory(dir=_cache()) as scratch:
            made = Path(scratch) / "image.tar"
            # Layers stay as they are in such an archive: packing them takes longer than reading them.
            self._run(
                ["push", archive.name, f"docker-archive:{made}:{archive.name}"], f"saving {archive.name}"
            )
            made.rename(archive.path)

    def _run(self, arguments: list[str], what: str) -> None:
        run(self.buildah(*arguments), what, BUILD_TIMEOUT_S, self.environment)


@contextlib.contextmanager
def _workshop(tools: Tools) -> Iterator[_Workshop]:
    with tempfile.TemporaryDirectory(dir=_cache(), prefix="work-") as name:
        folder = Path(name)
        (folder / "tmp").mkdir()
        seccomp = tools.root / "usr/share/containers/seccomp.json"
        (folder / "containers.conf").write_text(f'[containers]\nseccomp_profile = "{seccomp}"\n')
        yield _Workshop(tools, folder, images.Secrets.collect(folder))


def main() -> int:
    """``python tests/images/image_build.py [TARGET ...]``: build, and print where the archives are."""
    targets = tuple(sys.argv[1:]) or images.TARGETS
    try:
        for path in image_archives(targets, lambda line: print(line, file=sys.stderr)).values():
            print(path)
    except ImageError as error:
        print(f"images: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
