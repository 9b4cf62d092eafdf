"""The table of values in the chart's README, made from values.yaml: ``python tests/support/chart_values.py``."""

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

CHART = Path(__file__).parents[2] / "charts" / "weightsync"
_LINE = re.compile(r"(?P<indent> *)(?P<key>\w+):(?: (?P<value>.*))?")


@dataclass(frozen=True)
class Value:
    """A value by its path; ``default`` as it is written; ``text``: the comment above it."""

    path: str
    default: str
    text: str


def values(source: str) -> Iterator[Value]:
    """Every value that has no others below it, in the file's order."""
    comment: list[str] = []
    above: list[tuple[int, str, str]] = []
    for line in source.splitlines():
        if line.strip().startswith("#"):
            comment.append(line.strip().removeprefix("#").strip())
            continue
        found = _LINE.fullmatch(line)
        if found is None:
            comment = []
            continue
        indent = len(found["indent"])
        above = [each for each in above if each[0] < indent]
        text, comment = " ".join(comment), []
        path = ".".join([*(key for _, key, _ in above), found["key"]])
        if found["value"] is None:
            above.append((indent, found["key"], text))
        else:
            # Of what is said of a group, its first value tells.
            group = " ".join(each for _, _, each in above if each)
            above = [(depth, key, "") for depth, key, _ in above]
            yield Value(path, found["value"], " ".join(each for each in (group, text) if each))


def markdown(source: str) -> str:
    """A table, one row a value."""
    lines = ["| value | default | |", "|---|---|---|"]
    for each in values(source):
        text = each.text.replace("|", "\\|").replace("<", "&lt;")
        lines.append(f"| `{each.path}` | `{each.default}` | {text} |")
    return "\n".join(lines) + "\n"


def leaves(document: object, path: str = "") -> dict[str, object]:
    """Paths of values.yaml as YAML reads it; a map that is written in one line is one value."""
    if not isinstance(document, dict) or not document:
        return {path: document}
    found: dict[str, object] = {}
    for key, value in document.items():
        found |= leaves(value, f"{path}.{key}" if path else key)
    return found


if __name__ == "__main__":
    text = (CHART / "values.yaml").read_text()
    assert yaml.safe_load(text)
    sys.stdout.write(markdown(text))
