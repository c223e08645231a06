"""The benchmark of latents says what it measured. Speed is asserted nowhere."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.benchmarks import bench_latents
from tests.benchmarks.latents_data import numbers_of, sample


def test_quality_is_one_for_a_perfect_shuffle_and_tells_order_from_it() -> None:
    perfect = list(range(20_000))
    random.Random(0).shuffle(perfect)
    assert bench_latents.quality(perfect, 20_000, 200) == pytest.approx(
        {"displacement": 1.0, "neighbours": 1.0}, abs=0.15
    )
    in_order = bench_latents.quality(range(20_000), 20_000, 200)
    # Of 200 neighbours 199 come in one batch, and in a perfect shuffle one in a hundred.
    assert in_order == pytest.approx({"displacement": 0.0, "neighbours": 99.5}, rel=1e-3)


def test_samples_carry_their_numbers() -> None:
    tokens = [sample(number)[1][0] for number in (0, 39_999, 40_000, 1_234_567)]
    assert numbers_of(np.stack(tokens)) == [0, 39_999, 40_000, 1_234_567]


def test_ratios_are_medians_over_rounds_against_the_best_peer_of_each() -> None:
    def runs(*speeds: float) -> list[dict[str, Any]]:
        return [{"samples": 100 * speed, "seconds": 100.0, "cpu_s": 50.0} for speed in speeds]

    readers = {"ours": runs(30, 40, 90), "slow": runs(1, 1, 30), "fast": runs(10, 20, 10)}
    loader = [{"main_thread_ms_per_1000": value} for value in (0.5, 9.0, 0.6)]
    sizes = [{"seconds": 0.1, "own_mib": 50.0}, {"seconds": 1.0, "own_mib": 60.0}]
    layouts = {"arrays": 100.0, "ours": 112.0}
    assert bench_latents.ratios(readers, loader, sizes, layouts) == pytest.approx(
        {
            "read_vs_best_peer": 3.0,
            "read_vs_best_peer_cpu": 3.0,
            "main_thread_ms_per_1000": 0.6,
            "resume_s": 1.0,
            "memory_growth": 1.2,
            "overhead": 0.12,
        }
    )
    assert bench_latents.ratios({"ours": runs(1)}, loader, sizes, layouts)["read_vs_best_peer"] is None


def test_the_last_line_is_json(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    scratch = ["--scratch", str(tmp_path), "--peers", "webdataset", "--sizes", "3,5", "--consumers", "2", "--parts", ""]
    bench_latents.main(["--shards", "2", "--rows", "300", "--rounds", "1", *scratch])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert all(value > 0 for value in result["ratios"].values())
    assert result["samples"] == 600
    assert set(result["readers"]) == {"ours", "webdataset"}
    assert result["consumers"]["processes"] == 2
    assert list(result["sizes"]) == ["3", "5"]
    assert result["ratios"]["overhead"] < bench_latents.GOALS["overhead"]
