"""How the images are built, as far as it shows without building one."""

import re
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest

import images
import lock

ROOT = Path(__file__).parents[3]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
PIN = re.compile(r"(?m)^([a-z0-9-]+)==([^ ;\\]+)")


def pins(name: str) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for package, version in PIN.findall((ROOT / "requirements" / f"{name}.txt").read_text()):
        found.setdefault(package, set()).add(version)
    return found


def test_pip_hears_in_the_build_where_packages_come_from() -> None:
    listed = "global.index-url='https://one.example/simple'\n:env:.timeout='60'\n:env:.index-url='https://two.example'\n"
    assert images.pip_configuration(listed, certificates=True) == (
        "[global]\nindex-url = https://two.example\ntimeout = 60\ncert = /run/secrets/ca\n"
    )


def test_what_else_this_machines_pip_is_told_stays_here() -> None:
    listed = "global.user='true'\n:env:.find-links='/opt/wheels'\n:env:.cert='/etc/ca.pem'\n"
    assert images.pip_configuration(listed, certificates=False) == "[global]\n"


def test_several_indexes_stay_several() -> None:
    listed = "global.extra-index-url='https://a.example\\nhttps://b.example'"
    assert "extra-index-url = https://a.example\n    https://b.example\n" in images.pip_configuration(
        listed, certificates=False
    )


def test_certificates_are_those_that_pip_uses(tmp_path: Path) -> None:
    bundle = tmp_path / "ca.pem"
    bundle.touch()
    assert images.certificates({}, f"global.cert='{bundle}'\n") == bundle
    assert images.certificates({"SSL_CERT_FILE": str(bundle)}, "") == bundle
    assert images.certificates({"PIP_CERT": "/nowhere"}, "") is None


def test_secrets_go_by_file_and_proxies_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://me:secret@proxy.example")
    build = images.Build("agent", {"TORCH": "cpu"}, "weightsync/agent:1.2.3")
    command = build.command(["podman"], images.Secrets({"pip": Path("/tmp/pip.conf")}))
    assert command[:6] == ["podman", "build", "--target", "agent", "--tag", "weightsync/agent:1.2.3"]
    assert "TORCH=cpu" in command
    assert "id=pip,src=/tmp/pip.conf" in command
    assert not [part for part in command if "secret@" in part]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nginx"], "nginx is no target"),
        (["--build-arg", "TORCH"], "no NAME=VALUE"),
        ([], "no docker and no podman and no buildah is here"),
        (["--tool", "kaniko"], "no kaniko is here"),
    ],
)
def test_a_wrong_command_line_says_what_to_give(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SystemExit):
        images.main(arguments)
    assert re.search(said, capsys.readouterr().err)


def test_the_dockerfile_has_the_projects_version() -> None:
    versions = set(re.findall(r"(?m)^ARG VERSION=(.*)$", DOCKERFILE))
    members = {
        tomllib.loads((ROOT / name / "pyproject.toml").read_text())["project"]["version"]
        for name in ("contract", "engine", "operator")
    }
    assert versions == members == {images.project_version()}


def test_the_targets_are_the_dockerfiles() -> None:
    stages = re.findall(r"(?m)^FROM \S+ AS (\S+)$", DOCKERFILE)
    assert set(images.TARGETS) <= set(stages)
    assert len(stages) == len(set(stages))


def test_the_context_holds_what_is_copied_and_no_more() -> None:
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] not in ("#", "")]
    let_in = [line.removeprefix("!") for line in lines if line.startswith("!")]
    assert lines[0] == "*"
    for arguments in re.findall(r"(?m)^COPY (?!--)(.+)$", DOCKERFILE):
        for source in arguments.split()[:-1]:
            inside = [
                one for one in let_in if one == source or one.startswith(f"{source}/") or fnmatch(source, one)
            ]
            assert inside, source
            assert (ROOT / source).exists(), source
    assert not [one for one in let_in if one.startswith(("tests", "demo", ".", "examples"))]


def test_the_dockerfile_names_no_address() -> None:
    assert "://" not in DOCKERFILE


def test_an_image_takes_what_was_tested() -> None:
    tested = pins("vllm")
    for name in ("operator", "agent", "plugin", "build", "torch-deps", "torch-cuda"):
        common = pins(name).keys() & tested.keys()
        assert {package: pins(name)[package] for package in common} == {
            package: tested[package] for package in common
        }, f"{name}: make lock"
    assert {name for name in pins("operator") if name not in tested} == set()
    assert {name for name in pins("agent") if name not in tested} == set()


@pytest.mark.parametrize(("name", "member"), [("operator", "operator"), ("agent", "engine")])
def test_a_lock_has_every_dependency(name: str, member: str) -> None:
    project = tomllib.loads((ROOT / member / "pyproject.toml").read_text())["project"]
    needed = {re.split(r"[<>=!~\[ ]", one)[0] for one in project["dependencies"]} - {"weightsync-contract"}
    assert needed <= pins(name).keys(), "make lock"


def test_both_torches_are_one_version() -> None:
    (cuda,), (cpu,) = pins("torch-cuda")["torch"], pins("torch-cpu")["torch"]
    assert cpu == f"{cuda}+cpu"


def test_every_lock_is_written_by_make_lock_but_the_one_by_hand() -> None:
    written = {one.path for one in (lock.LARGEST, *lock.SUBSETS)}
    there = {f"requirements/{path.name}" for path in (ROOT / "requirements").glob("*.txt")}
    by_hand = {"requirements/torch-cpu.txt", "requirements/excludes.txt", "requirements/overrides.txt"}
    assert written == there - by_hand
