"""`ldm inspect` of pairs: what a person sees, and what a script gets."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from pipelines.stages.pairs.summary.view import view

FACTS: dict[str, Any] = {
    "kind": "artifact",
    "key": "0123456789abcdef",
    "url": "runs/demo/pairs/0123456789abcdef",
    "shards": 12,
    "first_samples": [{"key": "000000000", "captions": ["[red]a cat[/red]\x1b[2J\r\n\x9b\u202e日本"]}],
    "details": {
        "samples": 750,
        "input_rows": 1000,
        "image_size": 256,
        "bytes": 750 * 2048,
        "bytes_per_sample": 2048,
        "statuses": {"http_404": 150, "ok": 750, "timeout": 99, "decode_error": 1},
        "source_size": {"edges": [0, 64, 128, 256, 512], "counts": [0, 0, 500, 0, 250]},
        "buckets": {"256x256": 600, "320x192": 150},
        "hosts": [{"host": "a.example\x07", "rows": 800, "ok": 0.875, "failure": "http_404"}],
        "hosts_exact": False,
    },
}


def shown(facts: dict[str, Any], width: int = 80) -> list[str]:
    stream = io.StringIO()
    Console(file=stream, width=width, highlight=False).print(view(facts))
    return stream.getvalue().splitlines()


def find(lines: list[str], start: str) -> str:
    return next(joined for line in lines if (joined := " ".join(line.split())).startswith(start))


def test_counts_histograms_hosts_and_samples_are_readable() -> None:
    lines = shown(FACTS)
    assert find(lines, "750") == "750 samples of 1,000 input rows in 12 shards of 256 px"
    assert "1.5 MiB, 2.0 KiB a sample" in [line.strip() for line in lines]
    statuses = [" ".join(line.split()[:4]) for line in lines[6:10]]
    assert statuses == ["ok 750 75.0 %", "http_404 150 15.0 %", "timeout 99 9.9 %", "decode_error 1 0.1 %"]
    assert [line.count("█") for line in lines[6:10]] == [18, 3, 2, 0]
    assert lines[9].rstrip().endswith("▏"), "one row of a thousand is seen"
    assert find(lines, "128 – 256") == "128 – 256 500 " + "█" * 24
    assert find(lines, "256 – 512") == "256 – 512 0"
    assert find(lines, "512 and more") == "512 and more 250 " + "█" * 12
    assert not [line for line in lines if "64 – 128" in line]
    assert find(lines, "320x192").startswith("320x192 150 20.0 %")
    assert find(lines, "host rows") == "host rows (about) ok most frequent failure"
    assert find(lines, "a.example") == "a.example\ufffd 800 87.5 % http_404"
    assert find(lines, "000000000") == "000000000 [red]a cat[/red]\ufffd[2J \ufffd\ufffd日本"


@pytest.mark.parametrize("width", [40, 80, 100, 200])
def test_no_line_is_longer_than_the_terminal(width: int) -> None:
    assert max(map(len, shown(FACTS, width))) <= width


def test_an_unfinished_artifact_says_how_far_it_is() -> None:
    details = {
        "shards": {"committed": 3, "made": 2000, "planned": 4000},
        "planned_rows": 4_000_000,
        "tables_read": 1002,
    }
    facts = {**FACTS, "kind": "unfinished", "details": FACTS["details"] | details}
    lines = shown(facts)
    assert lines[0].strip() == "pairs 0123456789abcdef, not finished"
    assert "3 of 4,000 shards committed, 2,000 more made" in lines[2]
    assert "750 samples of 1,000 rows (4,000,000 are planned)" in lines[3]
    assert "counted in 1,002 of these shards, evenly chosen" in lines[4]
