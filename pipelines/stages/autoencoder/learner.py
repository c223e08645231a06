"""The first stage's training task: see `pipelines.training.task`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ldm_core.networks.autoencoder import build_first_stage
from pipelines.shards.order import SampleOrder, SamplePosition
from pipelines.shards.randomness import Purpose, generator
from pipelines.stages.autoencoder.artifact import commit_first_stage
from pipelines.stages.autoencoder.config import AutoencoderConfig
from pipelines.stages.autoencoder.reconstruction import SHOWN, ReconstructionLoss, ReconstructionTest, to_images
from pipelines.stages.pairs.artifact import Pictures, open_pairs, training_places
from pipelines.stages.pairs.held_out import held_out_places
from pipelines.store.commits import ArtifactWriter
from pipelines.store.ledger import Artifact

# Number of shards whose pictures are mixed with each other at a time.
SHUFFLE_WINDOW = 16


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

    def __init__(self, task: AutoencoderTask, device: torch.device) -> None:
        self.task, self.device = task, device
        self.first_stage = build_first_stage(task.config.model)
        self.network: nn.Module = ReconstructionLoss(self.first_stage, task.config)
        self.reader = open_pairs(task.pairs)
        self.pictures = Pictures(self.reader)
        self.held_out = held_out_places(task.pairs)
        training = task.config.training
        assert training is not None, "what is imported is not trained"
        self.order = SampleOrder(
            self.reader.rows_per_shard,
            task.seed,
            SHUFFLE_WINDOW,
            batch_size=training.batch_size,
            partitions=training.partitions,
            excluded=self.held_out,
        )
        self._test: ReconstructionTest | None = None

    def load(self, samples: Sequence[SamplePosition]) -> dict[str, Tensor]:
        """Return `pixels` (B, H, W, 3) uint8 and `noise` (B, C, h, w), which the posterior is sampled with."""
        pixels = self.pictures.stack([sample.place for sample in samples])
        factor = self.task.config.model.downsampling_factor
        shape = (self.task.config.model.embed_dim, pixels.shape[1] // factor, pixels.shape[2] // factor)
        noise = np.empty((len(samples), *shape), np.float32)
        for index, sample in enumerate(samples):
            random = generator(self.task.seed, Purpose.SAMPLE, sample.position)
            random.standard_normal(out=noise[index], dtype=np.float32)
        return {"pixels": torch.from_numpy(pixels), "noise": torch.from_numpy(noise)}

    def losses(self, network: Any, batch: dict[str, Tensor]) -> Tensor:
        losses: Tensor = network(to_images(batch["pixels"], self.device), batch["noise"])
        return losses

    def key(self, sample: SamplePosition) -> str:
        return self.reader.key(*sample.place)

    def fetch_ahead(self, shards: list[int]) -> None:
        self.reader.fetch_ahead(shards)

    def preview(self) -> NDArray[np.uint8]:
        return self._reconstructions().grid(self.first_stage, self.device)

    def save(self, writer: ArtifactWriter) -> dict[str, Any]:
        return commit_first_stage(writer, self.first_stage, self._reconstructions(), self.device)

    def close(self) -> None:
        self.reader.close()

    def _reconstructions(self) -> ReconstructionTest:
        if self._test is None:
            others = training_places(self.task.pairs, SHOWN)
            self._test = ReconstructionTest(self.pictures, self.held_out, others)
        return self._test
