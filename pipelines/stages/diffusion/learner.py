"""The diffusion model's training task: see `pipelines.training.task`.

Shapes: moments: (B, 2, C, h, w); noise, posterior_noise: (B, C, h, w); t: (B,).
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ldm_core import checkpoint
from ldm_core.configs.model import LatentDiffusionConfig
from ldm_core.latent_diffusion import LatentDiffusion
from ldm_core.networks.posterior import DiagonalGaussian
from ldm_core.objective import DiffusionObjective
from ldm_core.schedule import NoiseSchedule
from pipelines.conditions.kind import Prompts
from pipelines.conditions.kinds import kind_of
from pipelines.drawing.grids import grid
from pipelines.shards.mixture import Mixture
from pipelines.shards.order import SamplePosition
from pipelines.shards.randomness import Purpose, generator
from pipelines.stages.autoencoder.artifact import load_first_stage
from pipelines.stages.diffusion.artifact import FOLDER
from pipelines.stages.diffusion.config import DiffusionConfig
from pipelines.stages.diffusion.mix import weights
from pipelines.stages.diffusion.sampling import sample_prompts
from pipelines.stages.latents.artifact import Latents
from pipelines.store.commits import ArtifactWriter
from pipelines.store.ledger import Artifact

PREVIEW_COLUMNS = 4
PREVIEW_CELL_PIXELS = 128


@dataclass(frozen=True)
class DiffusionTask:
    """Train the UNet and the conditioner of a model on all cached latents but the held-out ones.

    Attributes:
        latents: the run's own, of which the model has its scale factor and its condition.
        mixed: the other artifacts of `config.mix`.
    """

    model: LatentDiffusionConfig
    config: DiffusionConfig
    seed: int
    latents: Artifact
    autoencoder: Artifact
    prompts: tuple[str, ...]
    mixed: tuple[Artifact, ...] = ()

    def build(self, device: torch.device) -> DiffusionLearner:
        return DiffusionLearner(self, device)


class DiffusionLearner:
    """A diffusion model being trained, inside one worker."""

    def __init__(self, task: DiffusionTask, device: torch.device) -> None:
        self.task, self.device = task, device
        self.diffusion_network = task.model.build_network()
        self.network: nn.Module = self.diffusion_network
        self.kind = kind_of(task.config.condition)
        self.condition = self.kind.examples(task.latents)
        self.latents = Latents(task.latents, self.kind.files, self.condition.decode, mixed=task.mixed)
        self.order = Mixture(
            self.latents.parts(weights(task.config)),
            task.seed,
            task.config.shuffle_window,
            batch_size=task.config.training.batch_size,
            partitions=task.config.training.partitions,
        )
        self.objective = DiffusionObjective(
            NoiseSchedule(task.model.schedule, device=device),
            parameterization=task.model.parameterization,
            loss=task.model.loss,
            min_snr_gamma=task.config.min_snr_gamma,
            vlb_weight=task.config.vlb_weight,
        )

    def load(self, samples: Sequence[SamplePosition]) -> dict[str, Tensor]:
        """Return the moments and conditions of a batch, and everything random about it.

        The order of the draws for a sample is fixed: another order would be another training run.
        """
        cached = [self.latents.get(*sample.place, self._view(sample)) for sample in samples]
        moments = np.stack([sample_moments for sample_moments, _ in cached])
        shape = (len(samples), *moments.shape[2:])
        posterior_noise, noise = np.empty(shape, np.float32), np.empty(shape, np.float32)
        t, uniform = np.empty(len(samples), np.int64), np.empty(len(samples), np.float64)
        conditions = []
        for i, sample in enumerate(samples):
            random = generator(self.task.seed, Purpose.SAMPLE, sample.position)
            t[i] = random.integers(self.task.model.schedule.timesteps)
            conditions.append(self.condition.draw(cached[i][1], random))
            uniform[i] = random.random()
            random.standard_normal(out=posterior_noise[i], dtype=np.float32)
            random.standard_normal(out=noise[i], dtype=np.float32)
        return {
            "moments": torch.from_numpy(moments),
            "posterior_noise": torch.from_numpy(posterior_noise),
            "noise": torch.from_numpy(noise),
            "t": torch.from_numpy(t),
            **self.condition.batch(conditions, torch.from_numpy(uniform)),
        }

    def _view(self, sample: SamplePosition) -> int:
        """Return which view of a sample is trained on at its position."""
        views = self.latents.views
        return int(generator(self.task.seed, Purpose.VIEW, sample.position).integers(views)) if views > 1 else 0

    def losses(self, network: Any, batch: dict[str, Tensor]) -> Tensor:
        """Return the (B,) losses of Eq. (3) on a fresh draw of the posterior, rescaled as in Sec. 4.3.2."""
        moments = batch["moments"].float()
        # Two for a KL first stage, mean and log-variance; a VQ one has no posterior to draw from.
        if moments.shape[1] == 2:
            z0 = DiagonalGaussian.from_moments(moments).sample(noise=batch["posterior_noise"])
        else:
            z0 = moments[:, 0]
        inputs = self.condition.inputs(batch)
        return self.objective.loss(
            lambda z_t, t: network(z_t, t, inputs), self.task.model.scale_factor * z0, batch["t"], batch["noise"]
        )

    def key(self, sample: SamplePosition) -> str:
        return self.latents.reader.key(*sample.place)

    def fetch_ahead(self, shards: list[int]) -> None:
        self.latents.reader.fetch_ahead(shards)

    def preview(self) -> NDArray[np.uint8] | None:
        """Sample the fixed prompts with fixed seeds, and return a grid of the pictures with their prompts."""
        prompts = self.task.prompts
        if not prompts:
            return None
        pictures = sample_prompts(self._model, self._prompts, prompts, range(len(prompts)), self.task.config.preview)
        scale = max(1, PREVIEW_CELL_PIXELS // pictures.shape[2])
        return grid(pictures, PREVIEW_COLUMNS, prompts, scale=scale)

    def save(self, writer: ArtifactWriter) -> dict[str, Any]:
        """Commit the whole model, first stage and tokenizer included; return its condition, and sizes of its parts."""
        with tempfile.TemporaryDirectory(prefix="ldm-") as folder:
            checkpoint.save(self._model, folder, tokenizer=self._prompts.tokenizer)
            for path in sorted(Path(folder).iterdir()):
                writer.commit_once(f"{FOLDER}/{path.name}", partial(shutil.copyfile, path))
        condition = self.task.config.condition
        parts = {
            "unet": self._model.unet,
            condition.kind: self._model.conditioner,
            "first_stage": self._model.first_stage,
        }
        return {
            "condition": condition.model_dump(mode="json"),
            "parameters": {
                name: sum(weight.numel() for weight in part.parameters()) for name, part in parts.items() if part
            },
        }

    def close(self) -> None:
        self.latents.reader.close()

    @cached_property
    def _model(self) -> LatentDiffusion:
        """The whole model around the network being trained, whose weights it shares."""
        model = self.task.model.build(device="meta")
        # Loaded only here, on rank 0: training itself needs neither a first stage nor a frozen encoder.
        frozen = self.kind.frozen(self.task.latents, self.device)
        model.unet, model.conditioner = self.diffusion_network.unet, frozen or self.diffusion_network.conditioner
        model.first_stage = load_first_stage(self.task.autoencoder, self.device)
        return model

    @cached_property
    def _prompts(self) -> Prompts:
        return self.kind.prompts(self.task.latents, self.task.model)
