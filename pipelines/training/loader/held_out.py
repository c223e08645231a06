"""The held-out stream: samples that nothing is trained on, for a loss that is measured while training goes on.

It is a function of the artifact and the seed alone: each time, on any number of workers and after any restart, the same
samples at the same positions, and therefore with the same noise, captions and timesteps. The positions are beyond all
that training reaches, so that what is drawn for a held-out sample is drawn for no other. Timesteps are stratified: the
position says which quartile of the chain a sample's lies in, and all have equally many.

Torch is not imported here: batches are made by the loader's processes too.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pipelines.shards.order import Place, SamplePosition

QUARTILES = 4
# A multiple of QUARTILES; the positions of training samples count from 0.
FIRST_POSITION = 1 << 62


def held_out_batches(
    places: Sequence[Place], buckets: Sequence[str], most: int, batch_size: int
) -> list[list[SamplePosition]]:
    """Return the held-out samples that are looked at, in batches of one bucket each.

    They are the first ones, each once; or if all are at most a quarter of `most`, all of them, each in every quartile.

    Args:
        places: of the held-out samples, in their own order; at least one.
        buckets: the bucket of each shard; empty if there are none.
        most: how many samples are looked at at most, a positive multiple of QUARTILES.
        batch_size: samples of a batch, but for the last one of each bucket.
    """
    if len(places) <= max(most // QUARTILES, QUARTILES - 1):
        places = [place for place in places for _ in range(QUARTILES)]
    count = min(len(places), most) // QUARTILES * QUARTILES
    found: dict[str, list[SamplePosition]] = {}
    for number, (shard, row) in enumerate(places[:count]):
        sample = SamplePosition(FIRST_POSITION + number, 0, shard, row)
        found.setdefault(buckets[shard] if buckets else "", []).append(sample)
    return [each[start : start + batch_size] for each in found.values() for start in range(0, len(each), batch_size)]


def is_held_out(positions: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Tell which positions are of the held-out stream, (B,)."""
    return positions >= FIRST_POSITION


def stratified(words: NDArray[np.int64], positions: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return words of random bits that lie in the quartile of each held-out sample; those of others as they are.

    The quartiles, of the least numbers first, follow each other by position.

    Args:
        words: (B,) numbers from 0 to 2**32 - 1, each drawn for the sample at its position.
        positions: (B,) positions of the samples.
    """
    return np.where(is_held_out(positions), (positions % QUARTILES << 30) + (words >> 2), words)
