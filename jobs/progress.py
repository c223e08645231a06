"""The display of a run: a live table on a terminal, or a line every ten seconds in a log."""

import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from pipelines.drawing.formatting import format_bytes, format_seconds, sparkline
from pipelines.run.plan import STAGE_NAMES, PlannedStage
from pipelines.run.results import RunObserver, RunResult, StageRow

LOG_EVERY_S = 10.0
ETA_WINDOW_S = 120.0
REMEMBER_EVERY_S = 0.5
STYLES = {"cached": "dim", "run": "green", "resumed": "green", "retried": "green", "skipped": "dim"}


@dataclass
class _Running:
    started: float = field(default_factory=time.monotonic)
    done: int = 0
    total: int = 0
    facts: dict[str, str] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    recent: deque[tuple[float, int]] = field(default_factory=deque)

    def update(self, done: int, total: int, facts: dict[str, str]) -> None:
        self.done, self.total, self.facts = done, total, facts
        self._remember(time.monotonic(), done)
        if "loss" in facts:
            self.losses.append(float(facts["loss"]))

    def _remember(self, now: float, done: int) -> None:
        recent = self.recent
        if recent and now - recent[-1][0] < REMEMBER_EVERY_S:
            return
        recent.append((now, done))
        # Neither start-up nor what an earlier run has done says anything about the time left.
        while len(recent) > 2 and (now - recent[1][0] >= ETA_WINDOW_S or recent[0][1] == recent[1][1]):
            recent.popleft()

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self.started

    @property
    def eta_s(self) -> float | None:
        """Seconds left at the pace of the last two minutes; None while no pace is known."""
        if not self.recent or not self.recent[0][1] < self.done < self.total:
            return None
        since, before = self.recent[0]
        return (time.monotonic() - since) / (self.done - before) * (self.total - self.done)

    @property
    def facts_line(self) -> str:
        return "  ".join(f"{key} {value}" for key, value in self.facts.items())

    @property
    def left(self) -> str:
        return f"{format_seconds(self.eta_s)} left" if self.eta_s is not None else ""


class Display(RunObserver):
    """Draws a run while it goes on. Use as a context manager around `run`."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.finished: dict[str, StageRow] = {}
        self.running: dict[str, _Running] = {}
        self.logged = 0.0
        self.waits_for = ""
        self.live = Live(console=console, get_renderable=self._draw, refresh_per_second=4, transient=True)

    def __enter__(self) -> "Display":
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.console.is_terminal:
            self.live.stop()

    def begin(self, planned: PlannedStage) -> None:
        self.running[planned.stage.name] = _Running()
        self._log(
            f"{planned.stage.name}: {'continues' if planned.state == 'resumed' else 'starts'} (key {planned.key})"
        )

    def waiting(self, planned: PlannedStage, holder: str, **progress: Any) -> None:
        name = planned.stage.name
        state = self.running.setdefault(name, _Running())
        how_far = f"{progress['done']:,} of {progress['total']:,}" if progress.get("total") else "it has just begun"
        state.update(progress.get("done", 0), progress.get("total", 0), {"waits for": f"{holder}: {how_far}"})
        if self.waits_for != holder or time.monotonic() - self.logged > LOG_EVERY_S:
            self._log(f"{name}: {planned.key} is being made by {holder}: {how_far}; waiting (--no-wait refuses)")
        self.waits_for = holder

    def progress(self, name: str, done: int, total: int, **facts: str) -> None:
        state = self.running[name]
        state.update(done, total, facts)
        if time.monotonic() - self.logged > LOG_EVERY_S:
            self._log("  ".join(filter(None, (f"{name}: {done:,} of {total:,}", state.facts_line, state.left))))

    def notice(self, line: str) -> None:
        # Above the live table, which is drawn again below it.
        self.console.print(line, style="yellow")

    def end(self, row: StageRow) -> None:
        self.running.pop(row.name, None)
        self.finished[row.name] = row
        self._log(
            f"{row.name}: {row.state}  {row.rows:,} rows  {format_bytes(row.bytes)}  {format_seconds(row.seconds)}"
        )

    def _log(self, line: str) -> None:
        self.logged = time.monotonic()
        if not self.console.is_terminal:
            self.console.print(line)

    def _draw(self) -> RenderableType:
        table = Table.grid(padding=(0, 2))
        for name in STAGE_NAMES:
            if name in self.finished:
                row = self.finished[name]
                table.add_row(Text("✓", "green"), name, Text(row.state, STYLES[row.state]), format_seconds(row.seconds))
            elif name in self.running:
                table.add_row(Text("▶", "bold cyan"), Text(name, "bold"), *_bar(self.running[name]))
            else:
                table.add_row(Text("·", "dim"), Text(name, "dim"))
        below = [_line(f"  {state.facts_line}") for state in self.running.values() if state.facts]
        sparks = [
            _line(f"   loss {sparkline(state.losses)}", "cyan")
            for state in self.running.values()
            if len(state.losses) > 1
        ]
        return Group(table, *below, *sparks)


def _line(text: str, style: str = "") -> Text:
    # Cut off rather than wrapped: a live display that wraps jumps.
    return Text(text, style, no_wrap=True, overflow="ellipsis")


def _bar(state: _Running) -> list[RenderableType]:
    counts = f"{state.done:,}/{state.total:,}  {state.left}" if state.total else format_seconds(state.elapsed_s)
    return [
        ProgressBar(total=state.total or None, completed=state.done, width=30, pulse=not state.total),
        _line(counts),
    ]


def stage_table(result: RunResult) -> Table:
    """Return the table of stages: state, rows, bytes, seconds and rate of each."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading, justify in (
        ("stage", "left"),
        ("state", "left"),
        ("key", "left"),
        ("rows", "right"),
        ("bytes", "right"),
    ):
        table.add_column(heading, justify=justify)  # type: ignore[arg-type]
    table.add_column("seconds", justify="right")
    table.add_column("rate", justify="right")
    for row in result.rows:
        cells: list[Any] = [
            row.name,
            Text(row.state, STYLES[row.state]),
            row.key,
            f"{row.rows:,}" if row.rows else "",
        ]
        table.add_row(*cells, format_bytes(row.bytes) if row.bytes else "", f"{row.seconds:,.1f}", _rate(row))
    return table


def _rate(row: StageRow) -> str:
    """Return what this run worked on a second: rows of a source, not the samples that came of them."""
    if not (row.unit and row.worked and row.seconds > 0.05):
        return ""
    rate = row.worked / row.seconds
    return f"{rate:,.0f} {row.unit}/s" if rate >= 10 else f"{rate:.1f} {row.unit}/s"
