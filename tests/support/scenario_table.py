"""The table of what scenarios measured: one row each, written when the run ends."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pod_fleet import Scene

COLUMNS = {
    "engine": "engine",
    "scenario": "scenario",
    "event": "what happened",
    "when": "when",
    "seconds": "seconds until all served the right version",
    "right": "right answers",
    "across": "across a commit",
    "unanswered_by_touched": "unanswered by those it happened to",
    "unanswered_by_others": "unanswered by others",
    "wrong": "wrong",
}

MARK = "<!-- written by"


@dataclass
class Table:
    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(self, scene: Scene) -> None:
        self.rows.append(scene.row())

    def markdown(self) -> str:
        lines = [list(COLUMNS.values()), ["---"] * len(COLUMNS)]
        lines += [[str(row[name]) for name in COLUMNS] for row in self.rows]
        return "".join(f"| {' | '.join(line)} |\n" for line in lines)

    def write(self, path: Path) -> None:
        """As JSON; into Markdown after its line that says who writes it, in the place of what was there."""
        if path.suffix != ".md":
            path.write_text(json.dumps(self.rows, indent=1) + "\n")
            return
        if not path.exists():
            path.write_text(self.markdown())
            return
        head, mark, rest = path.read_text().partition(MARK)
        assert mark, f"{path} has no line that begins with {MARK!r}"
        path.write_text(f"{head}{mark}{rest.splitlines()[0]}\n\n{self.markdown()}")
