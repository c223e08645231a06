"""The same latents in four layouts: ours, which webdataset reads too, MDS, and Parquet.

A sample: 256 px in an f=8 first stage, moments (2, 4, 32, 32) fp16, and the (77,) uint16 ids of one caption; the first
two ids are the sample's number, so that a reader shows in which order it gives them out.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ldm_core.configs.objective import TimestepsConfig
from ldm_core.configs.schedule import ScheduleConfig
from pipelines.conditions.examples import CaptionExamples
from pipelines.shards.format import ShardWriter, encode_npy
from pipelines.shards.index import IndexBuilder, index_name
from pipelines.stages.diffusion.batches import LatentSource
from pipelines.stages.latents.artifact import FORMAT_VERSION
from pipelines.stages.pairs.held_out import commit_held_out
from pipelines.store.commits import ArtifactWriter
from pipelines.store.file_table import FileRecord, FileTable
from pipelines.store.ledger import Artifact
from pipelines.store.manifest import write_files
from pipelines.store.storage import Storage

SHAPE, LENGTH = (2, 4, 32, 32), 77
# Ids are below this: the first two are the digits of the sample's number.
BASE = 40_000
RAW_BYTES = 2 * (int(np.prod(SHAPE)) + LENGTH)


def sample(number: int) -> tuple[NDArray[np.float16], NDArray[np.uint16]]:
    """Return the moments of a sample, which nothing can compress, and its (1, 77) ids."""
    random = np.random.default_rng(number)
    moments = random.integers(0, 0x7800, SHAPE, np.uint16).view(np.float16)
    tokens = random.integers(0, 30_000, (1, LENGTH)).astype(np.uint16)
    tokens[0, :2] = divmod(number, BASE)
    return moments, tokens


def numbers_of(tokens: Any) -> list[int]:
    """Return which samples a batch holds, from its (B, 77) ids."""
    first = tokens[:, :2].tolist()
    return [high * BASE + low for high, low in first]


def make_latents(root: Path, shards: int, rows: int) -> Artifact:
    """Write a finished artifact of latents, as the stage does."""
    writer = ArtifactWriter("latents", "bench", Storage(str(root)))
    for shard in range(shards):
        write_shard(writer, f"{shard:06d}.tar", range(shard * rows, (shard + 1) * rows))
    return _finish(writer)


def write_shard(writer: ArtifactWriter, name: str, numbers: range) -> None:
    """Write and commit a shard and its index."""
    index, facts = IndexBuilder(), []
    with writer.storage.writer(name) as path, ShardWriter(path, index) as tar:
        for number in numbers:
            moments, tokens = sample(number)
            caption = f"a photograph of number {number}, as somebody has described it"
            facts.append(json.dumps({"captions": [caption], "width": 1152}).encode())
            tar.add(f"{number:09d}", {"latent.npy": encode_npy(moments), "tokens.npy": encode_npy(tokens)})
    writer.commit(name, rows=len(numbers), sha256=tar.sha256)
    writer.storage.write_bytes(index_name(name), index.index().with_facts(facts).encode())
    writer.commit(index_name(name))


def make_large(root: Path, shards: int, rows: int, used: Callable[[Artifact], set[int]]) -> Artifact:
    """Write an artifact of so many shards that are all the same one; only those that `used` names are there.

    Args:
        root: an empty folder.
        shards: how many its table names.
        rows: samples of each.
        used: tells the numbers of the shards that will be read, from the artifact.
    """
    made = make_latents(root / "one", 1, rows)
    files = {record.name: record for record in made.files}
    tar, index = files["000000.tar"], files[index_name("000000.tar")]
    storage = Storage(str(root / "many"))
    records = (
        FileRecord(name=name, rows=of.rows, bytes=of.bytes, sha256=of.sha256)
        for shard in range(shards)
        for name, of in ((f"{shard:06d}.tar", tar), (index_name(f"{shard:06d}.tar"), index))
    )
    manifest = made.manifest.model_copy(update=write_files(storage, FileTable.of(records)))
    storage.write_json("manifest.json", manifest.model_dump(mode="json"))
    name = made.details["held_out"]
    storage.write_bytes(name, made.storage.read_bytes(name))
    artifact = Artifact(made.stage, made.key, storage)
    for shard in used(artifact):
        for name, of in ((f"{shard:06d}.tar", tar), (index_name(f"{shard:06d}.tar"), index)):
            path = Path(storage.path(name))
            path.parent.mkdir(parents=True, exist_ok=True)
            os.link(made.storage.path(of.name), path)
    return artifact


def _finish(writer: ArtifactWriter) -> Artifact:
    held_out = commit_held_out(writer, 0, [])
    writer.finish(
        format_version=FORMAT_VERSION,
        config={},
        identity={},
        upstream={},
        details={"held_out": held_out},
        seconds=0.0,
        code_version="bench",
    )
    return Artifact(writer.stage, writer.key, writer.storage)


def source_of(artifact: Artifact, *, batch_size: int, window: int = 16, partitions: int = 64) -> LatentSource:
    """Return what training would make its batches from."""
    return LatentSource(
        mixed=(),
        weights=(1,),
        latents=artifact,
        files=("tokens.npy",),
        examples=CaptionExamples("tokens.npy", [0] * LENGTH, 0.0),
        seed=0,
        shuffle_window=window,
        batch_size=batch_size,
        partitions=partitions,
        schedule=ScheduleConfig(),
        timesteps=TimestepsConfig(),
    )


def make_parquet(folder: Path, count: int, rows: int) -> None:
    """Write files of `rows` samples: a column of bytes for each array, uncompressed."""
    folder.mkdir(parents=True)
    for first in range(0, count, rows):
        found = [sample(number) for number in range(first, min(first + rows, count))]
        table = pa.table(
            {
                "latent": pa.array([moments.tobytes() for moments, _ in found], pa.binary(RAW_BYTES - 2 * LENGTH)),
                "tokens": pa.array([tokens.tobytes() for _, tokens in found], pa.binary(2 * LENGTH)),
            }
        )
        pq.write_table(table, folder / f"{first // rows:06d}.parquet", compression="none", use_dictionary=False)


def folder_bytes(folder: Path, *suffixes: str) -> int:
    """Return the size of the files below a folder, or of those with these endings."""
    return sum(
        path.stat().st_size
        for path in folder.rglob("*")
        if path.is_file() and (not suffixes or path.suffix in suffixes)
    )
