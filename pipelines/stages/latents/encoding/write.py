"""Write and commit a shard of latents: the work of a task on a CPU."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.shards.format import ShardWriter, encode_npy
from pipelines.shards.index import IndexBuilder
from pipelines.stages.latents.encoding.names import latent_file
from pipelines.stages.latents.encoding.shards import EncodedShard
from pipelines.stages.latents.shard import Identity, ShardCommit, Written
from pipelines.stages.latents.statistics import ShardStatistics
from pipelines.store.commits import ArtifactWriter
from pipelines.store.ledger import Artifact


class WriteShard:
    """Writes shards of latents, each with its index and its statistics. A committed one is never replaced.

    Args:
        pairs: the finished artifact of the pairs.
        writer: the artifact of latents being made.
    """

    def __init__(self, *, pairs: Artifact, writer: ArtifactWriter) -> None:
        self.pairs, self.writer = pairs, writer

    def __call__(self, shard: EncodedShard) -> dict[str, Any]:
        """Write and commit one shard.

        Returns:
            `rows` of the pairs shard, `unencodable` keys of it, and `records` of the files committed.

        Raises:
            UserError: what is committed is damaged; see `ShardCommit`.
        """
        item = shard.item
        identity = Identity(item.get("origin"), item.get("content"))
        commit = ShardCommit(self.pairs, self.writer, item["shard"], item["sha256"], item["rows"], identity)
        committed = commit(partial(self._write, shard))
        return {
            "rows": item["rows"],
            "unencodable": list(committed.statistics.unencodable),
            "records": [record.model_dump() for record in committed.records],
        }

    def _write(self, shard: EncodedShard, path: Path) -> Written:
        """Write the encoded samples of a shard to a local file; return what is known of it."""
        assert shard.moments is not None, f"{shard.item['shard']} was committed when it was to be read, and is not now"
        index, facts, statistics = IndexBuilder(), list[bytes](), ShardStatistics()
        with ShardWriter(path, index) as tar:
            for row, (key, files) in enumerate(zip(shard.keys, shard.files, strict=True)):
                views = shard.moments[:, row]
                # As stored: a finite fp32 value beyond 65,504 is infinite in fp16.
                if np.isfinite(views).all():
                    for moments in views:
                        statistics.add(key, moments)
                    latents = {latent_file(view): encode_npy(moments) for view, moments in enumerate(views)}
                    tar.add(key, {**latents, **files})
                    facts.append(shard.facts[row])
                else:
                    statistics.unencodable[key] = row
        return Written(tar.sha256, index.index().with_facts(facts), statistics)
