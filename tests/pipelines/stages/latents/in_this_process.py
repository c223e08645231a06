"""The latents stage in this process: real encoders, and a pool that is a loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from pipelines.compute.chain import PoolSize
from pipelines.shards.format import ShardWriter, read_shard
from pipelines.stage import StageContext
from pipelines.stages.latents import work
from pipelines.stages.latents.artifact import FORMAT_VERSION
from pipelines.stages.latents.config import LatentsConfig
from pipelines.stages.pairs.artifact import PAIRS_FORMAT
from pipelines.store.commits import ArtifactWriter
from pipelines.store.file_table import FileTable
from pipelines.store.ledger import Artifact
from pipelines.store.storage import Storage
from pipelines.tracking import null_stage_tracker
from tests.in_this_process import call_all
from tests.tiny_artifacts import finish, hold_out, latents_config

CONFIG = latents_config(batch_size=2, workers=1)
Siblings = Callable[[], Iterator[tuple[Storage, FileTable]]]


def make(
    root: Path,
    key: str,
    pairs: Artifact,
    first_stage: Artifact,
    config: LatentsConfig = CONFIG,
    siblings: Siblings = lambda: iter(()),
) -> Artifact:
    """Run the stage, with actors that are objects of this process."""
    writer = ArtifactWriter("latents", key, Storage(str(root)) / "latents" / key)
    upstream = {"pairs": pairs, "autoencoder": first_stage}
    context = StageContext(
        config=config,
        seed=0,
        writer=writer,
        upstream=upstream,
        tracker=null_stage_tracker(),
        progress=lambda done, total, **facts: None,
        scratch=root,
        siblings=siblings,
    )
    threads = torch.get_num_threads()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(work, "pool_size", lambda *args, **options: PoolSize(workers=1, use_gpu=False, most=1))
            patch.setattr(work, "map_through", call_all)
            # What is known of the nodes of a cluster.
            patch.setattr(work, "_shards_in_flight", lambda *args: 1)
            patch.setattr(work, "require_nodes", lambda *args, **options: None)
            details = work.run(context)
    finally:
        torch.set_num_threads(threads)
    return finish(writer, details, FORMAT_VERSION, upstream)


def reordered(root: Path, pairs: Artifact, name: str) -> Artifact:
    """Copy a pairs artifact with its shards in reverse, their samples under the keys of their new places."""
    writer = ArtifactWriter("pairs", name, Storage(str(root)) / "pairs" / name)
    for shard, record in enumerate(reversed(list(pairs.shards()))):
        with (
            pairs.storage.open(record.name) as file,
            writer.storage.writer(f"{shard:06d}.tar") as path,
            ShardWriter(path) as tar,
        ):
            for row, sample in enumerate(read_shard(file)):
                tar.add(f"{shard:05d}{row:04d}", {k: v for k, v in sample.items() if not k.startswith("__")})
        writer.commit(f"{shard:06d}.tar", rows=record.rows, sha256=tar.sha256, content=tar.content)
        with pairs.storage.open(record.name.replace("tar", "parquet")) as table:
            writer.storage.write_bytes(f"{shard:06d}.parquet", table.read())
        writer.commit(f"{shard:06d}.parquet")
    return finish(writer, {**pairs.details, "held_out": hold_out(writer)}, PAIRS_FORMAT)
