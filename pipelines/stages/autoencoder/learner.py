"""The first stage's training task: see `pipelines.training.task`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ldm_core.networks.autoencoder import build_first_stage
from pipelines.stages.autoencoder.artifact import commit_first_stage
from pipelines.stages.autoencoder.batches import PictureSource
from pipelines.stages.autoencoder.config import AutoencoderConfig
from pipelines.stages.autoencoder.reconstruction import SHOWN, ReconstructionLoss, ReconstructionTest, to_images
from pipelines.stages.pairs.artifact import training_places
from pipelines.store.commits import ArtifactWriter
from pipelines.store.ledger import Artifact


@dataclass(frozen=True)
class AutoencoderTask:
    """Train a first stage on all pictures except the held-out ones."""

    config: AutoencoderConfig
    seed: int
    pairs: Artifact

    def build(self, device: torch.device) -> AutoencoderLearner:
        return AutoencoderLearner(self, device)


class AutoencoderLearner:
    """A first stage being trained, inside one worker."""

    has_timesteps = False

    def __init__(self, task: AutoencoderTask, device: torch.device) -> None:
        self.task, self.device = task, device
        self.first_stage = build_first_stage(task.config.model)
        self.network: nn.Module = ReconstructionLoss(self.first_stage, task.config)
        training = task.config.training
        assert training is not None, "what is imported is not trained"
        self.batches = PictureSource(
            pairs=task.pairs,
            seed=task.seed,
            batch_size=training.batch_size,
            partitions=training.partitions,
            embed_dim=task.config.model.embed_dim,
            downsampling_factor=task.config.model.downsampling_factor,
        ).open()
        self._test: ReconstructionTest | None = None

    def losses(self, network: Any, batch: dict[str, Tensor]) -> Tensor:
        losses: Tensor = network(to_images(batch["pixels"], self.device), batch["noise"])
        return losses

    def held_out_losses(self, batch: dict[str, Tensor]) -> Tensor:
        return self.losses(self.network, batch)

    def preview(self) -> NDArray[np.uint8]:
        return self._reconstructions().grid(self.first_stage, self.device)

    def save(self, writer: ArtifactWriter) -> dict[str, Any]:
        return commit_first_stage(writer, self.first_stage, self._reconstructions(), self.device)

    def _reconstructions(self) -> ReconstructionTest:
        if self._test is None:
            others = training_places(self.task.pairs, SHOWN)
            self._test = ReconstructionTest(self.batches.pictures, self.batches.held_out, others, self.batches.buckets)
        return self._test
