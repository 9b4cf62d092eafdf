"""Write requirements/*.txt from requirements/*.in; arguments go to uv (--upgrade, --upgrade-package NAME)."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from env_steps import environment

ROOT = Path(__file__).resolve().parent.parent
OLDEST_PYTHON = "3.11"
NO_GPU = ("--overrides", "requirements/overrides.txt", "--excludes", "requirements/excludes.txt")
OWN = ("--no-emit-package", "weightsync-contract")


@dataclass(frozen=True)
class Lock:
    name: str
    source: str
    options: tuple[str, ...] = ()

    @property
    def path(self) -> str:
        return f"requirements/{self.name}.txt"


# It comes first and holds everything; the others take its versions.
LARGEST = Lock("vllm", "requirements/vllm.in", NO_GPU)
# From build on: what goes into the images, or builds them.
SUBSETS = (
    Lock("base", "requirements/base.in", NO_GPU),
    Lock("uv", "requirements/uv.in", NO_GPU),
    Lock("build", "requirements/build.in"),
    Lock("operator", "operator/pyproject.toml", OWN),
    Lock("agent", "engine/pyproject.toml", OWN),
    Lock("plugin", "requirements/plugin.in"),
    # Triton compiles kernels; a transfer group has none.
    Lock("torch-cuda", "requirements/cuda.in", ("--no-emit-package", "triton")),
    Lock("torch-deps", "requirements/torch.in", (*NO_GPU, "--no-emit-package", "torch")),
)


def command(uv: Path, lock: Lock, arguments: Sequence[str]) -> list[str]:
    return [
        *(str(uv), "pip", "compile", lock.source, "--output-file", lock.path),
        *("--universal", "--python-version", OLDEST_PYTHON, "--generate-hashes", "--quiet", *lock.options),
        *("--custom-compile-command", "make lock", "--no-emit-index-url", *arguments),
    ]


def main(arguments: Sequence[str]) -> int:
    uv = ROOT / ".venv/bin/uv"
    for lock in (LARGEST, *SUBSETS):
        own = arguments if lock is LARGEST else ["--constraints", LARGEST.path]
        done = subprocess.run(command(uv, lock, own), cwd=ROOT, check=False, env=environment(os.environ))
        if done.returncode != 0:
            return done.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
