"""The reader against objects that the machine's own compiler made."""

import subprocess
from pathlib import Path

import pytest

import elf
import env_host

LIBRARY = "libprovider.so.1"


def build(folder: Path, name: str, code: str, *options: str) -> Path:
    source = folder / f"{name}.c"
    source.write_text(code)
    command = [env_host.compiler(), "-w", "-shared", "-fPIC", "-o", str(folder / name), str(source)]
    subprocess.run([*command, *options], check=True)
    return folder / name


@pytest.fixture
def provider(tmp_path: Path) -> Path:
    script = tmp_path / "provider.map"
    script.write_text("PROVIDER_1 { global: first; };\nPROVIDER_2 { global: second; } PROVIDER_1;\n")
    options = [f"-Wl,-soname,{LIBRARY}", f"-Wl,--version-script,{script}"]
    return build(tmp_path, LIBRARY, "int first(void){return 1;} int second(void){return 2;}", *options)


def test_needs_definitions_and_versions_are_read(tmp_path: Path, provider: Path) -> None:
    code = (
        "int first(void), second(void), nobody(void); int mine(void) {return first() + second() + nobody();}"
    )
    user = elf.read(build(tmp_path, "user.so", code, "-Wl,--no-as-needed", str(provider)))

    assert LIBRARY in user.needed
    assert "mine" in user.defined
    assert user.undefined["first"] == elf.Version(LIBRARY, "PROVIDER_1")
    assert user.undefined["second"] == elf.Version(LIBRARY, "PROVIDER_2")
    assert user.undefined["nobody"] is None


def test_a_provider_defines_what_it_exports(provider: Path) -> None:
    read = elf.read(provider)
    assert {"first", "second"} <= read.defined
    assert "first" not in read.undefined


@pytest.mark.parametrize("content", [b"#!/bin/sh\n", b"\x7fELF\x01\x01 32 bits"])
def test_anything_else_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(elf.NotElf):
        elf.read(path)
