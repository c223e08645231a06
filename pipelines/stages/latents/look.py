"""A few samples of a latents artifact, for `ldm inspect`: how the values of each channel are distributed.

Read by range, by the shards' indexes: a shard of a gigabyte in a bucket costs some requests.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.errors import UserError
from pipelines.shards.format import decode_npy
from pipelines.shards.index import ShardIndex, index_name
from pipelines.store.file_table import FileRecord
from pipelines.store.ledger import Artifact
from pipelines.store.threads import map_in_threads

SHARDS = 8
SAMPLES_A_SHARD = 8
BINS = 16


def look(artifact: Artifact) -> dict[str, Any]:
    """Return histograms of the posterior means (of a VQ first stage: the latents), a channel each.

    Returns:
        `samples`: how many were looked at, evenly chosen; `edges`: the bins that all channels share; `counts`: of each
        channel, a number for each bin.

    Raises:
        UserError: a shard or its index is damaged.
    """
    files = artifact.files
    shards = files.positions()
    filled = shards[files.table.column("rows").to_numpy()[shards] > 0]
    chosen = [files.at(int(filled[number])) for number in _spread(len(filled), SHARDS)]
    groups = map_in_threads(lambda record: list(_means(artifact, record)), chosen)
    means = [mean for group in groups for mean in group]
    if not means:
        return {"samples": 0, "edges": [], "counts": []}
    # (C, samples * h * w)
    values = np.stack(means, axis=1).reshape(len(means[0]), -1).astype(np.float64)
    edges = np.linspace(values.min(), values.max(), BINS + 1)
    counts = [np.histogram(channel, edges)[0].tolist() for channel in values]
    return {"samples": len(means), "edges": [round(float(edge), 4) for edge in edges], "counts": counts}


def _means(artifact: Artifact, record: FileRecord) -> Iterator[NDArray[np.float16]]:
    """Yield the (C, h, w) means of some samples of a shard."""
    storage = artifact.storage
    try:
        index = ShardIndex.decode(storage.read_bytes(index_name(record.name)), shard_bytes=record.bytes)
        for row in _spread(len(index), SAMPLES_A_SHARD):
            span = index.spans(row)["latent.npy"]
            data = storage.read_range(record.name, span.offset, span.offset + span.size)
            if zlib.crc32(data) != span.crc32:
                raise ValueError(f"{index.key(row)}.latent.npy is not what its index says")
            yield decode_npy(data)[0]
    except (ValueError, KeyError) as error:
        raise UserError(
            f"{storage.url}/{record.name} is damaged ({error}): `ldm verify {storage.url}` tells what is whole"
        ) from error


def _spread(count: int, most: int) -> list[int]:
    """Return up to `most` numbers below `count`, evenly spread."""
    chosen = min(count, most)
    return [number * count // chosen for number in range(chosen)]
