"""Make .venv: the locked packages, the workspace's members, and what lets them run without a GPU.

Needs Python 3.11 to 3.13 with venv and a C compiler, and installs nothing outside the checkout but the
package cache. A second call finds its stamp and does nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cuda_stubs
import env_host
from env_steps import SetupError, alone, run, say, step

ROOT = Path(__file__).resolve().parent.parent
MEMBERS = ("contract", "engine", "operator", "demo")
STAMP = "weightsync-setup.json"
NETWORK = (
    "Is the package index within reach? A proxy is named by HTTPS_PROXY, certificates of your own by"
    " SSL_CERT_FILE."
)
# These imports also leave behind the bytecode that a server needs to start quickly.
IMPORTS = "import torch, transformers, kopf, kubernetes, aiohttp; torch.ones(2) @ torch.ones(2)"
VLLM_IMPORTS = (
    "import vllm.entrypoints.openai.api_server, vllm.v1.engine.core, vllm.v1.worker.cpu_worker,"
    " vllm.v1.executor.multiproc_executor, vllm.model_executor.models.llama"
)


@dataclass(frozen=True)
class Wanted:
    """What the stamp says once all is there. Apart, so that a changed member installs no package anew."""

    packages: str
    members: str


@dataclass(frozen=True)
class Setup:
    root: Path
    venv: Path

    @property
    def python(self) -> Path:
        return self.venv / "bin" / "python"

    def members(self) -> list[str]:
        """Those with sources: one without would fail the build of all."""
        folders = [(name, self.root / name) for name in MEMBERS]
        return [name for name, at in folders if (at / "pyproject.toml").is_file() and (at / "src").is_dir()]

    def lock(self, *, vllm: bool) -> Path:
        return self.root / "requirements" / ("vllm.txt" if vllm else "base.txt")

    def wanted(self, *, vllm: bool) -> Wanted:
        own = [self.root / "scripts" / f"{name}.py" for name in ("setup_env", "cuda_stubs", "elf")]
        packages = hashlib.sha256(f"{sys.version_info[:2]} {vllm}".encode())
        for path in (self.root / "requirements" / "uv.txt", self.lock(vllm=vllm), *own):
            packages.update(path.read_bytes())
        members = packages.copy()
        for name in self.members():
            members.update(name.encode())
            members.update((self.root / name / "pyproject.toml").read_bytes())
        return Wanted(packages.hexdigest(), members.hexdigest())

    def found(self) -> Wanted | None:
        try:
            stamp = json.loads((self.venv / STAMP).read_text())
            return Wanted(stamp["packages"], stamp["members"]) if self.python.exists() else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write_stamp(self, wanted: Wanted) -> None:
        (self.venv / STAMP).write_text(json.dumps(vars(wanted)) + "\n")

    def make_venv(self) -> None:
        settings = self.venv / "pyvenv.cfg"
        version = f"version = {sys.version_info[0]}.{sys.version_info[1]}."
        if self.python.exists() and settings.exists() and version in settings.read_text():
            return
        with step("virtual environment"):
            command = [sys.executable, "-m", "venv", "--clear", str(self.venv)]
            run(command, f"{sys.executable} could not make a virtual environment.")

    def install_uv(self) -> None:
        lock = self.root / "requirements" / "uv.txt"
        with step("uv"):
            pip = [str(self.python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
            run([*pip, "--require-hashes", "--no-deps", "-r", str(lock)], NETWORK)

    def uv(self, *arguments: str, advice: str) -> None:
        run([str(self.venv / "bin/uv"), "pip", *arguments, "--python", str(self.python)], advice)

    def install_packages(self, *, vllm: bool) -> None:
        lock = self.lock(vllm=vllm)
        count = sum(line[0].isalnum() for line in lock.read_text().splitlines())
        with step(f"{count} packages of requirements/{lock.name}, {'2.7' if vllm else '1.6'} GB"):
            self.uv("sync", "--require-hashes", str(lock), advice=NETWORK)

    def write_stubs(self, compiler: str, *, vllm: bool) -> None:
        (site,) = self.venv.glob("lib/python3.*/site-packages")
        numa = vllm and not cuda_stubs.has_numa()
        libraries = "CUDA and NUMA libraries" if numa else "CUDA libraries"
        with step(f"stub {libraries} (this environment is for machines without a GPU)"):
            try:
                cuda_stubs.write_stubs(site, compiler, numa=numa)
            except subprocess.CalledProcessError as error:
                raise SetupError(
                    f"{error.stderr}\n{compiler} can't link. {env_host.COMPILER_PACKAGES}"
                ) from None

    def install_members(self) -> None:
        members = self.members()
        if not members:
            return
        editable = [part for name in members for part in ("--editable", str(self.root / name))]
        with step(f"workspace: {', '.join(members)}"):
            self.uv(
                "install", "--no-deps", "--no-build-isolation", *editable, advice="Is a pyproject.toml wrong?"
            )

    def check(self, *, vllm: bool) -> None:
        with step(f"import of torch{' and vllm' if vllm else ''}"):
            code = f"{IMPORTS}\n{VLLM_IMPORTS if vllm else ''}"
            advice = "The packages are installed but don't import. Try again after: rm -rf .venv"
            run([str(self.python), "-c", code], advice)

    def make(self, *, vllm: bool) -> None:
        wanted, found = self.wanted(vllm=vllm), self.found()
        outdated = found is None or found.packages != wanted.packages
        if outdated:
            compiler = env_host.compiler()
            (self.venv / STAMP).unlink(missing_ok=True)
            self.make_venv()
            self.install_uv()
            self.install_packages(vllm=vllm)
            self.write_stubs(compiler, vllm=vllm)
        self.install_members()
        if outdated:
            self.check(vllm=vllm)
        self.write_stamp(wanted)

    def is_made(self, *, vllm: bool) -> bool:
        """An environment with vLLM also does for a caller that wants none."""
        return self.found() in [self.wanted(vllm=one) for one in {vllm, True}]


def set_up(root: Path, *, want_vllm: bool) -> None:
    env_host.check_python(sys.version_info[:2])
    reason = env_host.why_no_vllm_here() if want_vllm else None
    vllm = want_vllm and reason is None
    setup = Setup(root, root / ".venv")
    if setup.is_made(vllm=vllm):
        return
    with alone(root / "requirements" / "uv.txt"):
        if setup.is_made(vllm=vllm):
            return
        start = time.monotonic()
        say(f"setup: .venv with Python {sys.version.split()[0]}")
        if reason:
            say(f"  without vLLM: {reason}; the reference engine stands in for it")
        setup.make(vllm=vllm)
        say(f"setup: ready after {time.monotonic() - start:.0f} s")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--without-vllm", action="store_true", help="leave vLLM out (1.1 GB)")
    options = parser.parse_args(arguments)
    try:
        set_up(ROOT, want_vllm=not options.without_vllm)
    except SetupError as error:
        print(f"\nsetup: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nsetup: interrupted; the next call goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
