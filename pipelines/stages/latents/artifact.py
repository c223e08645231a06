"""Reading the latent cache: posterior moments and token ids by (shard, row), kept in memory as long as they fit.

moments: (2, C, h, w) mean and log-variance of a KL first stage, (1, C, h, w) latent of a VQ one, float16
tokens: (captions, L) uint16
"""

from __future__ import annotations

from itertools import chain

import numpy as np
from numpy.typing import NDArray

from pipelines.shards.format import decode_json, decode_npy
from pipelines.shards.order import Place
from pipelines.shards.reader import ShardReader
from pipelines.stages.pairs.held_out import held_out_places
from pipelines.store.ledger import Artifact

# Raised when the bytes that the stage writes, or their meaning, change. Its writer and its readers go by this number.
FORMAT_VERSION = 3
CACHE_BYTES = 1 << 30

Cached = tuple[NDArray[np.float16], NDArray[np.uint16]]


class Latents:
    """The samples of a latents artifact.

    Args:
        artifact: a finished artifact of the `latents` stage.
        cache_bytes: how many bytes of decoded samples are kept in memory.

    Raises:
        UserError: the artifact is another stage's, or of another format version.
    """

    def __init__(self, artifact: Artifact, *, cache_bytes: int = CACHE_BYTES) -> None:
        self.reader = ShardReader(artifact.storage, artifact.require("latents", FORMAT_VERSION).files)
        self._room = cache_bytes
        self._kept: dict[Place, Cached] = {}
        # By ascending hash; nothing is trained on them.
        self.held_out = held_out_places(artifact)

    def get(self, shard: int, row: int) -> Cached:
        """Return the moments and the tokens of all captions of one sample."""
        if (kept := self._kept.get((shard, row))) is not None:
            return kept
        files = self.reader.read(shard, row, ("latent.npy", "tokens.npy"))
        sample = decode_npy(files["latent.npy"]), decode_npy(files["tokens.npy"])
        size = sample[0].nbytes + sample[1].nbytes
        # Never evicted: every epoch visits all samples once, so that the least recently used one is needed soonest.
        if size <= self._room:
            self._kept[shard, row] = sample
            self._room -= size
        return sample

    def captions(self, limit: int) -> list[str]:
        """Return `limit` distinct captions: of the held-out samples, then of the others in the order of the shards."""
        distinct: dict[str, None] = {}
        every = ((shard, row) for shard, rows in enumerate(self.reader.rows_per_shard) for row in range(rows))
        for place in chain(self.held_out, every):
            facts = decode_json(self.reader.read(*place, ("json",))["json"])
            distinct.setdefault(facts["captions"][0])
            if len(distinct) == limit:
                break
        return list(distinct)
