"""Stub CUDA libraries, for test machines without a GPU only: never for an image, never for a GPU machine.

PyPI's torch is built against CUDA and does not import without the libraries of the nvidia wheels (2.7 GB).
This writes a small library in place of each that is missing. Every function in it returns 100,
cudaErrorNoDevice, so torch sees a machine without a device. Where libnuma is missing, too, a stub of it
tells vLLM that the machine has no NUMA.

    python scripts/cuda_stubs.py SITE_PACKAGES
"""

from __future__ import annotations

import ctypes
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import elf

NUMA = "libnuma.so.1"
CUDA_LIBRARY = re.compile(r"lib(cu|nccl|nv)")
# An undefined symbol without a version does not say which library it is from; these prefixes are CUDA's.
CUDA_SYMBOL = re.compile(r"_*(cu|nccl|nv)")
# Functions whose result is a C string: 100 would be taken for an address.
RETURNS_TEXT = re.compile(r"(Error|Status)(String|Name)$|GetLastError$")
NO_DEVICE = 100
# By libnuma's manual, no other function may be called after this answer, and vLLM calls none.
NO_NUMA = {"numa_available": -1}
# What was written, so that a newer torch gets stubs of its own.
LIST = "weightsync-stubs.txt"


@dataclass
class Stub:
    library: str
    # Version name ("" for none) to the symbols under it.
    exports: dict[str, set[str]] = field(default_factory=dict)
    # Other stubs to load with this one.
    needs: tuple[str, ...] = ()

    def add(self, version: str, symbol: str) -> None:
        self.exports.setdefault(version, set()).add(symbol)


def plan(objects: Iterable[elf.SharedObject], present: Iterable[str]) -> dict[str, Stub]:
    """The CUDA libraries to write, by name."""
    objects, there = list(objects), set(present)
    missing = {name for one in objects for name in one.needed if CUDA_LIBRARY.match(name)} - there
    stubs = {name: Stub(name) for name in sorted(missing)}
    if not stubs:
        return stubs
    defined = {name for one in objects for name in one.defined}
    for one in objects:
        for symbol, version in one.undefined.items():
            if version is not None:
                if version.library in stubs:
                    stubs[version.library].add(version.name, symbol)
            elif symbol not in defined and CUDA_SYMBOL.match(symbol):
                # Symbols are looked up in every loaded library, so any of them may hold this one.
                always_loaded(stubs).add("", symbol)
    return stubs


def always_loaded(stubs: dict[str, Stub]) -> Stub:
    """The stub that every import of torch loads."""
    return next(
        (stub for name, stub in stubs.items() if name.startswith("libcudart")), next(iter(stubs.values()))
    )


def plan_numa(objects: Iterable[elf.SharedObject]) -> Stub:
    """What vLLM's own objects take from libnuma."""
    stub = Stub(NUMA)
    for one in objects:
        for symbol, version in one.undefined.items():
            if version is not None and version.library == NUMA:
                stub.add(version.name, symbol)
    return stub


def source(symbols: Iterable[str]) -> str:
    """C code that defines them all."""
    lines = []
    for symbol in sorted(symbols):
        if RETURNS_TEXT.search(symbol):
            lines.append(f'const char *{symbol}(void) {{ return "no CUDA device (stub library)"; }}')
        else:
            lines.append(f"int {symbol}(void) {{ return {NO_NUMA.get(symbol, NO_DEVICE)}; }}")
    # ISO C wants at least one declaration.
    return "\n".join(lines or ["extern int weightsync_stub;"]) + "\n"


def version_script(stub: Stub) -> str:
    """The linker's version script; empty if no symbol has a version."""
    return "".join(
        f"{version} {{ global: {' '.join(f'{symbol};' for symbol in sorted(symbols))} }};\n"
        for version, symbols in sorted(stub.exports.items())
        if version
    )


def compile_stub(compiler: str, folder: Path, stub: Stub) -> None:
    script = version_script(stub)
    with tempfile.TemporaryDirectory() as scratch:
        code, map_file = Path(scratch, "stub.c"), Path(scratch, "stub.map")
        code.write_text(source(set().union(*stub.exports.values())))
        map_file.write_text(script)
        # -fno-builtin: a stub may bear the name of a function that the compiler knows.
        command = [compiler, "-w", "-fno-builtin", "-shared", "-fPIC", f"-Wl,-soname,{stub.library}"]
        command += [f"-Wl,--version-script,{map_file}"] if script else []
        command += ["-o", str(folder / stub.library), str(code)]
        if stub.needs:
            command += [
                "-Wl,--no-as-needed",
                "-Wl,-rpath,$ORIGIN",
                *(str(folder / name) for name in stub.needs),
            ]
        subprocess.run(command, check=True, capture_output=True, text=True)


def remove_stubs(folder: Path) -> None:
    written = folder / LIST
    if written.exists():
        for name in written.read_text().splitlines():
            (folder / name).unlink(missing_ok=True)
        written.unlink()


def write_stubs(site: Path, compiler: str = "cc", *, numa: bool = False) -> list[str]:
    """Write what torch lacks, and libnuma if asked to; the names of the libraries."""
    folder = site / "torch" / "lib"
    remove_stubs(folder)
    paths = sorted([*folder.glob("*.so*"), *site.glob("torch/_C*.so")])
    if not paths:
        raise FileNotFoundError(f"no torch in {site}")
    present = {path.name for path in [*paths, *site.glob("nvidia/**/*.so*")]}
    stubs = plan((elf.read(path) for path in paths), present)
    to_write = list(stubs.values())
    if numa and stubs:
        # vLLM's objects have no search path, but find by its name what torch has loaded before them.
        to_write.insert(0, plan_numa(elf.read(path) for path in sorted(site.glob("vllm/_C*.so"))))
        always_loaded(stubs).needs = (NUMA,)
    (folder / LIST).write_text("".join(f"{stub.library}\n" for stub in to_write))
    for stub in to_write:
        compile_stub(compiler, folder, stub)
    return [stub.library for stub in to_write]


def has_numa() -> bool:
    try:
        ctypes.CDLL(NUMA)
    except OSError:
        return False
    return True


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print(__doc__, file=sys.stderr)
        return 2
    written = write_stubs(Path(arguments[0]), numa=not has_numa())
    print(f"{len(written)} stub libraries: {', '.join(written) or 'none is missing'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
