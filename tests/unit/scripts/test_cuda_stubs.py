"""Which stubs are written, and that what is written links and answers."""

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest

import cuda_stubs
import elf
import env_host

RUNTIME, NCCL = "libcudart.so.13", "libnccl.so.2"


def needs(
    *libraries: str, defined: tuple[str, ...] = (), **undefined: elf.Version | None
) -> elf.SharedObject:
    return elf.SharedObject(frozenset(libraries), frozenset(defined), undefined)


def test_each_symbol_goes_to_the_library_that_it_is_asked_of() -> None:
    torch = needs(RUNTIME, NCCL, cudaMalloc=elf.Version(RUNTIME, "libcudart.so.13"), ncclSend=None)
    stubs = cuda_stubs.plan([torch], present=[])
    assert stubs[RUNTIME].exports == {"libcudart.so.13": {"cudaMalloc"}, "": {"ncclSend"}}
    assert stubs[NCCL].exports == {}


def test_what_is_there_is_not_replaced() -> None:
    torch = needs(RUNTIME, NCCL, "libc.so.6", cudaMalloc=elf.Version(RUNTIME, "libcudart.so.13"))
    assert list(cuda_stubs.plan([torch], present=[RUNTIME])) == [NCCL]
    assert cuda_stubs.plan([torch], present=[RUNTIME, NCCL]) == {}


def test_what_torch_itself_defines_or_is_not_cudas_is_left_alone() -> None:
    torch = needs(RUNTIME, cuda_made_by_torch=None, malloc=None)
    other = needs("libtorch.so", defined=("cuda_made_by_torch",))
    assert cuda_stubs.plan([torch, other], present=[])[RUNTIME].exports == {}


def test_libnuma_is_planned_from_what_vllm_takes_of_it() -> None:
    version = elf.Version(cuda_stubs.NUMA, "libnuma_1.1")
    stub = cuda_stubs.plan_numa([needs(cuda_stubs.NUMA, numa_available=version, malloc=None)])
    assert stub.exports == {"libnuma_1.1": {"numa_available"}}


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A torch that needs two CUDA libraries, and a vLLM that needs libnuma, both as small as can be."""
    (tmp_path / "torch/lib").mkdir(parents=True)
    (tmp_path / "vllm").mkdir()
    link(
        tmp_path,
        "torch/lib/libtorch.so",
        {RUNTIME: ["cudaGetDeviceCount", "cudaGetErrorString"], NCCL: ["ncclSend"]},
    )
    link(tmp_path, "vllm/_C.so", {cuda_stubs.NUMA: ["numa_available", "numa_set_strict"]})
    return tmp_path


def link(site: Path, name: str, wanted: dict[str, list[str]]) -> None:
    """An object that takes versioned symbols of libraries that are gone once it is linked."""
    build = site / "build"
    build.mkdir(exist_ok=True)
    for library, symbols in wanted.items():
        stub = cuda_stubs.Stub(library, {f"{library}.version": set(symbols)})
        cuda_stubs.compile_stub(env_host.compiler(), build, stub)
    symbols = [symbol for library in wanted.values() for symbol in library]
    code = build / "code.c"
    code.write_text("".join(f"int {symbol}(void);\n" for symbol in symbols))
    with code.open("a") as file:
        file.write(f"int call(void) {{ return {' + '.join(f'{symbol}()' for symbol in symbols)}; }}\n")
    command = [
        env_host.compiler(),
        "-w",
        "-shared",
        "-fPIC",
        "-Wl,-rpath,$ORIGIN",
        "-o",
        str(site / name),
        str(code),
    ]
    subprocess.run([*command, *(str(build / library) for library in wanted)], check=True)


def run_in(site: Path, code: str) -> str:
    """A process of its own: a library that is loaded once stays."""
    prelude = f"import ctypes; site = {str(site)!r}\n"
    done = subprocess.run([sys.executable, "-c", prelude + code], capture_output=True, text=True, check=False)
    return (done.stdout + done.stderr).strip()


LOAD_TORCH = "torch = ctypes.CDLL(site + '/torch/lib/libtorch.so')\n"


def test_torch_loads_and_sees_no_device(site: Path) -> None:
    assert "cannot open shared object" in run_in(site, LOAD_TORCH)
    assert set(cuda_stubs.write_stubs(site, env_host.compiler())) == {RUNTIME, NCCL}
    answer = LOAD_TORCH + "runtime = ctypes.CDLL(site + '/torch/lib/libcudart.so.13')\n"
    answer += "runtime.cudaGetErrorString.restype = ctypes.c_char_p\n"
    answer += "print(runtime.cudaGetDeviceCount(), runtime.cudaGetErrorString().decode())"
    assert run_in(site, answer) == "100 no CUDA device (stub library)"


def test_after_torch_vllm_finds_a_libnuma_that_says_no(site: Path) -> None:
    # The code that is tested is for machines without libnuma; elsewhere the process would load the real one.
    cuda_stubs.write_stubs(site, env_host.compiler(), numa=True)
    where = "ctypes.CDLL(site + '/vllm/_C.so')\n"
    where += "print([line.split()[-1] for line in open('/proc/self/maps') if 'libnuma' in line][0])\n"
    where += "print(ctypes.CDLL('libnuma.so.1').numa_available())"
    assert run_in(site, LOAD_TORCH + where).split() == [str(site / "torch/lib/libnuma.so.1"), "-1"]


def test_stubs_of_an_older_torch_are_written_anew(site: Path) -> None:
    cuda_stubs.write_stubs(site, env_host.compiler(), numa=True)
    link(site, "torch/lib/libtorch.so", {RUNTIME: ["cudaGetDeviceCount", "cudaNewFunction"]})
    assert cuda_stubs.write_stubs(site, env_host.compiler()) == [RUNTIME]
    assert not (site / "torch/lib" / NCCL).exists()
    assert ctypes.CDLL(str(site / "torch/lib" / RUNTIME)).cudaNewFunction() == cuda_stubs.NO_DEVICE


def test_a_folder_without_torch_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no torch"):
        cuda_stubs.write_stubs(tmp_path)
