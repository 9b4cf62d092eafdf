"""How the Kubernetes binary is named, found and built, with a Go toolchain that only pretends."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from weightsync_demo.kube import toolchain
from weightsync_demo.kube.build import PROGRAMS, ensure_binaries, find_binaries
from weightsync_demo.kube.compile import explain, version_flags
from weightsync_demo.kube.errors import BuildError
from weightsync_demo.kube.locking import exclusive
from weightsync_demo.kube.source import Source, find_source, parse_version
from weightsync_demo.kube.toolchain import WHEEL_VERSION, Go, choose
from weightsync_demo.waiting import wait_for

GO_MOD = """\
module example.test/hyper

go 1.26.0

require (
\tk8s.io/kubectl v0.36.3
\tk8s.io/kubernetes v1.36.3
)
"""

# Answers what the build asks of Go; each build leaves a line in $FAKE_GO_BUILDS.
FAKE_GO = """\
#!{python}
import os, sys, time
arguments = sys.argv[1:]
if arguments == ["version"]:
    print("go version go" + os.environ.get("FAKE_GO_VERSION", "1.26.8") + " linux/amd64")
elif arguments[0] == "list":
    print("go: downloading k8s.io/api v0.36.3", file=sys.stderr)
    print("fmt", "k8s.io/api", "example.test/hyper/hyper", sep="\\n")
elif arguments[0] == "build":
    with open(os.environ["FAKE_GO_BUILDS"], "a") as builds:
        builds.write(os.environ["GOFLAGS"] + " " + os.environ["CGO_ENABLED"] + "\\n")
    print("fmt", "k8s.io/api", sep="\\n", file=sys.stderr)
    if message := os.environ.get("FAKE_GO_FAILS"):
        sys.exit(message)
    time.sleep(float(os.environ.get("FAKE_GO_SECONDS", "0")))
    path = arguments[arguments.index("-o") + 1]
    with open(path, "w") as binary:
        binary.write("#!/bin/sh\\n")
    os.chmod(path, 0o755)
"""


@pytest.fixture
def source(tmp_path: Path) -> Source:
    directory = tmp_path / "cluster"
    (directory / "hyper").mkdir(parents=True)
    (directory / "go.mod").write_text(GO_MOD)
    (directory / "go.sum").write_text("k8s.io/kubernetes v1.36.3 h1:abc=\n")
    (directory / "hyper" / "main.go").write_text("package main\n")
    return Source(directory)


@pytest.fixture
def builds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The pretended toolchain is on PATH and the cache empty; a file with one line a build."""
    go = tmp_path / "bin" / "go"
    go.parent.mkdir()
    go.write_text(FAKE_GO.format(python=sys.executable))
    go.chmod(0o755)
    log = tmp_path / "builds"
    log.touch()
    monkeypatch.setenv("PATH", f"{go.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("FAKE_GO_BUILDS", str(log))
    return log


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("go1.26.6", (1, 26, 6)),
        ("1.26", (1, 26)),
        ("go version go1.27rc1 linux/amd64", (1, 27)),
        ("go1.100.0", (1, 100, 0)),
    ],
)
def test_a_version_is_read(text: str, version: tuple[int, ...]) -> None:
    assert parse_version(text) == version


def test_no_version_is_an_error() -> None:
    with pytest.raises(ValueError, match="devel"):
        parse_version("devel")


@pytest.mark.parametrize("name", ["go.mod", "go.sum", "hyper/main.go"])
def test_the_key_changes_with_each_input(source: Source, name: str) -> None:
    before = source.key("1.26.8")
    path = source.directory / name
    path.write_text(path.read_text() + "\n")
    assert source.key("1.26.8") != before


def test_the_key_changes_with_a_byte_that_moves_between_inputs(source: Source) -> None:
    go_mod, go_sum, _ = source.inputs
    go_mod.write_text("ab")
    go_sum.write_text("c")
    before = source.key("1.26.8")
    go_mod.write_text("a")
    go_sum.write_text("bc")
    assert source.key("1.26.8") != before


def test_the_key_changes_with_go_and_platform(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    before = source.key("1.26.8")
    assert source.key("1.26.8") == before
    assert source.key("1.26.9") != before
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    assert source.key("1.26.8") != before


def test_versions_come_from_go_mod(source: Source) -> None:
    assert source.go_needed == (1, 26, 0)
    assert source.kubernetes == "v1.36.3"


def test_the_checkouts_module_pins_what_the_linker_is_told() -> None:
    flags = version_flags(find_source().kubernetes)
    assert "-X k8s.io/component-base/version.gitVersion=v1.36.3" in flags
    assert "-X k8s.io/component-base/version.gitMinor=36" in flags


def test_a_module_without_kubernetes_is_an_error(source: Source) -> None:
    (source.directory / "go.mod").write_text("module example.test/hyper\n")
    with pytest.raises(BuildError, match=r"go\.mod has no line"):
        _ = source.kubernetes


@pytest.mark.parametrize("version", ["1.26.0", "1.26.8", "1.27"])
def test_a_go_that_is_new_enough_is_used(version: str) -> None:
    go = Go(version, Path("/bin/go"))
    assert choose(go, (1, 26, 0)) == go


@pytest.mark.parametrize("on_path", [None, Go("1.25.9", Path("/bin/go"))])
def test_the_pinned_go_stands_in_for_none_and_for_an_old_one(on_path: Go | None) -> None:
    assert choose(on_path, (1, 26, 0)) == Go(WHEEL_VERSION, None)


def test_the_pinned_go_can_build_the_checkouts_module() -> None:
    assert parse_version(WHEEL_VERSION) >= find_source().go_needed


@pytest.mark.parametrize(
    ("output", "advice"),
    [
        ("write /x/y: no space left on device", "disk is full"),
        ("go: k8s.io/api@v0.36.3: Get: dial tcp: lookup x: no such host", "module proxy can't be reached"),
        ("/usr/lib/go/link: signal: killed", "out of memory"),
        ("verifying module: checksum mismatch", "update.sh"),
        ("hyper/main.go:1:1: syntax error", "syntax error"),
    ],
)
def test_a_failed_build_says_what_to_do(output: str, advice: str) -> None:
    said = explain(f"first line\n{output}\n")
    assert advice in said
    assert output in said


def test_it_is_built_once_and_found_again(source: Source, builds: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    assert find_binaries(source) is None

    built = ensure_binaries(lines.append, source)

    assert all(os.access(built.program(name), os.X_OK) for name in PROGRAMS)
    assert built.kubectl.resolve() == built.hyper
    assert built.hyper.parent == tmp_path / "cache" / "weightsync" / source.key("1.26.8")
    assert any("3 packages" in line for line in lines)
    lines.clear()
    assert ensure_binaries(lines.append, source) == find_binaries(source) == built
    assert lines == []
    assert builds.read_text().splitlines() == ["-mod=readonly -modcacherw -buildvcs=false 0"]


def test_only_the_binary_is_kept(source: Source, builds: Path, tmp_path: Path) -> None:
    built = ensure_binaries(lambda line: None, source)
    assert {path.name for path in built.hyper.parent.parent.iterdir()} == {source.key("1.26.8"), "build.lock"}


def test_another_go_is_another_binary(source: Source, builds: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = ensure_binaries(lambda line: None, source)
    monkeypatch.setenv("FAKE_GO_VERSION", "1.27.1")
    assert ensure_binaries(lambda line: None, source) != first


def test_a_failed_build_leaves_nothing_that_looks_finished(
    source: Source, builds: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_GO_FAILS", "write: no space left on device")
    with pytest.raises(BuildError, match=r"(?s)go build.*disk is full.*no space left"):
        ensure_binaries(lambda line: None, source)
    assert find_binaries(source) is None
    monkeypatch.delenv("FAKE_GO_FAILS")
    assert ensure_binaries(lambda line: None, source) == find_binaries(source)


def test_half_a_binary_folder_is_built_anew(source: Source, builds: Path) -> None:
    built = ensure_binaries(lambda line: None, source)
    built.kubectl.unlink()
    assert find_binaries(source) is None
    assert ensure_binaries(lambda line: None, source) == built
    assert built.kubectl.exists()


def test_a_full_disk_is_seen_before_the_build(
    source: Source, builds: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("weightsync_demo.kube.build.DISK_NEEDED_BYTES", 1 << 60)
    with pytest.raises(BuildError, match="XDG_CACHE_HOME"):
        ensure_binaries(lambda line: None, source)
    assert builds.read_text() == ""


BUILDER = """
import sys
from pathlib import Path
from weightsync_demo.kube.build import ensure_binaries
from weightsync_demo.kube.source import Source
print(ensure_binaries(print, Source(Path(sys.argv[1]))).hyper)
"""


def test_two_processes_build_once(source: Source, builds: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_GO_SECONDS", "0.5")
    command = [sys.executable, "-c", BUILDER, str(source.directory)]
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as one,
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other,
    ):
        said = [process.communicate(timeout=30)[0] for process in (one, other)]
    assert (one.returncode, other.returncode) == (0, 0)
    assert len(builds.read_text().splitlines()) == 1
    assert said[0].splitlines()[-1] == said[1].splitlines()[-1]


def test_a_killed_builder_keeps_others_out_until_its_compiler_ends(
    source: Source, builds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_GO_SECONDS", "1")
    command = [sys.executable, "-c", BUILDER, str(source.directory)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as builder:
        wait_for(builds.read_text, 30, "the compiler")
        builder.kill()
    waited: list[bool] = []
    with exclusive(tmp_path / "cache" / "weightsync" / "build.lock", 30, lambda: waited.append(True)):
        assert waited == [True]


def test_a_lock_that_is_never_let_go_ends_the_wait(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with (
        exclusive(path, 0, lambda: None),
        pytest.raises(TimeoutError, match="the lock"),
        exclusive(path, 0.01, lambda: None),
    ):
        pass


def test_neither_go_nor_pip_is_an_error_that_says_so(
    source: Source, builds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BuildError, match="put Go on PATH"):
        ensure_binaries(lambda line: None, source)


def test_a_toolchain_that_does_not_run_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain, "_pip_install", lambda directory: None)
    with pytest.raises(BuildError, match="doesn't run here"):
        toolchain.install(tmp_path / "go", lambda line: None)


def test_outside_a_checkout_the_error_says_where_to_install_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("weightsync_demo.kube.source.__file__", str(tmp_path / "source.py"))
    with pytest.raises(BuildError, match="from a checkout"):
        find_source()
