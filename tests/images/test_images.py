"""The images as they are built: small, of the locked packages, and at home in a hardened pod."""

import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest
from packaging.markers import Marker

import image_build
import images
from image_root import USER, Image, unpack
from image_tools import ImageError

# Whichever is first waits for all images.
pytestmark = pytest.mark.timeout(1800)
MB = 1_000_000
# Limits of what is unpacked on a node. Without torch: the tests mount theirs.
LIMITS = {"operator": 260 * MB, "agent": 150 * MB}
OURS = ("operator", "agent")
COMPILERS = {"cc", "gcc", "g++", "c++", "clang", "ld", "as", "tcc", "go", "rustc", "make"}
TORN = """
import sys, threading, torch
from weightsync_engine.transfer.gloo import GlooCommunicator
from weightsync_engine.transfer.rendezvous import listen, reach
there = listen("127.0.0.1", 0, 2, "nonce", 20)
got = torch.zeros(4)
def other():
    with_us = GlooCommunicator(reach("127.0.0.1", there.port, 1, 2, "nonce", 20))
    with_us.broadcast(got, 0, 20)
thread = threading.Thread(target=other)
thread.start()
GlooCommunicator(there).broadcast(torch.arange(4.0), 0, 20)
thread.join()
print(got.tolist())
"""
WRITING = """
import os
for folder in ("/", "/etc", "/opt", "/usr/lib", "/var/lib", "/run"):
    try:
        open(f"{folder}/written", "w")
    except OSError as error:
        assert error.errno in (13, 30), error
    else:
        raise SystemExit(f"{folder} can be written to")
for folder in ("/tmp", "/run/weightsync", "/var/lib/weightsync", os.environ["HOME"]):
    open(f"{folder}/written", "w").close()
print(os.getuid(), os.getgid())
"""
INSTALLED = """
import importlib.metadata, json, platform
names = [(d.metadata["Name"].lower().replace("_", "-").replace(".", "-"), d.version)
         for d in importlib.metadata.distributions()]
print(json.dumps({"python": platform.python_version(), "packages": names}))
"""


def missing(what: str) -> NoReturn:
    if os.environ.get("CI") == "true":
        pytest.fail(what)
    pytest.skip(what)


@pytest.fixture(scope="session")
def archives() -> dict[str, Path]:
    try:
        return image_build.image_archives(images.TARGETS)
    except ImageError as error:
        missing(f"the images can't be built here: {error}")


@pytest.fixture(scope="session")
def image(archives: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Image]:
    made: dict[str, Image] = {}

    def of(target: str) -> Image:
        if target not in made:
            made[target] = unpack(archives[target], tmp_path_factory.mktemp(target) / "root")
        return made[target]

    return of


@pytest.fixture(scope="session")
def site(image: Callable[[str], Image]) -> str:
    """The folder of .venv that pods of the tests mount, for the Python that it was made for."""
    host = image_build.host_site()
    inside = (
        image("agent").run("python", "-c", "import sys; print('%d.%d' % sys.version_info[:2])").stdout.strip()
    )
    if inside != f"{sys.version_info[0]}.{sys.version_info[1]}":
        missing(f"the base has Python {inside}, .venv another: its torch can't be mounted")
    return str(host)


@pytest.mark.parametrize("target", images.TARGETS)
def test_an_image_says_what_it_is(image: Callable[[str], Image], target: str) -> None:
    built = image(target)
    prefix = "org.opencontainers.image"
    base = image_build.VLLM_BASE if target == "vllm" else image_build.BASE
    assert built.labels.items() >= {
        (f"{prefix}.version", images.project_version()),
        (f"{prefix}.licenses", "Apache-2.0"),
        (f"{prefix}.base.name", base),
    }
    assert built.labels[f"{prefix}.title"]
    name = images.image_name(target, images.project_version())
    assert name in {tag.partition("/")[2] for tag in built.tags}
    assert built.config["config"]["User"] == f"{USER}:{USER}"
    assert built.config["config"].get("Healthcheck") is None


@pytest.mark.parametrize("target", images.TARGETS)
def test_nothing_can_be_written_but_what_a_pod_mounts(image: Callable[[str], Image], target: str) -> None:
    done = image(target).run("python3", "-c", WRITING)
    assert (done.stdout.split(), done.stderr) == ([str(USER), str(USER)], "")


@pytest.mark.parametrize(
    ("target", "module"), [("operator", "weightsync_operator"), ("agent", "weightsync_engine.agent")]
)
def test_an_entrypoint_answers_help(image: Callable[[str], Image], target: str, module: str) -> None:
    built = image(target)
    assert built.entrypoint == ["python", "-m", module]
    done = built.run(*built.entrypoint, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: weightsync-")


def test_the_operator_starts_and_says_what_it_lacks(image: Callable[[str], Image]) -> None:
    built = image("operator")
    done = built.run(*built.entrypoint)
    assert done.returncode == 2
    assert "can't start" in done.stderr + done.stdout
    assert "Traceback" not in done.stderr


def test_an_agent_goes_on_without_its_operator_until_it_is_told_to_end(
    image: Callable[[str], Image], site: str
) -> None:
    built = image("agent")
    environment = {
        "WEIGHTSYNC_ROLE": "trainer",
        "WEIGHTSYNC_OPERATOR": "ws://127.0.0.1:9",
        "WEIGHTSYNC_TOKEN_FILE": "/tmp/token",
        "POD_NAMESPACE": "default",
        "POD_NAME": "trainer-0",
        "POD_UID": "1-2-3",
        "POD_IP": "127.0.0.1",
    }
    # In place of a kubelet: some seconds of it, then SIGTERM. It answers that with 0, timeout's own is 124.
    done = built.run(
        *("timeout", "--preserve-status", "--kill-after=20", "4", *built.entrypoint),
        environment=environment,
        site=f"{site}:{image_build.SITES['agent']}",
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "Read-only file system" not in done.stderr


def test_an_agents_group_works_with_mounted_torch(image: Callable[[str], Image], site: str) -> None:
    mounted = f"{site}:{image_build.SITES['agent']}"
    done = image("agent").run("python", "-W", "error", "-c", TORN, site=mounted)
    assert done.stdout.strip() == "[0.0, 1.0, 2.0, 3.0]", done.stderr


def test_an_agent_without_torch_says_so(image: Callable[[str], Image]) -> None:
    done = image("agent").run("python", "-c", "import weightsync_engine.transfer.child")
    assert done.stderr.strip().endswith("No module named 'torch'")


@pytest.mark.parametrize("target", OURS)
def test_nothing_is_there_to_install_or_compile_with(image: Callable[[str], Image], target: str) -> None:
    names = image(target).files()
    programs = {Path(name).name for name, path in names.items() if os.access(path, os.X_OK)}
    links = {path.name for path in image(target).root.rglob("bin/*") if path.is_symlink()}
    assert (programs | links) & COMPILERS == set()
    assert [
        name for name in names if re.search(r"/(pip|ensurepip|setuptools)[-/]|/pip[0-9.]*$|\.whl$", name)
    ] == []
    done = image(target).run("python", "-m", "pip", "--version")
    assert "No module named pip" in done.stderr


@pytest.mark.parametrize("target", OURS)
def test_no_program_changes_its_user(image: Callable[[str], Image], target: str) -> None:
    assert [name for name, path in image(target).files().items() if path.stat().st_mode & 0o6000] == []


@pytest.mark.parametrize("target", OURS)
def test_an_image_stays_small(image: Callable[[str], Image], target: str) -> None:
    # One layer for the base, so that what is removed from it is gone, not hidden.
    assert sum(image(target).layer_bytes) < LIMITS[target]


def test_vllms_image_grows_by_little(image: Callable[[str], Image]) -> None:
    assert sum(image("vllm").layer_bytes[-1:]) < 5 * MB


@pytest.mark.parametrize("target", images.TARGETS)
def test_nothing_of_the_checkout_is_in_an_image_but_the_package(
    image: Callable[[str], Image], target: str
) -> None:
    names = set(image(target).files())
    roots = {
        match[0]
        for name in names
        if (match := re.search(r"weightsync_[a-z_]+(?=/|-)", name)) and ".pyc" not in name
    }
    own = "weightsync_operator" if target == "operator" else "weightsync_engine"
    assert roots == {"weightsync_contract", own}
    here = {path.name for path in (image_build.ROOT / "tests").rglob("test_*.py")}
    assert {name for name in names if Path(name).name in here} == set()
    assert [name for name in names if name.startswith(("/src", "/wheels", "/build", "/carried"))] == []


@pytest.mark.parametrize("target", images.TARGETS)
def test_how_this_machine_reaches_its_packages_is_in_no_image(
    image: Callable[[str], Image], target: str
) -> None:
    built = image(target)
    secrets = [path for name in ("etc/pip.conf", "run/secrets/pip") for path in [built.root / name]]
    assert [path for path in secrets if path.is_file() and path.read_text()] == []
    assert not (built.root / "run/secrets/ca").exists()
    assert "://" not in json.dumps([built.config["history"], built.environment])


@pytest.mark.parametrize("target", OURS)
def test_every_module_has_its_bytecode(image: Callable[[str], Image], target: str) -> None:
    root = image(target).root / "opt/weightsync"
    sources = [path for path in root.rglob("*.py") if "lib2to3" not in path.parts]
    assert len(sources) > 100
    compiled = {
        path: next(path.parent.glob(f"__pycache__/{path.stem}.cpython-*.pyc"), None) for path in sources
    }
    assert [str(path) for path, code in compiled.items() if code is None] == []
    # Bit 0: by hash; bit 1: checked against the source. Unchecked: its time may be any.
    flags = {int.from_bytes(code.read_bytes()[4:8], "little") for code in compiled.values() if code}
    assert flags == {0b01}


@pytest.mark.parametrize("target", OURS)
def test_an_image_has_exactly_the_locked_packages(image: Callable[[str], Image], target: str) -> None:
    found = json.loads(image(target).run("python", "-c", INSTALLED).stdout)
    installed = dict(found["packages"])
    lines = (image_build.ROOT / "requirements" / f"{target}.txt").read_text()
    locked = {
        name: version
        for name, version, marker in re.findall(r"(?m)^([a-z0-9-]+)==([^ ;\\]+)(?: ; (.*?))? \\$", lines)
        if not marker or Marker(marker).evaluate({"python_full_version": found["python"]})
    }
    version = images.project_version()
    member = "weightsync-operator" if target == "operator" else "weightsync-engine"
    assert installed == locked | {"weightsync-contract": version, member: version}


def test_vllm_finds_the_plugin(image: Callable[[str], Image]) -> None:
    code = (
        "from importlib.metadata import entry_points; import weightsync_engine.guard.middleware;"
        "print([e.value for e in entry_points(group='vllm.general_plugins')])"
    )
    done = image("vllm").run("python3", "-c", code)
    assert (done.stdout.strip(), done.stderr) == ("['weightsync_engine.vllm.plugin:register']", "")


@pytest.mark.parametrize(
    "module", ["weightsync_engine.reference", "weightsync_engine.agent", "weightsync_engine.vllm.plugin"]
)
def test_engines_run_in_vllms_image_with_mounted_packages(
    image: Callable[[str], Image], site: str, module: str
) -> None:
    done = image("vllm").run(*("python3", "-m", module, "--help"), site=f"{site}:{image_build.SITES['vllm']}")
    assert done.returncode == 0, done.stderr


def test_what_is_in_the_cache_is_not_built_again(
    archives: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def kept(target: str) -> image_build.Archive:
        key = archives[target].stem.removeprefix(f"{target}-")
        return image_build.Archive(target, images.project_version(), key)

    # Whoever edits the sources meanwhile makes other archives.
    monkeypatch.setattr(image_build, "archive_of", kept)
    monkeypatch.setattr(image_build, "exclusive", pytest.fail)
    assert image_build.image_archives(images.TARGETS) == archives


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("contract", "engine", "operator", "requirements"):
        shutil.copytree(image_build.ROOT / name, tmp_path / name)
    for name in ("Dockerfile", ".dockerignore", "LICENSE", "NOTICE"):
        shutil.copy(image_build.ROOT / name, tmp_path / name)
    return tmp_path


@pytest.mark.parametrize(
    ("changed", "images_of"),
    [
        ("engine/src/weightsync_engine/boot.py", {"agent", "vllm"}),
        ("operator/pyproject.toml", {"operator"}),
        ("contract/src/weightsync_contract/names.py", {"operator", "agent", "vllm"}),
        ("requirements/agent.txt", {"operator", "agent", "vllm"}),
        ("Dockerfile", {"operator", "agent", "vllm"}),
        ("engine/src/weightsync_engine/__pycache__/boot.pyc", set()),
        ("engine/README.md", set()),
    ],
)
def test_a_changed_source_is_another_image(tree: Path, changed: str, images_of: set[str]) -> None:
    before = {target: image_build.archive_of(target, tree).path for target in images.TARGETS}
    (tree / changed).parent.mkdir(exist_ok=True)
    with (tree / changed).open("a") as file:
        file.write("# another\n")
    after = {target: image_build.archive_of(target, tree).path for target in images.TARGETS}
    assert {target for target in images.TARGETS if after[target] != before[target]} == images_of
