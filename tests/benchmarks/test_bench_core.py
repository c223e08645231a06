"""The benchmark measures what it says: fair turns, equal work, the JSON line. Speed is asserted nowhere."""

import json
from collections.abc import Callable

import pytest
import torch

from tests.benchmarks import network, peers, plan, timing, train_step
from tests.benchmarks.bench_core import PART_FUNCTIONS, RATIOS, main
from tests.benchmarks.shapes import OURS, THEIRS, Shape
from tests.benchmarks.timing import Timing, ratio

pytestmark = pytest.mark.usefixtures("own_threads")
CPU = torch.device("cpu")


def test_candidates_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "SHORTEST_ROUND_S", 0.0)
    seen: list[str] = []

    def candidate(name: str) -> Callable[[], None]:
        def call() -> None:
            seen.append(name)
            sum(range(100_000))

        return call

    timings = timing.interleaved({name: candidate(name) for name in "ab"}, CPU, rounds=3, warmup=1)
    assert "".join(seen) == "aabb" + "ab" * 3  # a first and a warm-up call of each, then in turn
    assert [len(timings[name].seconds) for name in "ab"] == [3, 3]


def test_the_ratio_is_the_median_over_rounds_so_that_one_disturbed_round_does_not_count() -> None:
    timings = {"ours": Timing((1.0, 1.0, 50.0), 1.0), "theirs": Timing((2.0, 2.0, 100.0), 1.0)}
    assert ratio(timings, "ours", "theirs") == 2.0
    assert ratio(timings, "ours", "absent") is None
    assert timings["ours"].median_s == 1.0


def test_flops_are_those_of_the_paper_model() -> None:
    flops = network.training_flops(plan.GPU.model)
    assert flops["unet_forward"] / 1e9 == pytest.approx(182, abs=0.5)
    assert flops["text_forward"] / 1e9 == pytest.approx(78, abs=0.5)
    assert flops["train"] == pytest.approx(3 * (flops["unet_forward"] + flops["text_forward"]), rel=0.01)


def test_both_sides_train_alike() -> None:
    if not peers.available():
        pytest.skip("diffusers is not installed")
    config = plan.QUICK.unet
    batch = train_step.random_batch(config, 2, 5, CPU)
    steps = {side: prepare(Shape("fp32", True)) for side, prepare in train_step.sides(config, batch, CPU).items()}
    losses = {side: [float(step()) for _ in range(20)] for side, step in steps.items()}
    assert losses[OURS] == pytest.approx(losses[THEIRS], rel=1e-4)
    assert losses[OURS][-1] < losses[OURS][0]


def test_the_last_line_is_json_with_every_ratio_and_each_part_has_a_line_of_its_own(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing, "SHORTEST_ROUND_S", 0.0)
    main(["--device", "cpu", "--quick", "--only", "prepare,pixel,sweep", "--batch-sizes", "2"])
    lines = capsys.readouterr().out.splitlines()
    result = json.loads(lines[-1])
    parts = [json.loads(line) for line in lines[:-1] if line.startswith("{")]
    assert [part["part"] for part in parts] == ["prepare", "pixel", "sweep"]
    assert [row for part in parts for row in part["rows"]] == result["rows"]
    assert {row["batch_size"] for row in parts[0]["rows"]} == {2}
    assert result["ratios"]["prepare_vs_eager"] > 0
    assert set(result) == {"machine", "rows", "ratios"}
    assert set(result["ratios"]) == set(RATIOS)
    assert result["ratios"]["pixel_vs_latent"] > 0
    assert result["ratios"]["matmul_fraction"] is None
    assert result["machine"]["threads"] == 1
    assert [row["name"] for row in result["rows"] if row["part"] == "sweep"][1:] == ["batch 2", "batch 2 checkpointed"]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("GET was unable to find an engine to execute this computation"),
    ],
)
def test_a_part_that_memory_does_not_suffice_for_ends_no_other(
    error: RuntimeError, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*arguments: object) -> None:
        raise error

    monkeypatch.setitem(PART_FUNCTIONS, "train", fail)
    monkeypatch.setitem(PART_FUNCTIONS, "sweep", lambda *arguments: None)
    main(["--device", "cpu", "--quick", "--only", "train,sweep"])
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert rows == [{"part": "train", "name": "out of memory"}]
    monkeypatch.setitem(PART_FUNCTIONS, "train", lambda *arguments: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        main(["--device", "cpu", "--quick", "--only", "train,sweep"])


def test_unknown_parts_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--only", "train,encoding"])
    assert "--only takes prepare, train, sample, encode, pixel, sweep; got encoding" in capsys.readouterr().err
