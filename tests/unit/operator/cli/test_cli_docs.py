"""Pages say what the command line is: every command on them is one, and their tables are the code's."""

import re
import shlex
from pathlib import Path

import pytest

from weightsync_operator.cli.arguments import make_parser
from weightsync_operator.cli.core.exits import MEANINGS
from weightsync_operator.cli.core.verbs import Verb
from weightsync_operator.cli.main import _options

ROOT = Path(__file__).parents[4]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "charts").rglob("*.md"))]
COMMAND = re.compile(r"(?:^|`|\()(?:kubectl )?(weightsync (?:[a-z][^`\n#)|>]*))", re.MULTILINE)


def commands(page: Path) -> list[list[str]]:
    """Every command of ours in a block or between backquotes."""
    text = page.read_text()
    blocks = re.findall(r"^```\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    spans = re.findall(r"`((?:kubectl )?weightsync [^`\n]+)`", text)
    found = [match for part in (*blocks, *spans) for match in COMMAND.findall(part)]
    return [shlex.split(each)[1:] for each in found]


CASES = [(page, words) for page in PAGES for words in commands(page)]


@pytest.mark.parametrize(
    ("page", "words"), CASES, ids=lambda case: " ".join(case) if isinstance(case, list) else case.name
)
def test_what_a_page_calls_is_a_command(page: Path, words: list[str]) -> None:
    given = make_parser("weightsync").parse_args(words)
    assert given.command


def test_the_pages_show_every_command() -> None:
    shown = {words[0] for _, words in CASES}
    assert set(_options(make_parser("weightsync"))) <= shown


def test_the_table_of_exit_codes_is_the_codes() -> None:
    page = (ROOT / "docs/cli.md").read_text()
    section = page.split("## Exit codes")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (\d+) \| (.+) \|$", section, re.MULTILINE)
    assert rows == [(str(code.value), meaning) for code, meaning in MEANINGS.items()]


def test_the_page_says_what_each_verb_writes() -> None:
    page = (ROOT / "docs/cli.md").read_text()
    rows = re.findall(r"^\| ([a-z, ]+) \| (?:`|the annotation)", page, re.MULTILINE)
    assert {verb for row in rows for verb in row.split(", ")} == set(Verb)
