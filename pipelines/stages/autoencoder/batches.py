"""The batches that a first stage is trained on; made without torch, see `pipelines.training.loader`.

Shapes: pixels: (B, H, W, 3) uint8; noise: (B, C, h, w), which the posterior is sampled with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from pipelines.shards.buckets import buckets_of, order_of
from pipelines.shards.mixture import Part
from pipelines.shards.order import SamplePosition
from pipelines.shards.randomness import Purpose, generator
from pipelines.stages.pairs.artifact import Pictures, open_pairs
from pipelines.stages.pairs.held_out import held_out_places
from pipelines.store.ledger import Artifact
from pipelines.training.loader.source import NewArray

# Number of shards whose pictures are mixed with each other at a time.
SHUFFLE_WINDOW = 16


@dataclass(frozen=True)
class PictureSource:
    """All that decides which batches there are; see `pipelines.training.loader.source`.

    Attributes:
        pairs: the finished artifact.
        seed, batch_size, partitions: see `SampleOrder`, and `BucketOrder` for pairs with buckets.
        embed_dim, downsampling_factor: of the first stage.
    """

    pairs: Artifact
    seed: int
    batch_size: int
    partitions: int
    embed_dim: int
    downsampling_factor: int

    def open(self) -> PictureBatches:
        return PictureBatches(self)


class PictureBatches:
    """Reads and decodes pictures, and draws the noise of their posteriors."""

    def __init__(self, source: PictureSource) -> None:
        self.source = source
        self.reader = open_pairs(source.pairs)
        self.pictures = Pictures(self.reader)
        self.held_out = held_out_places(source.pairs)
        self.buckets = buckets_of(source.pairs.shards().names)
        self.order = order_of(
            [Part(self.reader.rows_per_shard, self.held_out)],
            self.buckets,
            source.seed,
            SHUFFLE_WINDOW,
            batch_size=source.batch_size,
            partitions=source.partitions,
        )

    def assemble(self, samples: Sequence[SamplePosition], new: NewArray) -> None:
        pixels = self.pictures.stack([sample.place for sample in samples], partial(new, "pixels"))
        factor = self.source.downsampling_factor
        shape = (self.source.embed_dim, pixels.shape[1] // factor, pixels.shape[2] // factor)
        noise = new("noise", (len(samples), *shape), np.float32)
        for index, sample in enumerate(samples):
            random = generator(self.source.seed, Purpose.SAMPLE, sample.position)
            random.standard_normal(out=noise[index], dtype=np.float32)
