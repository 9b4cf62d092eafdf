"""A page on a terminal (rich), as lines, or as JSON."""

import json
from collections.abc import Sequence
from typing import Any, Final

from rich.console import Console, Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from weightsync_contract.codec import to_document
from weightsync_operator.cli.core.doctor.findings import Finding, Level
from weightsync_operator.cli.core.page import MemberRow, Page, Tone, brief_age, brief_bytes

_STYLES: Final = {Tone.GOOD: "green", Tone.BUSY: "yellow", Tone.BAD: "red", Tone.QUIET: ""}
_STATUS: Final = {"True": "green", "False": "red", "Unknown": "yellow"}
_LEVELS: Final = {
    Level.PROBLEM: "bold red",
    Level.WARNING: "yellow",
    Level.FINE: "green",
    Level.UNKNOWN: "dim",
}
_BAR: Final = 10
_UNKNOWN: Final = "-"


def as_json(value: Any) -> str:
    """A dataclass, or a list of them, as one line."""
    return json.dumps(to_document(value), separators=(", ", ": "))


def page(shown: Page) -> RenderableType:
    """The whole page."""
    parts: list[RenderableType] = [_head(shown), _conditions(shown), Text()]
    parts.append(_members(shown) if shown.members else Text("no pod of this fleet is known", style="dim"))
    if any(row.why for row in shown.members):
        parts += [Text(), _whys(shown)]
    if shown.hint:
        parts += [Text(), Text(f"no live view: {shown.hint}", style="yellow")]
    return Group(*parts)


def overview(pages: Sequence[Page], everywhere: bool) -> RenderableType:
    """One line a WeightSync."""
    columns = ("NAMESPACE",) if everywhere else ()
    table = _table(*columns, "NAME", "READY", "CURRENT", "TARGET", "SYNCED", "PHASE")
    for each in pages:
        cells = [Text(each.namespace)] if everywhere else []
        ready = Text(each.ready, style=_STATUS.get(each.ready, ""))
        rest = (each.current, each.target, each.synced, each.phase)
        table.add_row(*cells, Text(each.name), ready, *(Text(text or _UNKNOWN) for text in rest))
    return table


def line(shown: Page) -> str:
    """What changes in a rollout, in one line: for pipes and logs."""
    moving = [row for row in shown.members if row.total_bytes and row.phase in ("Receiving", "Sending")]
    have, all_ = sum(row.bytes for row in moving), sum(row.total_bytes for row in moving)
    progress = f"  {_decile(have, all_)} %" if moving else ""
    versions = sorted({row.version for row in shown.members if row.role == "inference" and row.version})
    serving = f"  serving {', '.join(versions)}" if versions else ""
    target = f"  target {shown.target}" if shown.target else ""
    synced = f"  synced {shown.synced}" if shown.synced else ""
    return f"{shown.namespace}/{shown.name}  {shown.phase or shown.reason}{progress}{target}{synced}{serving}"


def findings(found: Sequence[Finding]) -> RenderableType:
    """What the doctor found, gravest first, each with what to do."""
    table = Table.grid(padding=(0, 1))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for each in found:
        text = Text.assemble((f"{each.subject}: " if each.subject else "", "bold"), each.message)
        if each.do:
            text.append(f"\n-> {each.do}", style="cyan")
        table.add_row(Text(each.level.upper(), style=_LEVELS[each.level]), text)
    return table


def text_of(shown: RenderableType, width: int = 120) -> str:
    """What a terminal of that width would have, without colours."""
    console = Console(width=width, color_system=None, force_terminal=False)
    with console.capture() as capture:
        console.print(shown)
    return capture.get()


def _decile(have: int, of: int) -> int:
    return 10 * (10 * have // of) if of else 0


def _head(shown: Page) -> Text:
    paused = ("   paused", "yellow") if shown.paused else ""
    epoch = f"   epoch {shown.epoch} ({shown.world_size} ranks)" if shown.epoch else ""
    outcome = f" ({shown.outcome})" if shown.outcome else ""
    return Text.assemble(
        (f"{shown.namespace}/{shown.name}", "bold"),
        f"   fleet {shown.current or _UNKNOWN}   target {shown.target or _UNKNOWN}{outcome}",
        f"   synced {shown.synced or _UNKNOWN}{epoch}",
        paused,
    )


def _conditions(shown: Page) -> Table:
    table = Table.grid(padding=(0, 2))
    for _ in range(3):
        table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for row in shown.conditions:
        status = Text(row.status, style=_STATUS.get(row.status, ""))
        table.add_row(Text(row.type), status, Text(row.reason), Text(row.message, style="dim"))
    if not shown.conditions:
        table.add_row(Text("Ready"), Text(shown.ready), Text(shown.reason), Text(shown.message, style="dim"))
    return table


def _members(shown: Page) -> Table:
    table = _table("POD", "RANK", "VERSION", "PHASE", "BYTES", "AGE")
    for row in shown.members:
        table.add_row(
            Text(row.name + (" *" if row.role == "trainer" else "")),
            Text(_rank(row)),
            Text(row.version or _UNKNOWN),
            Text(row.phase or _UNKNOWN, style=_STYLES[row.tone]),
            _progress(row),
            Text(brief_age(row.age) or _UNKNOWN),
        )
    return table


def _whys(shown: Page) -> Table:
    """Below the table, where a sentence has room on a narrow terminal, too."""
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for row in shown.members:
        if row.why:
            table.add_row(
                Text(row.name, style=_STYLES[row.tone]), Text(row.why.removeprefix(f"{row.name}: "))
            )
    return table


def _rank(row: MemberRow) -> str:
    if row.rank < 0:
        return _UNKNOWN
    return str(row.rank) if row.ranks <= 1 else f"{row.rank}-{row.rank + row.ranks - 1}"


def _progress(row: MemberRow) -> RenderableType:
    if not row.total_bytes:
        return Text(_UNKNOWN)
    grid = Table.grid(padding=(0, 1))
    grid.add_row(
        ProgressBar(total=row.total_bytes, completed=row.bytes, width=_BAR),
        Text(f"{100 * row.bytes // row.total_bytes:3d}% of {brief_bytes(row.total_bytes)}", no_wrap=True),
    )
    return grid


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        table.add_column(column, no_wrap=True)
    return table
