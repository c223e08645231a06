"""Reading the latent cache: posterior moments and conditions by (shard, row), kept in memory as long as they fit.

moments: (2, C, h, w) mean and log-variance of a KL first stage, (1, C, h, w) latent of a VQ one, float16
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.shards.format import decode_json, decode_npy
from pipelines.shards.mixture import Part, joined
from pipelines.shards.reader import ShardReader
from pipelines.stages.latents.encoding.views import latent_file
from pipelines.stages.pairs.held_out import held_out_places
from pipelines.store.ledger import Artifact

# Raised when the bytes that the stage writes, or their meaning, change. Its writer and its readers go by this number.
FORMAT_VERSION = 3
CACHE_BYTES = 1 << 30

# Of one sample: its moments, and what is cached of its condition.
Cached = tuple[NDArray[np.float16], tuple[NDArray[Any], ...]]


def _nothing(files: Mapping[str, bytes]) -> tuple[NDArray[Any], ...]:
    return ()


class Latents:
    """The samples of a latents artifact, and of others that it is mixed with.

    Args:
        artifact: a finished artifact of the `latents` stage.
        files: extensions of the condition's files to read.
        decode: decodes these files.
        mixed: other such artifacts; their shards are numbered after those of the first.
        cache_bytes: how many bytes of decoded samples are kept in memory.

    Raises:
        UserError: the artifact is another stage's, or of another format version.
    """

    def __init__(
        self,
        artifact: Artifact,
        files: tuple[str, ...] = (),
        decode: Callable[[Mapping[str, bytes]], tuple[NDArray[Any], ...]] = _nothing,
        *,
        mixed: Sequence[Artifact] = (),
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        self._artifacts = (artifact, *mixed)
        self._readers = [
            ShardReader(each.storage, each.require("latents", FORMAT_VERSION).files) for each in self._artifacts
        ]
        self.reader = joined(self._readers)
        self._files, self._decode = files, decode
        self._room = cache_bytes
        self._kept: dict[tuple[int, int, int], Cached] = {}
        self.views: int = artifact.details.get("views", 1)
        # Of the first artifact, by ascending hash; nothing is trained on them.
        self.held_out = held_out_places(artifact)

    def parts(self, weights: Sequence[int]) -> list[Part]:
        """Return the samples of each artifact to train on, with its weight; without those that it holds out."""
        return [
            Part(reader.rows_per_shard, held_out_places(artifact), weight)
            for artifact, reader, weight in zip(self._artifacts, self._readers, weights, strict=True)
        ]

    def get(self, shard: int, row: int, view: int = 0) -> Cached:
        """Return the moments of one view of a sample, and what `decode` makes of the files of its condition."""
        if (kept := self._kept.get((shard, row, view))) is not None:
            return kept
        latent = latent_file(view)
        files = self.reader.read(shard, row, (latent, *self._files))
        sample = decode_npy(files[latent]), self._decode(files)
        size = sample[0].nbytes + sum(array.nbytes for array in sample[1])
        # Never evicted: every epoch visits all samples once, so that the least recently used one is needed soonest.
        if size <= self._room:
            self._kept[shard, row, view] = sample
            self._room -= size
        return sample

    def facts(self) -> Iterator[Mapping[str, Any]]:
        """Yield the facts of all samples: of the held-out ones, then of the others in the order of the shards."""
        every = ((shard, row) for shard, rows in enumerate(self.reader.rows_per_shard) for row in range(rows))
        held_out = set(self.held_out)
        for place in chain(self.held_out, (place for place in every if place not in held_out)):
            yield decode_json(self.reader.read(*place, ("json",))["json"])
