"""The batches that a diffusion model is trained on; made without torch, see `pipelines.training.loader`.

Shapes: moments: (B, 2, C, h, w) or (B, 1, C, h, w); positions, t: (B,); of the condition, what its kind says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from pipelines.conditions.examples import Examples
from pipelines.shards.buckets import BucketOrder
from pipelines.shards.mixture import Mixture
from pipelines.shards.order import Order, SamplePosition
from pipelines.shards.randomness import Purpose, words
from pipelines.stages.latents.artifact import Latents
from pipelines.store.ledger import Artifact
from pipelines.training.loader.source import NewArray

# A word of random bits as a number from [0, 1).
_WORD = 2.0**-32


@dataclass(frozen=True)
class LatentSource:
    """All that decides which batches there are; see `pipelines.training.loader.source`.

    Attributes:
        latents: the run's own finished artifact.
        mixed, weights: the other artifacts, and the shares of all, the run's own first.
        files: extensions of what is cached of the condition.
        examples: makes the condition's part of a batch.
        seed, shuffle_window, batch_size, partitions: see `Mixture`, and `BucketOrder` for latents with buckets, which
            are not mixed.
        timesteps: of the noise schedule.
    """

    latents: Artifact
    mixed: tuple[Artifact, ...]
    weights: tuple[int, ...]
    files: tuple[str, ...]
    examples: Examples
    seed: int
    shuffle_window: int
    batch_size: int
    partitions: int
    timesteps: int

    def open(self) -> LatentBatches:
        return LatentBatches(self)


class LatentBatches:
    """Reads moments and conditions, and draws everything random about a sample but the noise."""

    def __init__(self, source: LatentSource) -> None:
        self.source = source
        self.latents = Latents(source.latents, source.files, source.examples.decode, source.mixed)
        buckets = self.latents.buckets
        seed, window, parts = source.seed, source.shuffle_window, self.latents.parts(source.weights)
        options: dict[str, Any] = {"batch_size": source.batch_size, "partitions": source.partitions}
        self.order: Order = (
            BucketOrder(parts[0].rows_per_shard, buckets, seed, window, excluded=parts[0].excluded, **options)
            if buckets
            else Mixture(parts, seed, window, **options)
        )

    def assemble(self, samples: Sequence[SamplePosition], new: NewArray) -> None:
        places = [sample.place for sample in samples]
        positions = new("positions", (len(samples),), np.int64)
        positions[:] = [sample.position for sample in samples]
        # What each word is for is fixed: another use would be another training run.
        timestep, caption, dropped, view = words(self.source.seed, Purpose.CHOICES, positions)
        views = view * self.latents.views[[shard for shard, _ in places]] >> 32
        self.latents.moments(places, views.tolist(), partial(new, "moments"))
        new("t", positions.shape, np.int64)[:] = timestep * self.source.timesteps >> 32
        draw, condition = self.source.examples.draw, self.latents.condition
        drawn = [
            draw(condition(*place), chance) for place, chance in zip(places, (caption * _WORD).tolist(), strict=True)
        ]
        for name, array in self.source.examples.batch(drawn, dropped * _WORD).items():
            new(name, array.shape, array.dtype)[...] = array

    def key(self, sample: SamplePosition) -> str:
        return self.latents.reader.key(*sample.place)

    def fetch_ahead(self, shards: list[int]) -> None:
        self.latents.reader.fetch_ahead(shards)

    def close(self) -> None:
        self.latents.reader.close()
