"""The display of a run: what a log says, and how long it says is left."""

import io
import time
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from jobs.progress import Display, _Running, stage_table
from pipelines.run.results import RunResult, StageRow


def test_the_time_left_leaves_out_the_start_and_what_an_earlier_run_has_done(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    state = _Running()
    assert state.eta_s is None
    now[0] = 100.0
    state.update(500, 1000, {})
    assert state.eta_s is None
    now[0] = 110.0
    state.update(600, 1000, {"loss": "0.5"})
    assert state.eta_s == pytest.approx(40.0)
    assert state.losses == [0.5]


def test_the_time_left_follows_the_pace_of_the_last_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    state = _Running()
    done = 1000
    for second in range(800):
        # Half a minute in which workers start, a minute at a hundred a second, the rest at ten.
        done += 0 if second < 30 else 100 if second < 90 else 10
        state.update(done, 100_000, {})
        if second == 60:
            assert state.eta_s == pytest.approx((100_000 - done) / 100, rel=0.05)
        now[0] += 1
    assert state.eta_s == pytest.approx((100_000 - done) / 10, rel=0.05)


FACTS = {"rows/s": "1,234", "MB/s": "45.6", "ok": "83.1 %", "filtered:aesthetic_score": "11.2 %", "http_404": "3.3 %"}


def watched(display: Display, monkeypatch: pytest.MonkeyPatch, facts: dict[str, str]) -> None:
    """Half a minute of a stage that does ten rows a second."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    planned: Any = SimpleNamespace(stage=SimpleNamespace(name="pairs"), state="run", key="0" * 16)
    display.begin(planned)
    for second in range(1, 31):
        now[0] += 1
        display.progress("pairs", 10 * second, 413_871_000, **facts)


def test_a_terminal_of_a_hundred_columns_shows_it_all_on_lines_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    console = Console(file=stream, width=100, force_terminal=True, color_system=None)
    display = Display(console)
    watched(display, monkeypatch, FACTS | {"connection_error": "1.2 %", "not_an_image": "0.8 %"})
    console.print(display._draw())
    lines = stream.getvalue().splitlines()
    assert len(lines) == 7, "a line a stage, and one of facts"
    assert max(map(len, lines)) <= 100
    assert "300/413,871,000  11496 h 24 min left" in lines[0]
    assert lines[-1].startswith("  rows/s 1,234  MB/s 45.6  ok 83.1 %  filtered:aesthetic_score 11.2 %")
    assert lines[-1].rstrip().endswith("…")


def test_a_log_gets_a_line_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    watched(Display(Console(file=stream, width=300)), monkeypatch, FACTS)
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


def test_a_terminal_shows_the_loss_so_far() -> None:
    stream = io.StringIO()
    planned: Any = SimpleNamespace(stage=SimpleNamespace(name="diffusion"), state="run", key="0" * 16)
    with Display(Console(file=stream, width=100, force_terminal=True, color_system=None)) as display:
        display.begin(planned)
        for step, loss in enumerate(("1.0", "0.5", "nan", "0.0"), start=1):
            display.progress("diffusion", step, 4, loss=loss)
    assert "loss 1.0000 █▄▁ 0.0000" in stream.getvalue()
