"""README, docs, Makefile, CRD and code say the same."""

import re
from pathlib import Path

import pytest
import yaml

from weightsync_contract.reasons import Condition
from weightsync_demo import __main__ as demo
from weightsync_operator.core.spec import parse_spec

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_within_the_project_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_make_target_that_is_named_exists(page: Path) -> None:
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"`make ([a-z0-9-]+)", page.read_text())) | set(
        re.findall(r"^make ([a-z0-9-]+)", page.read_text(), re.MULTILINE)
    )
    assert named <= targets


def test_the_first_two_commands_are_the_demo_and_the_tests() -> None:
    assert re.findall(r"^make (\w+)$", README, re.MULTILINE)[:2] == ["demo", "test"]


def test_no_figure_is_left_to_be_filled_in() -> None:
    for page in PAGES:
        assert not re.findall(r"@\w+@|\bTODO\b|\bTBD\b", page.read_text()), page


def test_every_decision_is_in_the_list_of_decisions() -> None:
    listed = (ROOT / "docs/adr/README.md").read_text()
    for record in (ROOT / "docs/adr").glob("0*.md"):
        assert f"({record.name})" in listed
        assert record.read_text().startswith(f"# {record.name[:4]}: ")


def test_the_test_command_is_what_ci_runs() -> None:
    assert "make test" in README
    assert "make test" in (ROOT / ".ci/run").read_text()


def test_the_example_asks_for_nothing_that_is_not_there_yet() -> None:
    document = yaml.safe_load((ROOT / "examples/weightsync.yaml").read_text())
    assert parse_spec(document["spec"]).unsupported == ()


def test_flags_that_the_readme_names_are_flags() -> None:
    operator = (ROOT / "operator/src/weightsync_operator/settings.py").read_text()
    commands = re.findall(r"python -m weightsync_operator([^`\n]*)", README)
    assert commands
    for flag in re.findall(r"(?<=\s)--[a-z-]+", " ".join(commands)):
        assert f'"{flag}"' in operator, flag
    demos = demo._parse([])
    for flag in re.findall(r"ARGS=\"?(--[a-z-]+)", README):
        assert hasattr(demos, flag.removeprefix("--").replace("-", "_")), flag


def test_the_columns_of_the_crd_read_conditions_that_exist() -> None:
    crd = yaml.safe_load((ROOT / "crds/weightsync.yaml").read_text())
    columns = crd["spec"]["versions"][0]["additionalPrinterColumns"]
    named = set(re.findall(r'@\.type=="(\w+)"', str(columns)))
    assert named
    assert named <= {condition.value for condition in Condition}


def test_what_the_readme_installs_and_applies_is_there() -> None:
    named = re.findall(r"helm install \S+ (\S+)|kubectl apply -f (\S+?)[`\s]", README)
    assert len(named) >= 4
    for path in (path for pair in named for path in pair if path):
        assert (ROOT / path).exists(), path
