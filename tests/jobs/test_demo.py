"""`ldm demo`, small: real HTTP, every stage, then everything cached, then one stage forced."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from jobs import cli

SMALL = (
    # To start another worker takes longer than the work.
    "pairs.workers=1",
    "autoencoder.training.workers=1",
    "latents.workers=1",
    "diffusion.training.workers=1",
    "evaluate.workers=1",
    "autoencoder.training.steps=6",
    "autoencoder.training.batch_size=4",
    "diffusion.training.steps=6",
    "diffusion.training.batch_size=4",
    "diffusion.training.sample_every_steps=6",
    "diffusion.preview.num_steps=2",
    "evaluate.sampling.num_steps=2",
    "evaluate.sampling.batch_size=72",
    "pairs.rows_per_shard=40",
    "pairs.download.timeout_s=5",
    "pairs.download.retries=1",
)
STAGES = ["pairs", "autoencoder", "latents", "diffusion", "evaluate", "export"]
Demo = Callable[..., dict[str, Any]]


@pytest.fixture
def demo(ray_cluster: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Demo:
    def run(root: Path, *options: str) -> dict[str, Any]:
        settings = [part for value in SMALL for part in ("--set", value)]
        monkeypatch.setattr(
            sys, "argv", ["ldm", "demo", "--root", str(root), "--pictures", "60", "--json", *settings, *options]
        )
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        captured = capsys.readouterr()
        assert not exit_.value.code, captured.err
        result: dict[str, Any] = json.loads(captured.out.splitlines()[-1])
        return result

    return run


@pytest.mark.e2e
@pytest.mark.timeout(600)
def test_the_demo_runs_every_stage_then_says_cached_and_forced_latents_leave_the_rest_cached(
    demo: Demo, tmp_path: Path
) -> None:
    first = demo(tmp_path)
    assert [stage["name"] for stage in first["stages"]] == STAGES
    assert [stage["state"] for stage in first["stages"]] == ["run"] * 6
    _assert_the_accuracy_is_what_the_detector_saw(first, tmp_path)
    assert Path(first["report"]).read_text("utf-8").startswith("<!doctype html>")
    assert (Path(first["checkpoint"]) / "model.safetensors").is_file()
    assert first["tracking_uri"].startswith("sqlite:///")
    _assert_the_web_was_met(tmp_path)

    second = demo(tmp_path)
    assert [stage["state"] for stage in second["stages"]] == ["cached"] * 6
    assert second["alignment_accuracy"] == first["alignment_accuracy"]

    forced = demo(tmp_path, "--force", "latents")
    states = {stage["name"]: stage["state"] for stage in forced["stages"]}
    assert states == {name: "run" if name == "latents" else "cached" for name in STAGES}
    assert [stage["key"] for stage in forced["stages"]] == [stage["key"] for stage in first["stages"]]
    assert len(list((tmp_path / "latents").iterdir())) == 1


def _assert_the_accuracy_is_what_the_detector_saw(result: dict[str, Any], root: Path) -> None:
    """Check that it is the share of prompts that were drawn right; and six steps teach nobody to draw."""
    (scores,) = root.glob("evaluate/*/scores.json")
    items = json.loads(scores.read_text())["alignment"]["items"]
    asked = [json.loads(line)["prompt"] for line in (root / "web" / "prompts.jsonl").read_text("utf-8").splitlines()]
    assert [item["prompt"] for item in items] == asked
    right = [item for item in items if all(item[name] == item["expected"][name] for name in ("colour", "shape"))]
    assert result["alignment_samples"] == len(items)
    assert result["alignment_accuracy"] == pytest.approx(len(right) / len(items))
    assert result["alignment_accuracy"] < 0.2


def _assert_the_web_was_met(root: Path) -> None:
    """Check that every kind of row has the status it deserves, and every row of the table has one."""
    tables = [pq.read_table(path).to_pylist() for path in sorted(root.glob("pairs/*/[0-9]*.parquet"))]
    status = {row["url"]: row["status"] for table in tables for row in table}
    by_path: dict[str, set[str]] = {}
    for url, outcome in status.items():
        by_path.setdefault(url.split("/")[3], set()).add(outcome)
    expected = {
        "missing": {"http_404"},
        "truncated": {"decode_error"},
        "page": {"not_an_image"},
        "copies": {"duplicate"},
        "hang": {"timeout"},
        "slow": {"ok"},
        "flaky": {"ok"},
        "moved": {"ok"},
        "images": {"ok", "too_small"},
    }
    assert expected.items() <= by_path.items()
    assert sum(len(table) for table in tables) == pq.read_metadata(root / "web" / "laion.parquet").num_rows
