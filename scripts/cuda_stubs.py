"""Stub CUDA libraries, for test machines without a GPU only: never for an image, never for a GPU machine.

PyPI's torch is built against CUDA and does not import without the libraries of the nvidia wheels (2.7 GB).
This writes a small library in place of each that is missing. Every function in it returns 100,
cudaErrorNoDevice, so torch sees a machine without a device.

    python scripts/cuda_stubs.py SITE_PACKAGES
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import elf

CUDA_LIBRARY = re.compile(r"lib(cu|nccl|nv)")
# Undefined symbols without a version name no library; these prefixes are CUDA's.
CUDA_SYMBOL = re.compile(r"_*(cu|nccl|nv)")
# Functions whose result is a C string: 100 would be taken for an address.
RETURNS_TEXT = re.compile(r"(Error|Status)(String|Name)$|GetLastError$")
NO_DEVICE = 100

# library -> version name ("" for none) -> symbols
Exports = dict[str, dict[str, set[str]]]


def plan(objects: Iterable[elf.SharedObject], present: Iterable[str]) -> Exports:
    """The libraries to write and the symbols that each has to export, under which version."""
    objects, there = list(objects), set(present)
    missing = {name for one in objects for name in one.needed if CUDA_LIBRARY.match(name)} - there
    defined = {name for one in objects for name in one.defined}
    exports: Exports = {library: defaultdict(set) for library in sorted(missing)}
    # The dynamic linker looks in every loaded library, so any one of them may hold the rest.
    catch_all = next((name for name in exports if name.startswith("libcudart")), next(iter(exports), ""))
    for one in objects:
        for symbol, version in one.undefined.items():
            if version is not None:
                if version.library in exports:
                    exports[version.library][version.name].add(symbol)
            elif catch_all and symbol not in defined and CUDA_SYMBOL.match(symbol):
                exports[catch_all][""].add(symbol)
    return exports


def source(symbols: Iterable[str]) -> str:
    lines = []
    for symbol in sorted(symbols):
        if RETURNS_TEXT.search(symbol):
            lines.append(f'const char *{symbol}(void) {{ return "no CUDA device (stub library)"; }}')
        else:
            lines.append(f"int {symbol}(void) {{ return {NO_DEVICE}; }}")
    # ISO C wants at least one declaration.
    return "\n".join(lines or ["int weightsync_stub;"]) + "\n"


def version_script(versions: Mapping[str, set[str]]) -> str:
    return "".join(
        f"{version} {{ global: {' '.join(f'{symbol};' for symbol in sorted(symbols))} }};\n"
        for version, symbols in sorted(versions.items())
        if version
    )


def compile_stub(compiler: str, folder: Path, library: str, versions: Mapping[str, set[str]]) -> None:
    symbols = set().union(*versions.values())
    script = version_script(versions)
    with tempfile.TemporaryDirectory() as scratch:
        code, map_file = Path(scratch, "stub.c"), Path(scratch, "stub.map")
        code.write_text(source(symbols))
        map_file.write_text(script)
        # -fno-builtin: a stub may bear the name of a function that the compiler knows.
        command = [compiler, "-w", "-fno-builtin", "-shared", "-fPIC", f"-Wl,-soname,{library}"]
        command += [f"-Wl,--version-script,{map_file}"] if script else []
        subprocess.run([*command, "-o", str(folder / library), str(code)], check=True)


def torch_objects(site: Path) -> list[Path]:
    return sorted([*site.glob("torch/lib/*.so*"), *site.glob("torch/_C*.so")])


def write_stubs(site: Path, compiler: str = "cc") -> list[str]:
    """Write what torch in SITE lacks; the names of the libraries written. Writes none twice."""
    paths = torch_objects(site)
    if not paths:
        raise FileNotFoundError(f"no torch in {site}")
    present = {path.name for path in [*paths, *site.glob("nvidia/**/*.so*")]}
    exports = plan((elf.read(path) for path in paths), present)
    for library, versions in exports.items():
        compile_stub(compiler, site / "torch/lib", library, versions)
    return list(exports)


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print(__doc__, file=sys.stderr)
        return 2
    written = write_stubs(Path(arguments[0]))
    print(f"{len(written)} stub libraries: {', '.join(written) or 'none missing'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
