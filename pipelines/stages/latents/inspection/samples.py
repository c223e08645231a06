"""A few samples of a latents artifact, evenly chosen, and the pictures that they were made from.

Latents are read by range, by the shards' indexes: a shard of a gigabyte in a bucket costs some requests. Shards of
pairs have no index, and are fetched whole.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.errors import UserError
from pipelines.shards.format import decode_npy
from pipelines.shards.index import ShardIndex, index_name, scan_shard
from pipelines.shards.tar_headers import TarError
from pipelines.stages.latents.encoding.names import latent_file
from pipelines.stages.pairs.artifact import damaged_pairs, decode_image, image_of, whole_shard
from pipelines.store.file_table import FileRecord
from pipelines.store.ledger import Artifact
from pipelines.store.storage import Storage


@dataclass(frozen=True)
class Sample:
    """A sample of a latents artifact: the name of its shard, its key, its json, and its files by extension."""

    shard: str
    key: str
    facts: bytes
    files: dict[str, bytes]

    @property
    def moments(self) -> NDArray[np.float16]:
        """(2, C, h, w) mean and log-variance of a KL first stage, (1, C, h, w) latent of a VQ one."""
        return self.of_view(0)

    def of_view(self, view: int) -> NDArray[np.float16]:
        """Return the moments of a view of the picture."""
        moments: NDArray[np.float16] = decode_npy(self.files[latent_file(view)])
        return moments


def choose(artifact: Artifact, samples: int, *, shards: int) -> list[tuple[FileRecord, int]]:
    """Choose evenly up to `shards` of the shards that hold samples, and how many of all `samples` each gives."""
    files = artifact.files
    positions = files.positions()
    filled = positions[files.table.column("rows").to_numpy()[positions] > 0]
    chosen = spread(len(filled), min(shards, samples))
    counts = (samples * (i + 1) // len(chosen) - samples * i // len(chosen) for i in range(len(chosen)))
    return [(files.at(int(filled[number])), count) for number, count in zip(chosen, counts, strict=True)]


def spread(count: int, most: int) -> list[int]:
    """Return up to `most` numbers below `count`, evenly spread."""
    chosen = min(count, most)
    return [number * count // chosen for number in range(chosen)]


def read_index(storage: Storage, record: FileRecord) -> ShardIndex:
    """Read the index of a shard, with the json of its samples.

    Raises:
        UserError: it is missing or damaged.
    """
    data = storage.read_bytes(index_name(record.name))
    try:
        index = ShardIndex.decode(data, shard_bytes=record.bytes, facts=True)
    except ValueError as error:
        raise _damaged(storage, record, error) from error
    if not index.has_facts:
        raise _damaged(storage, record, "its index lacks the json of its samples")
    return index


def read_samples(storage: Storage, record: FileRecord, index: ShardIndex, most: int) -> list[Sample]:
    """Read up to `most` samples of a shard, evenly spread, each file held against its checksum.

    Raises:
        UserError: the shard is damaged.
    """
    return [_read(storage, record, index, row) for row in spread(len(index), most)]


def _read(storage: Storage, record: FileRecord, index: ShardIndex, row: int) -> Sample:
    files = {}
    for extension, span in index.spans(row).items():
        data = storage.read_range(record.name, span.offset, span.offset + span.size)
        if zlib.crc32(data) != span.crc32:
            raise _damaged(storage, record, f"{index.key(row)}.{extension} is not what its index says")
        files[extension] = data
    if "latent.npy" not in files:
        raise _damaged(storage, record, f"sample {index.key(row)} has no latent")
    return Sample(record.name, index.key(row), index.facts(row), files)


def _damaged(storage: Storage, record: FileRecord, problem: object) -> UserError:
    return UserError(
        f"{storage.url}/{record.name} is damaged ({problem}): `ldm verify {storage.url}` tells what is whole"
    )


@dataclass(frozen=True)
class Original:
    """What latents were made from: the picture of the pairs, (H, W, 3) uint8, and the files beside it."""

    pixels: NDArray[np.uint8]
    files: dict[str, Any]


def originals(pairs: Artifact, shard: str, keys: Iterable[str]) -> dict[str, Original]:
    """Return the samples of a shard of pairs that have these keys; those that it does not hold are left out.

    Raises:
        UserError: the shard is missing or damaged.
    """
    if (record := pairs.files.get(shard)) is None:
        raise damaged_pairs(pairs, shard, "is not among the files of its artifact")
    wanted, found = set(keys), {}
    with whole_shard(pairs, shard, record.sha256) as path, open(path, "rb") as file:
        try:
            index = scan_shard(file, checksums=False)
        except TarError as error:
            raise damaged_pairs(pairs, shard, f"is not a whole tar ({error})") from error
        for row, key in enumerate(index.keys):
            if key in wanted:
                files: dict[str, Any] = {"__key__": key}
                for extension, span in index.spans(row).items():
                    file.seek(span.offset)
                    files[extension] = file.read(span.size)
                found[key] = Original(decode_image(image_of(files)), files)
    return found


def gone(artifact: Artifact, stage: str) -> str:
    """Say that the artifact of a stage that this one was made from is not there."""
    reference = artifact.manifest.upstream.get(stage)
    return f"{stage} {reference} is no more under this root" if reference else f"no {stage} is named in the manifest"
