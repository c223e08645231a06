"""A few samples of a latents artifact, for `ldm inspect`: how the values of each channel are distributed."""

from __future__ import annotations

from typing import Any

import numpy as np

from pipelines.stages.latents.inspection.samples import choose, read_index, read_samples
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
    storage = artifact.storage
    groups = map_in_threads(
        lambda each: read_samples(storage, each[0], read_index(storage, each[0]), each[1]),
        choose(artifact, SHARDS * SAMPLES_A_SHARD, shards=SHARDS),
    )
    means = [sample.moments[0] for group in groups for sample in group]
    if not means:
        return {"samples": 0, "edges": [], "counts": []}
    # (C, samples * h * w)
    values = np.stack(means, axis=1).reshape(len(means[0]), -1).astype(np.float64)
    edges = np.linspace(values.min(), values.max(), BINS + 1)
    counts = [np.histogram(channel, edges)[0].tolist() for channel in values]
    return {"samples": len(means), "edges": [round(float(edge), 4) for edge in edges], "counts": counts}
