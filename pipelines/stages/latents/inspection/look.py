"""A few samples of a latents artifact, for `ldm inspect`: the values of each channel, tokens, bytes a sample."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from pipelines.conditions.lengths import Lengths, token_lengths
from pipelines.shards.index import ShardIndex, index_name
from pipelines.stages.latents.encoding.names import latent_files
from pipelines.stages.latents.inspection.samples import Sample, choose, read_index, read_samples
from pipelines.store.file_table import FileRecord
from pipelines.store.ledger import Artifact
from pipelines.store.threads import map_in_threads

SHARDS = 8
SAMPLES_A_SHARD = 8
BINS = 16


def look(artifact: Artifact) -> dict[str, Any]:
    """Return how the posterior means (of a VQ first stage: the latents) are distributed, and what samples hold.

    Returns:
        `samples`: how many were looked at, evenly chosen; `edges`: the bins that all channels share; `counts`: of each
        channel, a number for each bin. `tokens`: for each text encoder the number of `captions`, `mean` and `most`
        tokens of one as they are stored, and their histogram. `bytes_a_sample`: of the shards looked into.

    Raises:
        UserError: a shard or its index is damaged.
    """
    return facts_of(artifact, choose(artifact, SHARDS * SAMPLES_A_SHARD, shards=SHARDS))


def facts_of(artifact: Artifact, chosen: Iterable[tuple[FileRecord, int]]) -> dict[str, Any]:
    """Return the same of some shards, and so many samples of each."""
    storage = artifact.storage

    def read(each: tuple[FileRecord, int]) -> tuple[FileRecord, ShardIndex, list[Sample]]:
        record, count = each
        index = read_index(storage, record)
        return record, index, read_samples(storage, record, index, count)

    shards = list(map_in_threads(read, chosen))
    samples = [sample for *_, of_shard in shards for sample in of_shard]
    if not samples:
        return {"samples": 0, "edges": [], "counts": [], "tokens": {}, "bytes_a_sample": {}}
    means = [sample.moments[0] for sample in samples]
    # (C, values)
    channels = np.concatenate([each.reshape(len(each), -1) for each in means], axis=1).astype(np.float64)
    edges = np.linspace(channels.min(), channels.max(), BINS + 1)
    return {
        "samples": len(samples),
        "edges": [round(float(edge), 4) for edge in edges],
        "counts": [np.histogram(channel, edges)[0].tolist() for channel in channels],
        "tokens": _tokens([token_lengths(sample.files, artifact.details) for sample in samples]),
        "bytes_a_sample": _bytes_a_sample(artifact, [(record, index) for record, index, _ in shards]),
    }


def _tokens(lengths: Sequence[Lengths]) -> dict[str, Any]:
    facts = {}
    for name in lengths[0]:
        captions = [length for of_sample in lengths for length in of_sample[name]]
        width = math.ceil((max(captions) + 1) / BINS)
        edges = list(range(0, max(captions) + 1 + width, width))
        facts[name] = {
            "captions": len(captions),
            "mean": round(sum(captions) / len(captions), 2),
            "most": max(captions),
            "edges": edges,
            # The last bin of numpy's holds its upper edge too, which no caption reaches.
            "counts": np.histogram(captions, edges)[0].tolist(),
        }
    return facts


def _bytes_a_sample(artifact: Artifact, shards: Sequence[tuple[FileRecord, ShardIndex]]) -> dict[str, float]:
    """Return how many bytes of a sample are latent, condition, the tar around them, json, and the rest of the index."""
    sums, rows = Counter[str](), 0
    for record, index in shards:
        rows += len(index)
        contents = 0
        facts = 0
        for row in range(len(index)):
            facts += len(index.facts(row))
            spans = index.spans(row)
            latents = latent_files(spans)
            for extension, span in spans.items():
                sums["latent" if extension in latents else "condition"] += span.size
                contents += span.size
        sums["tar"] += record.bytes - contents
        sums["json"] += facts
        sums["index"] += artifact.files[index_name(record.name)].bytes - facts
    return {part: round(sums[part] / rows, 1) for part in ("latent", "condition", "json", "tar", "index")}
