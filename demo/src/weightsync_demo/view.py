"""What the demo shows: a live table on a terminal, lines elsewhere."""

import sys
import time
from collections import deque
from types import TracebackType
from typing import Final, Protocol, Self

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from weightsync_contract.fleetview import FleetView, MemberView
from weightsync_contract.messages import ServingState

_LOG_LINES: Final = 14
_STATES: Final = {
    ServingState.SERVING: "green",
    ServingState.APPLYING: "yellow",
    ServingState.FENCED: "red",
    ServingState.UNREACHABLE: "red",
}


class View(Protocol):
    """Where the demo tells what happens. Callable from any thread."""

    def say(self, text: str) -> None:
        """One event, kept in sight for a while."""

    def fleet(self, view: FleetView) -> None:
        """The fleet as it is now."""

    def answer(self, name: str, text: str, equal: bool) -> None:
        """What a server answered, and whether the trainer's own weights answer the same."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None: ...


def brief(nbytes: int) -> str:
    """Bytes for people."""
    return f"{nbytes / 2**20:.0f} MiB"


def serves(member: MemberView) -> str:
    """The version in the engine, or why there is none."""
    serving = member.serving
    if serving is None:
        return "-"
    if serving.version is None or serving.state is not ServingState.SERVING:
        return str(serving.state)
    return f"v{serving.version.version}"


class PlainView:
    """Lines on standard error: for pipes, logs and --json."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._shown: dict[str, str] = {}

    def say(self, text: str) -> None:
        """One line with the seconds since the start."""
        print(f"{time.monotonic() - self._began:7.1f} s  {text}", file=sys.stderr, flush=True)

    def fleet(self, view: FleetView) -> None:
        """A line for each pod that changed its state, or moved a quarter of its bytes."""
        for member in view.members:
            transfer = member.transfer
            quarter = 25 * (4 * transfer.bytes // transfer.total_bytes) if transfer.total_bytes else 0
            place = f"epoch {view.epoch} rank {member.rank:2d}"
            line = f"{place}  {transfer.state:<9} {quarter:3d} %  {serves(member)}"
            if not member.connected:
                line = "agent not connected"
            if self._shown.get(member.name) != line:
                self._shown[member.name] = line
                self.say(f"    {member.name:<10} {line}")

    def answer(self, name: str, text: str, equal: bool) -> None:
        """One line."""
        self.say(f"    {name:<10} answers {text!r}: {'equal' if equal else 'NOT EQUAL'}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        return None


class LiveView:
    """A table that stays in place, with the last events under it."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._log: deque[str] = deque(maxlen=_LOG_LINES)
        self._fleet: FleetView | None = None
        self._answers: dict[str, tuple[str, bool]] = {}
        self._live = Live(console=Console(stderr=True), get_renderable=self._render, refresh_per_second=8)

    def say(self, text: str) -> None:
        """Append to the events."""
        self._log.append(f"{time.monotonic() - self._began:6.1f} s  {text}")

    def fleet(self, view: FleetView) -> None:
        """Redraw with this."""
        self._fleet = view

    def answer(self, name: str, text: str, equal: bool) -> None:
        """Show it in the pod's row."""
        self._answers[name] = (text, equal)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        self._live.stop()

    def _render(self) -> Group:
        events = Panel(Text("\n".join(self._log)), title="events", title_align="left", border_style="dim")
        return Group(self._table(), events) if self._fleet else Group(events)

    def _table(self) -> Table:
        view = self._fleet
        assert view is not None, "drawn only once there is a fleet"
        target = f"v{view.target.version}" if view.target else "none"
        current = f"v{view.current.version}" if view.current else "none"
        where = f"{view.namespace}/{view.name}   epoch {view.epoch}   {view.phase}"
        title = f"{where}   target {target}   fleet {current}"
        table = Table(
            title=title, title_justify="left", expand=True, caption=view.message, caption_justify="left"
        )
        for column in ("pod", "rank", "group", "bytes", "serves", "answer"):
            table.add_column(column, no_wrap=True, ratio={"bytes": 2, "answer": 2}.get(column, 1))
        for member in view.members:
            table.add_row(*self._row(member))
        return table

    def _row(self, member: MemberView) -> list[str | Text | Table]:
        transfer, serving = member.transfer, member.serving
        progress = Table.grid(expand=True)
        progress.add_row(
            ProgressBar(total=max(transfer.total_bytes, 1), completed=transfer.bytes),
            f" {brief(transfer.bytes)}" if transfer.total_bytes else "",
        )
        text, equal = self._answers.get(member.name, ("", True))
        state = Text(serves(member), style=_STATES.get(serving.state, "") if serving else "dim")
        return [
            Text(member.name, style="" if member.connected else "red"),
            str(member.rank) if member.rank >= 0 else "-",
            Text(str(transfer.state), style="red" if transfer.failure else ""),
            progress,
            state,
            Text(text, style="green" if equal else "bold red"),
        ]
