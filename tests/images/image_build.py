"""The project's images, built from its Dockerfile where no image registry can be reached.

``image_archive("agent")`` answers a tar file for ``ctr images import`` or ``docker load``. It is made once for
each state of the sources and kept in the cache. What differs from a release: BASE is made here from the
machine's own distribution, VLLM_BASE is that with no vLLM in it, and no torch is in the agent's image. Pods of
the tests mount the packages of .venv in their place: see ``SITES``.
"""

import contextlib
import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import image_tools
import images
from image_tools import ImageError, Tools, run
from weightsync_demo.kube.build import cache_directory
from weightsync_demo.kube.locking import exclusive

ROOT: Final = Path(__file__).resolve().parents[2]
# A change of how images are built here is a change of the images.
RECIPE: Final = "1"
BASE: Final = "localhost/weightsync-base"
VLLM_BASE: Final = "localhost/weightsync-vllm-base"
# libnuma1: vLLM's build for CPUs loads it, and an image for vLLM has it.
PACKAGES: Final = ("ca-certificates", "libnuma1", "python3", "python3-venv", "usr-is-merged")
SITES: Final = {"agent": "/opt/torch", "vllm": "/opt/vllm"}
"""Where a pod mounts ``host_site()``, read-only: importable there, after what the image itself has."""
MEMBERS: Final = {
    "operator": ("contract", "operator"),
    "agent": ("contract", "engine"),
    "vllm": ("contract", "engine"),
}
FILES: Final = ("Dockerfile", ".dockerignore", "LICENSE", "NOTICE")
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
    files += [root / name for name in FILES]
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
    found = {target: archive_of(target).path for target in targets}
    if all(path.exists() for path in found.values()):
        return found
    _cache().mkdir(parents=True, exist_ok=True)
    waiting = "images: another process is building: waiting for it"
    with (
        exclusive(_cache() / "build.lock", LOCK_TIMEOUT_S, lambda: progress(waiting)),
        tempfile.TemporaryDirectory(dir=_cache(), prefix="work-") as scratch,
    ):
        # Sources may change while they are built, and an archive's name has to say what is in it.
        context = _copy_sources(Path(scratch) / "context")
        wanted = [archive_of(target, context) for target in targets]
        _build([archive for archive in wanted if not archive.path.exists()], context, progress)
        return {archive.target: archive.path for archive in wanted}


def _copy_sources(context: Path) -> Path:
    context.mkdir()
    for name in FILES:
        shutil.copy2(ROOT / name, context / name)
    skip = shutil.ignore_patterns("__pycache__", "*.pyc")
    for name in ("requirements", *sorted(set().union(*MEMBERS.values()))):
        shutil.copytree(ROOT / name, context / name, ignore=skip)
    return context


def _cache() -> Path:
    return cache_directory() / "images"


def _base_key() -> str:
    digest = hashlib.sha256(" ".join((RECIPE, *PACKAGES)).encode())
    for path in (Path("/etc/os-release"), *image_tools.apt_sources()):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _build(wanted: list[Archive], context: Path, progress: Callable[[str], None]) -> None:
    if not wanted:
        return
    tools = image_tools.ensure_tools()
    base = _ensure_base(tools, progress)
    with _workshop(tools, context) as shop:
        shop.ensure_bases(base)
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
            # Else a package does it later, and brings all of Perl.
            f"--hook-dir={tools.root}/usr/share/mmdebstrap/hooks/merged-usr",
            # How this machine reaches its packages is nobody else's business.
            '--customize-hook=rm -rf "$1"/etc/apt/sources.list* "$1"/etc/apt/apt.conf.d/99mmdebstrap',
            *("", str(made), *map(str, sources)),
        ]
        run(command, "making a base image", BASE_TIMEOUT_S)
        made.rename(base)
    for old in _cache().glob("base-*.tar"):
        if old != base:
            old.unlink()
    return base


@dataclass(frozen=True)
class _Workshop:
    """buildah with settings of its own, and a store: kept where layers share what they have in common."""

    tools: Tools
    folder: Path
    context: Path
    store: Path
    overlay: bool
    secrets: images.Secrets

    def buildah(self, *arguments: str) -> list[str]:
        return [
            *self.tools.buildah,
            "--root",
            str(self.store),
            "--runroot",
            str(self.folder / "run"),
            *arguments,
        ]

    @property
    def environment(self) -> dict[str, str]:
        containers = self.tools.root / "etc/containers"
        return {
            **os.environ,
            "STORAGE_DRIVER": "overlay" if self.overlay else "vfs",
            "BUILDAH_ISOLATION": "chroot",
            "BUILDAH_FORMAT": "docker",
            "CONTAINERS_CONF": str(self.folder / "containers.conf"),
            "CONTAINERS_REGISTRIES_CONF": str(containers / "registries.conf"),
            "TMPDIR": str(self.folder / "tmp"),
        }

    @property
    def policy(self) -> list[str]:
        return ["--signature-policy", str(self.tools.root / "etc/containers/policy.json")]

    @property
    def options(self) -> list[str]:
        layers = str(self.overlay).lower()
        return [*self.policy, "--pull-never", "--network", "host", "--timestamp", "0", f"--layers={layers}"]

    def ensure_bases(self, base: Path) -> None:
        done = self.store / "bases"
        if done.exists():
            return
        context = self.folder / "base"
        context.mkdir()
        os.link(base, context / "base.tar")
        site = "/usr/lib/python3/dist-packages/vllm-site.pth"
        for name, more in ((BASE, ""), (VLLM_BASE, f"RUN echo {SITES['vllm']} > {site}\n")):
            (context / "Dockerfile").write_text(f"FROM scratch\nADD base.tar /\n{more}")
            self._run(["build", *self.options, "--tag", name, str(context)], "building a base image")
        done.touch()

    def build(self, archive: Archive) -> None:
        given = {"BASE": BASE, "VLLM_BASE": VLLM_BASE, "TORCH": "none", "VERSION": archive.version}
        build = images.Build(archive.target, given, archive.name)
        command = build.command(["buildah"], self.secrets, self.context)[1:]
        self._run([command[0], *self.options, *command[1:]], f"building {archive.name}")
        made = self.folder / f"{archive.target}.tar"
        # Layers stay as they are in such an archive: packing them takes longer than reading them.
        where = f"docker-archive:{made}:{archive.name}"
        self._run(["push", *self.policy, archive.name, where], f"saving {archive.name}")
        made.rename(archive.path)

    def _run(self, arguments: list[str], what: str) -> None:
        run(self.buildah(*arguments), what, BUILD_TIMEOUT_S, self.environment)


@contextlib.contextmanager
def _workshop(tools: Tools, context: Path) -> Iterator[_Workshop]:
    overlay = image_tools.overlays_work(_cache())
    kept = _cache() / f"store-{_store_key(tools, context)}"
    # What other packages, or another Dockerfile, were built with serves nobody.
    for old in _cache().glob("store-*"):
        if old != kept or not overlay:
            shutil.rmtree(old)
    with tempfile.TemporaryDirectory(dir=context.parent) as name:
        folder = Path(name)
        (folder / "tmp").mkdir()
        seccomp = tools.root / "usr/share/containers/seccomp.json"
        (folder / "containers.conf").write_text(f'[containers]\nseccomp_profile = "{seccomp}"\n')
        store = kept if overlay else folder / "store"
        store.mkdir(exist_ok=True)
        yield _Workshop(tools, folder, context, store, overlay, images.Secrets.collect(folder))


def _store_key(tools: Tools, context: Path) -> str:
    digest = hashlib.sha256(f"{RECIPE} {tools.root.name} {_base_key()}".encode())
    for path in (context / "Dockerfile", *sorted((context / "requirements").glob("*.txt"))):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


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
