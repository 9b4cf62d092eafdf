"""Machines that the setup can and can't serve."""

from pathlib import Path

import pytest

import env_host
from env_steps import SetupError

GLIBC, CPU = ("glibc", "2.36"), "flags : fpu sse2 avx2 avx512f"


@pytest.mark.parametrize("minor", [11, 12, 13])
def test_supported_pythons_pass(minor: int) -> None:
    env_host.check_python((3, minor))


@pytest.mark.parametrize("version", [(3, 10), (3, 14), (2, 7)])
def test_another_python_is_refused_with_the_way_out(version: tuple[int, int]) -> None:
    with pytest.raises(SetupError, match="make setup PYTHON="):
        env_host.check_python(version)


def test_a_python_without_venv_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SetupError, match=r"apt-get install python3\.12-venv"):
        env_host.check_python((3, 12))


def test_without_a_compiler_the_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(SetupError, match="apt-get install gcc"):
        env_host.compiler()


def test_the_compiler_that_is_asked_for_comes_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "mine").touch(mode=0o755)
    (tmp_path / "gcc").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CC", "mine")
    assert env_host.compiler() == "mine"
    monkeypatch.setenv("CC", "not-there")
    assert env_host.compiler() == "gcc"


@pytest.mark.parametrize(
    ("machine", "libc", "cpuinfo", "reason"),
    [
        ("x86_64", GLIBC, CPU, None),
        ("x86_64", ("glibc", "2.28"), CPU, None),
        ("riscv64", GLIBC, CPU, "no wheel for riscv64"),
        ("x86_64", ("", ""), CPU, "for glibc"),
        ("x86_64", ("glibc", "2.17"), CPU, "this is 2.17"),
        ("x86_64", GLIBC, "flags : fpu sse2", "AVX2"),
    ],
)
def test_where_vllm_runs(machine: str, libc: tuple[str, str], cpuinfo: str, reason: str | None) -> None:
    answer = env_host.why_no_vllm(machine, libc, cpuinfo)
    assert answer is None if reason is None else reason in (answer or "")
