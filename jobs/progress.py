"""The display of a run: a live table on a terminal, one line a while in a log."""

import time
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from pipelines.formatting import format_bytes, format_seconds
from pipelines.run import STAGE_NAMES, PlannedStage, RunObserver, RunResult, StageRow

LOG_EVERY_S = 10.0
SPARKS = "▁▂▃▄▅▆▇█"
STYLES = {"cached": "dim", "run": "green", "resumed": "green", "skipped": "dim", "forced": "green"}


@dataclass
class _Running:
    started: float = field(default_factory=time.monotonic)
    done: int = 0
    total: int = 0
    facts: dict[str, str] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    first: tuple[float, int] | None = None

    def update(self, done: int, total: int, facts: dict[str, str]) -> None:
        self.done, self.total, self.facts = done, total, facts
        # Starting up, and what an earlier run has done, say nothing about the time that is left.
        self.first = self.first or (time.monotonic(), done)
        if "loss" in facts:
            self.losses.append(float(facts["loss"]))

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self.started

    @property
    def eta_s(self) -> float | None:
        if self.first is None or not self.first[1] < self.done < self.total:
            return None
        since, done = self.first
        return (time.monotonic() - since) / (self.done - done) * (self.total - self.done)


class Display(RunObserver):
    """Draws a run while it goes on. Use as a context manager around `run`."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.finished: dict[str, StageRow] = {}
        self.running: dict[str, _Running] = {}
        self.logged = 0.0
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
        self._log(f"{planned.stage.name}: {'goes on' if planned.state == 'resumed' else 'starts'} (key {planned.key})")

    def progress(self, name: str, done: int, total: int, **facts: str) -> None:
        self.running[name].update(done, total, facts)
        if time.monotonic() - self.logged > LOG_EVERY_S:
            shown = "  ".join(f"{key} {value}" for key, value in facts.items())
            self._log(f"{name}: {done:,} of {total:,}  {shown}")

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
        return Group(table, *(Text(_sparkline(r.losses), "cyan") for r in self.running.values() if len(r.losses) > 1))


def _bar(state: _Running) -> list[RenderableType]:
    facts = "  ".join(f"{key} {value}" for key, value in state.facts.items())
    eta = f"  {format_seconds(state.eta_s)} left" if state.eta_s is not None else ""
    return [
        ProgressBar(total=state.total or None, completed=state.done, width=30, pulse=not state.total),
        Text(f"{state.done:,}/{state.total:,}  {facts}{eta}" if state.total else format_seconds(state.elapsed_s)),
    ]


def _sparkline(values: list[float], width: int = 60) -> str:
    """The loss so far as one line of blocks, averaged into at most `width` columns."""
    size = max(1, -(-len(values) // width))
    means = [sum(chunk) / len(chunk) for i in range(0, len(values), size) if (chunk := values[i : i + size])]
    low, high = min(means), max(means)
    span = (high - low) or 1.0
    bars = "".join(SPARKS[int((value - low) / span * (len(SPARKS) - 1))] for value in means)
    return f"   loss {means[0]:.4f} {bars} {means[-1]:.4f}"


def stage_table(result: RunResult) -> Table:
    """What each stage came to: state, rows, bytes, seconds, rate."""
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
        rate = f"{row.rows / row.seconds:,.0f} rows/s" if row.rows and row.seconds > 0.05 else ""
        cells: list[Any] = [
            row.name,
            Text(row.state, STYLES[row.state]),
            row.key,
            f"{row.rows:,}" if row.rows else "",
        ]
        table.add_row(*cells, format_bytes(row.bytes) if row.bytes else "", f"{row.seconds:,.1f}", rate)
    return table
