"""Ten steps of training under a fixed seed give the losses that they have always given.

A refactoring that should not change results must show the same losses. What enters them: the initial weights, the order
of the samples, everything drawn for a sample, dropout, the objective and its weighting, the scale of the latents, the
learning rate and its warm-up, clipping, AdamW and, through the loss of the averaged weights, the EMA. After a change
that is meant to change results rewrite the file, and say why in the commit's message:

    python -m tests.golden.test_golden_losses
"""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm_core.ema import EMA
from pipelines.stages.autoencoder.config import AutoencoderConfig
from pipelines.stages.autoencoder.learner import AutoencoderTask
from pipelines.stages.diffusion.config import DiffusionConfig
from pipelines.stages.diffusion.learner import DiffusionTask
from pipelines.stages.diffusion.work import model_config
from pipelines.store.commits import ArtifactWriter
from pipelines.store.storage import Storage
from pipelines.training.config import TrainingConfig
from pipelines.training.loader.open import tensors_of
from pipelines.training.loop import Rank, TrainingLoop
from pipelines.training.task import Task
from tests.tiny import TINY_TEXT, TINY_UNET
from tests.tiny_artifacts import first_stage_artifact, latents_artifact, pairs_artifact

GOLDEN = Path(__file__).with_name("golden_losses.json")
REWRITE = "python -m tests.golden.test_golden_losses"
SEED = 7
STEPS = 10
# Other CPUs round differently: by up to 3e-5 between AVX-512 and AVX2, 4e-5 to SSE 4. Of two dozen deliberate mistakes
# the smallest (the EMA's warm-up left out) changed a number by 1e-3.
TOLERANCE = 3e-4
TRAINING = {
    "steps": STEPS,
    "batch_size": 4,
    "learning_rate": 4e-3,
    "warmup_steps": 4,
    "schedule": "cosine",
    "weight_decay": 0.5,
    "betas": [0.9, 0.95],
    "gradient_clip": 0.1,
    "ema_decay": 0.5,
    "log_every_steps": 1,
    "sample_every_steps": STEPS,
}

Losses = dict[str, list[float] | float]


class NoDriver:
    """A relay with nobody at its other end."""

    def send(self, message: Any) -> None:
        pass

    def stop_ordered(self) -> None:
        return None


class NoCheckpoints:
    """Training starts at the beginning and is too short to save a checkpoint."""

    def newest(self, device: torch.device) -> None:
        return None


def train(task: Task, training: TrainingConfig | None, folder: Path) -> Losses:
    """Train as the only worker of a run does; return the loss of each step, and of the averaged weights at the end."""
    assert training is not None
    torch.set_num_threads(1)
    writer = ArtifactWriter("golden", "key", Storage(str(folder / "golden")))
    rank = Rank(0, 1, torch.device("cpu"))
    loop = TrainingLoop(task, training, SEED, writer, NoDriver(), rank)  # type: ignore[arg-type]
    loop.run(NoCheckpoints())  # type: ignore[arg-type]
    assert loop.ema is not None
    return {"losses": [entry["loss"] for entry in loop.history], "averaged_weights": _loss_of_average(loop, loop.ema)}


def _loss_of_average(loop: TrainingLoop, ema: EMA) -> float:
    learner = loop.learner
    with ema.swapped(), torch.no_grad():
        batch = tensors_of(learner.batches, learner.batches.order.slice(0, 0, 1))
        return float(f"{float(learner.losses(loop.network, batch).mean()):.6g}")


def first_stage(folder: Path, **changes: Any) -> Losses:
    pairs = pairs_artifact(folder, rows=(70, 0, 60))
    training = {**TRAINING, "learning_rate": 1e-3}
    config = AutoencoderConfig.model_validate(
        {"model": "tiny-kl-f8", "kl_weight": 1e-2, "training": training, **changes}
    )
    return train(AutoencoderTask(config=config, seed=SEED, pairs=pairs), config.training, folder)


def diffusion(folder: Path, **changes: Any) -> Losses:
    autoencoder = first_stage_artifact(folder)
    latents = latents_artifact(folder, autoencoder.details["encoder_sha256"])
    condition = {"kind": "text", "transformer": TINY_TEXT, "dropout": 0.5}
    values = {"unet": {**TINY_UNET, "dropout": 0.1}, "condition": condition, "training": TRAINING}
    config = DiffusionConfig.model_validate({**values, **changes})
    model = model_config(config, latents, autoencoder)
    task = DiffusionTask(
        model=model, config=config, seed=SEED, latents=latents, autoencoder=autoencoder, prompts=("red circle",)
    )
    return train(task, config.training, folder)


RUNS: dict[str, Callable[[Path], Losses]] = {
    "first stage": first_stage,
    "diffusion": diffusion,
    "diffusion, weighted": lambda folder: diffusion(folder, parameterization="v", min_snr_gamma=5.0, vlb_weight=0.1),
}


@pytest.mark.parametrize("name", RUNS)
def test_ten_steps_give_the_losses_they_have_always_given(name: str, own_threads: None, tmp_path: Path) -> None:
    golden: Losses = json.loads(GOLDEN.read_text())[name]
    found = RUNS[name](tmp_path)
    for quantity, expected in golden.items():
        assert found[quantity] == pytest.approx(expected, rel=TOLERANCE), (
            f"{name}: {quantity} changed. If this commit is meant to change what training computes, say so in its "
            f"message and rewrite the file with `{REWRITE}`; otherwise it has broken training"
        )


def rewrite() -> None:
    """Write the losses of today as the golden ones."""
    golden = {}
    for name, run in RUNS.items():
        with tempfile.TemporaryDirectory() as folder:
            golden[name] = run(Path(folder))
    GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    rewrite()
