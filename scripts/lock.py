"""Write requirements/*.txt from requirements/*.in; arguments go to uv (--upgrade, --upgrade-package NAME)."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from env_steps import environment

ROOT = Path(__file__).resolve().parent.parent
OLDEST_PYTHON = "3.11"
# vllm.txt comes first: it holds everything, and the others take its versions.
LARGEST, SUBSETS = "vllm", ("base", "uv")


def command(uv: Path, name: str, arguments: Sequence[str]) -> list[str]:
    return [
        *(str(uv), "pip", "compile", f"requirements/{name}.in", "--output-file", f"requirements/{name}.txt"),
        *("--universal", "--python-version", OLDEST_PYTHON, "--generate-hashes", "--quiet"),
        *("--overrides", "requirements/overrides.txt", "--excludes", "requirements/excludes.txt"),
        *("--custom-compile-command", "make lock", "--no-emit-index-url", *arguments),
    ]


def main(arguments: Sequence[str]) -> int:
    uv = ROOT / ".venv/bin/uv"
    for name in (LARGEST, *SUBSETS):
        own = arguments if name == LARGEST else ["--constraints", f"requirements/{LARGEST}.txt"]
        done = subprocess.run(command(uv, name, own), cwd=ROOT, check=False, env=environment(os.environ))
        if done.returncode != 0:
            return done.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
