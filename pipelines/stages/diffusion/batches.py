"""The batches that a diffusion model is trained on; made without torch, see `pipelines.training.loader`.

Shapes: moments: (B, 2, C, h, w) or (B, 1, C, h, w); positions, t: (B,); of the condition, what its kind says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ldm_core.configs.objective import TimestepsConfig
from ldm_core.configs.schedule import ScheduleConfig
from ldm_core.timesteps import draw_timesteps
from pipelines.conditions.examples import Examples
from pipelines.shards.buckets import order_of
from pipelines.shards.order import SamplePosition
from pipelines.shards.randomness import Purpose, words
from pipelines.stages.latents.artifact import Latents
from pipelines.store.ledger import Artifact
from pipelines.training.loader.held_out import is_held_out, stratified
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
        schedule, timesteps: the forward process, and the distribution of its timesteps.
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
    schedule: ScheduleConfig
    timesteps: TimestepsConfig

    def open(self) -> LatentBatches:
        return LatentBatches(self)


class LatentBatches:
    """Reads moments and conditions, and draws everything random about a sample but the noise."""

    def __init__(self, source: LatentSource) -> None:
        self.source = source
        self.latents = Latents(source.latents, source.files, source.examples.decode, source.mixed)
        self.reader = self.latents.reader
        # Those that the model is compared with, and not of what is mixed in.
        self.held_out = self.latents.held_out
        self.buckets = self.latents.buckets
        self.order = order_of(
            self.latents.parts(source.weights),
            self.buckets,
            source.seed,
            source.shuffle_window,
            batch_size=source.batch_size,
            partitions=source.partitions,
        )

    def assemble(self, samples: Sequence[SamplePosition], new: NewArray) -> None:
        places = [sample.place for sample in samples]
        positions = new("positions", (len(samples),), np.int64)
        positions[:] = [sample.position for sample in samples]
        # What each word is for is fixed: another use would be another training run.
        timestep, caption, dropped, view = words(self.source.seed, Purpose.CHOICES, positions)
        held_out = is_held_out(positions)
        # Of a held-out sample the picture as it is, with its condition.
        view, uniform = np.where(held_out, 0, view), np.where(held_out, 1.0, dropped * _WORD)
        views = view * self.latents.views[[shard for shard, _ in places]] >> 32
        self.latents.moments(places, views.tolist(), partial(new, "moments"))
        t = self._timesteps(stratified(timestep, positions) * _WORD, held_out)
        new("t", t.shape, t.dtype)[:] = t
        draw, condition = self.source.examples.draw, self.latents.condition
        drawn = [
            draw(condition(*place), chance) for place, chance in zip(places, (caption * _WORD).tolist(), strict=True)
        ]
        for name, array in self.source.examples.batch(drawn, uniform).items():
            new(name, array.shape, array.dtype)[...] = array

    def _timesteps(self, chances: NDArray[Any], held_out: NDArray[np.bool_]) -> NDArray[Any]:
        """Return the timesteps that numbers in [0, 1) stand for; held-out samples have all alike in every recipe."""
        drawn = draw_timesteps(chances, self.source.schedule, self.source.timesteps)
        if not held_out.any():
            return drawn
        evenly = draw_timesteps(chances, replace(self.source.schedule, shift=1.0), TimestepsConfig())
        return np.where(held_out, evenly, drawn)
