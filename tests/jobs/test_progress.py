"""The display of a run: what a log says, and how long it says is left."""

import io
import time

import pytest
from rich.console import Console

from jobs.progress import Display, _Running, _sparkline
from pipelines.run import StageRow


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


def test_a_log_gets_one_line_a_stage() -> None:
    stream = io.StringIO()
    with Display(Console(file=stream, width=120)) as display:
        display.end(StageRow("pairs", "run", "0" * 16, rows=4032, bytes=2**20, seconds=61))
    assert stream.getvalue() == "pairs: run  4,032 rows  1.0 MiB  1 min 01 s\n"


def test_the_sparkline_falls_with_the_loss() -> None:
    line = _sparkline([1.0, 0.75, 0.5, 0.25, 0.0])
    assert line.split() == ["loss", "1.0000", "█▆▄▂▁", "0.0000"]
