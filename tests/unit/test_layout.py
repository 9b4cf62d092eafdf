"""The tree keeps to rules that no linter knows."""

import ast
import sys
import tomllib
from pathlib import Path

import pytest

import setup_env

ROOT = Path(__file__).parents[2]
TREES = ("contract", "engine", "operator", "demo", "scripts", "tests", "benchmarks", "examples")
LONGEST = 500
# A table of cases is read by the row.
LONGEST_TEST = 550
MODULES = sorted(path for tree in TREES for path in (ROOT / tree).rglob("*.py"))


def shown(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_nothing_shadows_the_standard_librarys_operator() -> None:
    # With one of these, `python -m anything` from the root dies in collections.
    assert not (ROOT / "operator" / "__init__.py").exists()
    assert not (ROOT / "operator.py").exists()


def test_tests_are_no_packages() -> None:
    # An __init__.py below tests/ but not in it breaks pytest's importlib mode.
    assert [shown(path) for path in (ROOT / "tests").rglob("__init__.py")] == []


def test_no_module_is_too_long() -> None:
    lengths = {shown(path): len(path.read_text().splitlines()) for path in MODULES}
    limits = {name: LONGEST_TEST if name.startswith("tests/") else LONGEST for name in lengths}
    assert {name: length for name, length in lengths.items() if length > limits[name]} == {}


def imported(path: Path) -> set[str]:
    """Top-level names of the modules that a file imports by their full name."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.partition(".")[0])
    return names


@pytest.mark.parametrize(
    ("tree", "own"),
    [
        ("contract/src", {"weightsync_contract"}),
        ("scripts", {path.stem for path in (ROOT / "scripts").glob("*.py")}),
    ],
)
def test_only_the_standard_library_is_needed(tree: str, own: set[str]) -> None:
    # The contract is in every pod; the scripts run before anything is installed.
    foreign = {
        shown(path): names
        for path in (ROOT / tree).rglob("*.py")
        if (names := imported(path) - sys.stdlib_module_names - own)
    }
    assert foreign == {}


def test_every_package_says_that_it_is_typed() -> None:
    packages = [path for member in setup_env.MEMBERS for path in (ROOT / member / "src").glob("weightsync_*")]
    assert [shown(path) for path in packages if not (path / "py.typed").exists()] == []


def test_the_setup_installs_the_members_of_the_workspace() -> None:
    root = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert tuple(root["tool"]["uv"]["workspace"]["members"]) == setup_env.MEMBERS


def test_locks_name_no_address() -> None:
    texts = {path.name: path.read_text() for path in (ROOT / "requirements").iterdir()}
    assert [name for name, text in texts.items() if "://" in text or "--index" in text] == []
