"""The loss on held-out samples: the same ones at the same noise and timesteps each time, and no trace in training."""

import copy
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from pipelines.drawing.sections import loss_chart_of
from pipelines.notices import told_to
from pipelines.shards.randomness import Purpose
from pipelines.stages.autoencoder.config import AutoencoderConfig
from pipelines.stages.autoencoder.learner import AutoencoderTask
from pipelines.stages.diffusion.batches import LatentBatches
from pipelines.stages.diffusion.config import DiffusionConfig
from pipelines.stages.diffusion.learner import DiffusionTask
from pipelines.stages.diffusion.work import model_config
from pipelines.store.commits import ArtifactWriter
from pipelines.store.ledger import Artifact
from pipelines.store.storage import Storage
from pipelines.training.config import TrainingConfig
from pipelines.training.held_out import HeldOutLoss
from pipelines.training.loader.held_out import FIRST_POSITION, held_out_batches
from pipelines.training.loader.open import tensors_of
from pipelines.training.loop import Rank, TrainingLoop
from pipelines.training.task import Task
from tests.golden.test_golden_losses import NoDriver
from tests.tiny import TINY_TEXT, TINY_UNET
from tests.tiny_artifacts import first_stage_artifact, latents_artifact, pairs_artifact

TRAINING = {
    "steps": 6,
    "batch_size": 4,
    "learning_rate": 1e-2,
    "ema_decay": 0.5,
    "checkpoint_every_steps": 2,
    "log_every_steps": 2,
    "sample_every_steps": 3,
}
NAMES = ("held_out", "held_out_q1", "held_out_q2", "held_out_q3", "held_out_q4")
# Of these 330 samples five are held out.
ROWS = (200, 0, 130)


class Driver(NoDriver):
    """Keeps the metrics that a training sends, by step."""

    def __init__(self) -> None:
        self.metrics: dict[int, dict[str, float]] = {}

    def send(self, message: Any) -> None:
        self.metrics.setdefault(message.step, {}).update(message.metrics)


class StopError(Exception):
    """Training is killed here."""


class Memory:
    """Checkpoints that a killed training leaves.

    Args:
        dies_at: the step whose checkpoint is the last thing that it does.
    """

    def __init__(self, dies_at: int | None = None) -> None:
        self.dies_at, self.state = dies_at, None

    def newest(self, device: torch.device) -> dict[str, Any] | None:
        return copy.deepcopy(self.state)

    def save(self, step: int, state: Any) -> None:
        self.state = copy.deepcopy(state)
        if step == self.dies_at:
            raise StopError


@pytest.fixture
def upstream(tmp_path: Path, own_threads: None) -> dict[str, Artifact]:
    torch.set_num_threads(1)
    autoencoder = first_stage_artifact(tmp_path)
    return {
        "autoencoder": autoencoder,
        "latents": latents_artifact(tmp_path, autoencoder.details["encoder_sha256"], rows=ROWS),
    }


def task_of(upstream: dict[str, Artifact], **changes: Any) -> DiffusionTask:
    values = {
        "unet": {**TINY_UNET, "dropout": 0.1},
        "condition": {"kind": "text", "transformer": TINY_TEXT, "dropout": 0.5},
        "training": TRAINING,
    }
    config = DiffusionConfig.model_validate(values | changes)
    model = model_config(config, upstream["latents"], upstream["autoencoder"])
    return DiffusionTask(model=model, config=config, seed=0, prompts=(), **upstream)


def train(
    task: Task, folder: Path, *, memory: Memory | None = None, **training: Any
) -> tuple[TrainingLoop, dict[int, dict[str, float]]]:
    """Train as the only worker of a run does; return what is left of it, and the metrics of each step."""
    driver, writer = Driver(), ArtifactWriter("diffusion", "key", Storage(str(folder)))
    config = TrainingConfig.model_validate({**TRAINING, **training})
    loop = TrainingLoop(task, config, 0, writer, driver, Rank(0, 1, torch.device("cpu")))  # type: ignore[arg-type]
    loop.run(memory or Memory())  # type: ignore[arg-type]
    return loop, driver.metrics


def weights(loop: TrainingLoop) -> list[torch.Tensor]:
    assert loop.ema is not None
    return [*loop.network.state_dict().values(), *loop.ema.shadow.values()]


@pytest.mark.parametrize(
    ("count", "most", "expected"),
    [(300, 256, 256), (257, 256, 256), (67, 256, 64), (64, 256, 256), (3, 4, 4), (1, 8, 4)],
)
def test_each_quartile_has_as_many_samples(count: int, most: int, expected: int) -> None:
    places = [(number % 3, number) for number in range(count)]
    batches = held_out_batches(places, ["a", "b", "a"], most, 6)
    samples = [sample for batch in batches for sample in batch]
    assert min(sample.position for sample in samples) > 2**60, "training never gets there"
    assert sorted(sample.position - FIRST_POSITION for sample in samples) == list(range(expected))
    assert set(Counter(sample.position % 4 for sample in samples).values()) == {expected // 4}
    for batch in batches:
        assert len({sample.shard == 1 for sample in batch}) == 1, "a batch is of one bucket"
        assert len(batch) <= 6
    if 4 * count <= most:
        quartiles = {(sample.place, sample.position % 4) for sample in samples}
        assert len(quartiles) == 4 * count, "each sample in each quartile"
    elif count > 4:
        assert {sample.place for sample in samples} == set(places[:expected])


def test_a_batch_has_every_condition_the_first_view_and_timesteps_of_its_quartiles(
    upstream: dict[str, Artifact],
) -> None:
    learner = task_of(upstream, condition={"kind": "text", "transformer": TINY_TEXT, "dropout": 1.0}).build(
        torch.device("cpu")
    )
    batches = learner.batches
    assert len(batches.held_out) == 5
    # There is only one view of each; of another there would be no file.
    batches.latents.views[:] = 7
    (samples,) = held_out_batches(batches.held_out, (), 20, 64)
    batch = tensors_of(batches, samples)
    assert (batch["t"] // 250).tolist() == [0, 1, 2, 3] * 5
    assert len(set((batch["t"] % 250).tolist())) > 10
    for sample, moments, tokens in zip(samples, batch["moments"], batch["tokens"], strict=True):
        its_moments, (captions,) = batches.latents.get(*sample.place)
        np.testing.assert_array_equal(moments.numpy(), its_moments)
        assert tokens.tolist() in captions.tolist()
    # Whoever reads them, and with which others.
    again = task_of(upstream).build(torch.device("cpu"))
    for start in (0, 12):
        part = tensors_of(again.batches, samples[start : start + 8])
        # Which of its captions differ is the batch's own affair.
        for name in part.keys() - {"distinct", "caption"}:
            assert torch.equal(part[name], batch[name][start : start + 8]), name
        noise = again.noise(Purpose.NOISE, part)
        assert torch.equal(noise, learner.noise(Purpose.NOISE, batch)[start : start + 8])


def test_the_loss_is_the_plain_one_of_the_averaged_weights(upstream: dict[str, Artifact], tmp_path: Path) -> None:
    loop, metrics = train(task_of(upstream, min_snr_gamma=5.0, vlb_weight=0.1), tmp_path / "weighted")
    learner, ema = task_of(upstream).build(torch.device("cpu")), loop.ema
    assert ema is not None
    learner.network.load_state_dict(ema.shadow, strict=False)
    learner.network.eval()
    (samples,) = held_out_batches(learner.batches.held_out, (), 20, 64)
    with torch.no_grad():
        losses = learner.losses(learner.network, tensors_of(learner.batches, samples))
    found = metrics[6]
    # Whatever the size of the batches.
    measured = HeldOutLoss(learner, 256, 3).measure(torch.device("cpu"))
    assert {f"loss/{name}": pytest.approx(loss, rel=1e-5) for name, loss in measured.items()} == {
        name: loss for name, loss in found.items() if "held_out" in name
    }
    assert found["loss/held_out"] == pytest.approx(float(losses.mean()), rel=1e-5)
    for quartile in range(4):
        assert found[f"loss/held_out_q{quartile + 1}"] == pytest.approx(float(losses[quartile::4].mean()), rel=1e-5)
    assert set(metrics) == {0, 2, 3, 4, 6}
    assert {f"loss/{name}" for name in NAMES} <= metrics[3].keys()
    history = {entry["step"]: entry for entry in loop.history}
    assert sorted(history) == [2, 3, 4, 6]
    assert set(history[3]) == {"step", *NAMES}
    assert history[6]["held_out"] == pytest.approx(found["loss/held_out"], rel=1e-5)
    assert "loss" in history[6]
    details = loop.writer.storage.read_json("details.json")
    assert details["held_out_loss"] == history[6]["held_out"]
    artifact: Any = SimpleNamespace(files={"history.json"}, storage=loop.writer.storage)
    assert "over 3 logged steps" in loss_chart_of(artifact), "the one of training"


def test_training_is_the_same_with_and_without_it(upstream: dict[str, Artifact], tmp_path: Path) -> None:
    task = task_of(upstream)
    without, metrics = train(task, tmp_path / "without", held_out_samples=0)
    assert not any("held_out" in name for each in metrics.values() for name in each)
    measured, _ = train(task, tmp_path / "with", sample_every_steps=1)
    for expected, found in zip(weights(without), weights(measured), strict=True):
        assert torch.equal(found, expected)
    assert [entry["loss"] for entry in measured.history if "loss" in entry] == [
        entry["loss"] for entry in without.history
    ]


def test_it_is_the_same_after_a_restart(upstream: dict[str, Artifact], tmp_path: Path) -> None:
    task = task_of(upstream)
    whole, metrics = train(task, tmp_path / "whole")
    memory = Memory(dies_at=4)
    with pytest.raises(StopError):
        train(task, tmp_path / "killed", memory=memory)
    memory.dies_at = None
    resumed, later = train(task, tmp_path / "killed", memory=memory)
    assert sorted(later) == [4, 6]
    assert resumed.history == whole.history
    assert {name: later[6][f"loss/{name}"] for name in NAMES} == {name: metrics[6][f"loss/{name}"] for name in NAMES}


def test_samples_that_cannot_be_read_are_a_warning_and_tried_again(
    upstream: dict[str, Artifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assemble, failures = LatentBatches.assemble, [0]

    def fail_once(self: LatentBatches, samples: Any, new: Any) -> None:
        if samples[0].position >= FIRST_POSITION and not failures[0]:
            failures[0] += 1
            raise OSError("the bucket is away")
        assemble(self, samples, new)

    monkeypatch.setattr(LatentBatches, "assemble", fail_once)
    lines: list[str] = []
    with told_to(lines.append):
        loop, metrics = train(task_of(upstream), tmp_path / "training")
    assert lines == ["the held-out samples cannot be read, training goes on without their loss: the bucket is away"]
    assert loop.step == 6
    assert 3 not in metrics
    assert "loss/held_out" in metrics[6]


def test_without_held_out_samples_one_line_says_so(upstream: dict[str, Artifact], tmp_path: Path) -> None:
    few = latents_artifact(tmp_path / "few", upstream["autoencoder"].details["encoder_sha256"])
    lines: list[str] = []
    with told_to(lines.append):
        loop, metrics = train(task_of({**upstream, "latents": few}), tmp_path / "training", sample_every_steps=2)
    assert lines == ["no samples are held out, so that no loss/held_out is logged"]
    assert not any("held_out" in name for each in metrics.values() for name in each)
    assert "held_out_loss" not in loop.writer.storage.read_json("details.json")


def test_a_first_stage_has_it_too_without_quartiles(tmp_path: Path, own_threads: None) -> None:
    torch.set_num_threads(1)
    config = AutoencoderConfig.model_validate({"model": "tiny-kl-f8", "training": {**TRAINING, "steps": 2}})
    pairs = pairs_artifact(tmp_path, rows=(70, 0, 60))
    loop, metrics = train(AutoencoderTask(config=config, seed=0, pairs=pairs), tmp_path / "training", steps=2)
    assert [name for name in metrics[2] if "held_out" in name] == ["loss/held_out"]
    assert loop.history[-1]["held_out"] > 0


def test_a_number_of_samples_that_quartiles_cannot_share_is_refused() -> None:
    with pytest.raises(ValidationError, match="held_out_samples\n  Input should be a multiple of 4"):
        TrainingConfig(steps=1, batch_size=1, learning_rate=1.0, held_out_samples=30)
