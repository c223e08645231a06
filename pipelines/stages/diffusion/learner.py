"""The diffusion model's training task: see `pipelines.training.task`.

Shapes: moments: (B, 2, C, h, w); noise: (B, C, h, w); positions, t: (B,).
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
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
from pipelines.shards.randomness import Purpose
from pipelines.stages.autoencoder.artifact import load_first_stage
from pipelines.stages.diffusion.artifact import FOLDER
from pipelines.stages.diffusion.batches import LatentSource
from pipelines.stages.diffusion.config import DiffusionConfig
from pipelines.stages.diffusion.mix import weights
from pipelines.stages.diffusion.sampling import sample_prompts
from pipelines.store.commits import ArtifactWriter
from pipelines.store.ledger import Artifact
from pipelines.training.noise import standard_normal
from pipelines.training.optimization import is_compiled

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

    has_timesteps = True

    def __init__(self, task: DiffusionTask, device: torch.device) -> None:
        self.task, self.device = task, device
        self.diffusion_network = task.model.build_network()
        self.network: nn.Module = self.diffusion_network
        self.kind = kind_of(task.config.condition)
        training = task.config.training
        self.batches = LatentSource(
            latents=task.latents,
            mixed=task.mixed,
            weights=tuple(weights(task.config)),
            files=self.kind.files,
            examples=self.kind.examples(task.latents),
            seed=task.seed,
            shuffle_window=task.config.shuffle_window,
            batch_size=training.batch_size,
            partitions=training.partitions,
            schedule=task.model.schedule,
            timesteps=task.config.timesteps,
        ).open()
        # Compiled for one shape, and if buckets bring others for any.
        self.draw_noise = torch.compile(standard_normal) if is_compiled(device, training) else standard_normal
        schedule = NoiseSchedule(task.model.schedule, device=device)
        kinds: dict[str, Any] = {"parameterization": task.model.parameterization, "loss": task.model.loss}
        self.objective = DiffusionObjective(
            schedule, min_snr_gamma=task.config.min_snr_gamma, vlb_weight=task.config.vlb_weight, **kinds
        )
        # Every timestep counts alike: held-out losses of recipes that weigh them otherwise can be compared.
        self.plain_objective = DiffusionObjective(schedule, **kinds)

    def losses(self, network: Any, batch: dict[str, Tensor]) -> Tensor:
        return self._losses(self.objective, network, batch, self.draw_noise)

    def held_out_losses(self, batch: dict[str, Tensor]) -> Tensor:
        # Not the noise as it is compiled for training: batches of other sizes would compile it anew.
        return self._losses(self.plain_objective, self.network, batch, standard_normal)

    def noise(
        self, purpose: Purpose, batch: dict[str, Tensor], draw: Callable[..., Tensor] = standard_normal
    ) -> Tensor:
        """Return (B, C, h, w) standard normal noise: that of these samples at their positions, whoever draws it."""
        return draw(self.task.seed, purpose, batch["positions"], batch["moments"].shape[2:])

    def _losses(
        self, objective: DiffusionObjective, network: Any, batch: dict[str, Tensor], draw: Callable[..., Tensor]
    ) -> Tensor:
        """Return the (B,) losses of Eq. (3) on a fresh draw of the posterior, rescaled as in Sec. 4.3.2."""
        moments = batch["moments"].float()
        noise = self.noise(Purpose.NOISE, batch, draw)
        # Two for a KL first stage, mean and log-variance; a VQ one has no posterior to draw from.
        if moments.shape[1] == 2:
            z0 = DiagonalGaussian.from_moments(moments).sample(noise=self.noise(Purpose.POSTERIOR, batch, draw))
        else:
            z0 = moments[:, 0]
        inputs = self.batches.source.examples.inputs(batch)
        return objective.loss(
            lambda z_t, t: network(z_t, t, inputs), self.task.model.scale_factor * z0, noise, batch["t"]
        )

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
            # Each artifact leaves out its own held-out samples alone.
            **({"held_out_may_be_trained_on": True} if self.task.mixed else {}),
            "parameters": {
                name: sum(weight.numel() for weight in part.parameters()) for name, part in parts.items() if part
            },
        }

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
