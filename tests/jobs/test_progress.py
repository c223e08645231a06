"""The display of a run: what a log says, and how long it says is left."""

import io
import re
import time
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from jobs.progress import Display, stage_table
from pipelines.run.results import RunResult, StageRow


class Clock:
    """The time that a display sees, in seconds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


class Terminal:
    """A display on a terminal of a hundred columns, and what is to be seen of it."""

    def __init__(self) -> None:
        self.display = Display(Console(file=io.StringIO(), width=100, force_terminal=True, color_system=None))
        begin(self.display)

    def lines(self) -> list[str]:
        stream = io.StringIO()
        console = Console(file=stream, width=100, force_terminal=True, color_system=None)
        console.print(self.display.live.get_renderable())
        return stream.getvalue().splitlines()

    def seconds_left(self) -> float | None:
        """Return the time left as the line of the running stage says it; None if it says nothing."""
        if not (found := re.search(r"(?:(\d+) h )?(?:(\d+) min )?(?:([\d.]+) s )?left", self.lines()[0])):
            return None
        hours, minutes, seconds = (float(part or 0) for part in found.groups())
        return 3600 * hours + 60 * minutes + seconds


def begin(display: Display) -> None:
    planned: Any = SimpleNamespace(stage=SimpleNamespace(name="pairs"), state="run", key="0" * 16)
    display.begin(planned)


def test_the_time_left_leaves_out_the_start_and_what_an_earlier_run_has_done(clock: Clock) -> None:
    terminal = Terminal()
    assert terminal.seconds_left() is None
    clock.now += 100
    terminal.display.progress("pairs", 500, 1000)
    assert terminal.seconds_left() is None
    clock.now += 10
    terminal.display.progress("pairs", 600, 1000)
    assert terminal.seconds_left() == pytest.approx(40.0)


def test_the_time_left_follows_the_pace_of_the_last_minutes(clock: Clock) -> None:
    terminal = Terminal()
    done = 1000
    for second in range(800):
        # Half a minute in which workers start, a minute at a hundred a second, the rest at ten.
        done += 0 if second < 30 else 100 if second < 90 else 10
        terminal.display.progress("pairs", done, 100_000)
        if second == 60:
            assert terminal.seconds_left() == pytest.approx((100_000 - done) / 100, rel=0.05)
        clock.now += 1
    assert terminal.seconds_left() == pytest.approx((100_000 - done) / 10, rel=0.05)


FACTS = {"rows/s": "1,234", "MB/s": "45.6", "ok": "83.1 %", "filtered:aesthetic_score": "11.2 %", "http_404": "3.3 %"}


def watch(display: Display, clock: Clock, facts: dict[str, str]) -> None:
    """Half a minute of a stage that does ten rows a second."""
    for second in range(1, 31):
        clock.now += 1
        display.progress("pairs", 10 * second, 413_871_000, **facts)


def test_a_terminal_of_a_hundred_columns_shows_it_all_on_lines_that_fit(clock: Clock) -> None:
    terminal = Terminal()
    watch(terminal.display, clock, FACTS | {"connection_error": "1.2 %", "not_an_image": "0.8 %"})
    lines = terminal.lines()
    assert len(lines) == 7, "a line a stage, and one of facts"
    assert max(map(len, lines)) <= 100
    assert "300/413,871,000  11496 h 24 min left" in lines[0]
    assert lines[-1].startswith("  rows/s 1,234  MB/s 45.6  ok 83.1 %  filtered:aesthetic_score 11.2 %")
    assert lines[-1].rstrip().endswith("…")


def test_a_log_gets_a_line_a_while(clock: Clock) -> None:
    stream = io.StringIO()
    display = Display(Console(file=stream, width=300))
    begin(display)
    watch(display, clock, FACTS)
    lines = stream.getvalue().splitlines()[1:]
    assert len(lines) == 2
    assert lines[0].startswith(
        "pairs: 110 of 413,871,000  rows/s 1,234  MB/s 45.6  ok 83.1 %  filtered:aesthetic_score"
    )
    assert lines[0].endswith("min left")


def test_a_log_gets_one_line_a_stage() -> None:
    stream = io.StringIO()
    with Display(Console(file=stream, width=120)) as display:
        display.end(StageRow("pairs", "run", "0" * 16, rows=4032, bytes=2**20, seconds=61))
    assert stream.getvalue() == "pairs: run  4,032 rows  1.0 MiB  1 min 01 s\n"


def test_the_rate_counts_what_was_worked_on_and_not_the_samples_that_came_of_it() -> None:
    rows = [
        StageRow("pairs", "run", "0" * 16, rows=250, seconds=8.6, worked=5_688, unit="rows"),
        StageRow("diffusion", "resumed", "0" * 16, seconds=100, worked=250, unit="steps"),
        StageRow("latents", "cached", "0" * 16, rows=250, seconds=0, unit="rows"),
        StageRow("export", "run", "0" * 16, seconds=3, worked=4),
    ]
    stream = io.StringIO()
    Console(file=stream, width=120).print(stage_table(RunResult("runs/x", rows, {})))
    assert [line.split("  ")[-1].strip() for line in stream.getvalue().splitlines()[1:]] == [
        "661 rows/s",
        "2.5 steps/s",
        "",
        "",
    ]


def test_the_sparkline_falls_with_the_loss(clock: Clock) -> None:
    terminal = Terminal()
    for step, loss in enumerate(["1.0", "0.75", "0.5", "nan", "0.25", "0.0"]):
        terminal.display.progress("pairs", step, 6, loss=loss)
    assert terminal.lines()[-1].split() == ["loss", "1.0000", "█▆▄▂▁", "0.0000"]
