"""The order in which training sees the samples: a pure function of (rows of the shards, excluded rows, seed, epoch).

In each epoch the shards are permuted, then the samples are shuffled within windows of consecutive shards: a shuffle of
all samples would read one sample of a shard at a time, a shuffle of shards alone would keep neighbours together. The
number of samples consumed, the cursor, is the whole state, so a run can resume with any number of workers. Nothing is
read to skip ahead, and no more than two windows' permutations are held in memory.
"""

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipelines.shards.randomness import Purpose, generator

# The number of a shard, and of a sample in it.
Place = tuple[int, int]


class SamplePosition(NamedTuple):
    """One sample in the endless sequence: `position` counts from the first sample of epoch 0."""

    position: int
    epoch: int
    shard: int
    row: int

    @property
    def place(self) -> Place:
        return self.shard, self.row


class SampleOrder:
    """An endless sequence of samples, epoch after epoch, each epoch a permutation of all rows but the excluded ones.

    Args:
        rows_per_shard: number of samples in each shard; empty shards are allowed.
        seed: the run's seed.
        window: number of consecutive shards whose samples are mixed with each other.
        excluded: the samples that are left out.

    Raises:
        ValueError: there is no sample at all, or the window is not positive.
    """

    def __init__(
        self,
        rows_per_shard: Sequence[int] | NDArray[np.int64],
        seed: int,
        window: int,
        *,
        excluded: Iterable[Place] = (),
    ) -> None:
        if window < 1:
            raise ValueError(f"window must be at least 1 shard, got {window}")
        rows = np.array(rows_per_shard, dtype=np.int64)
        self._kept_before = _kept_before(excluded)
        for shard, kept_before in self._kept_before.items():
            rows[shard] -= len(kept_before)
        # Empty shards would make windows of unequal use; they hold nothing to order.
        self._shards = np.flatnonzero(rows > 0)
        self._rows = rows[self._shards]
        self.samples_per_epoch = int(self._rows.sum())
        if self.samples_per_epoch == 0:
            raise ValueError(f"there must be at least one sample, got none in {len(rows_per_shard)} shards")
        self.seed, self.window = seed, window
        # Two of each: the window in use and the next one, which is fetched ahead and may lie in the next epoch.
        self._epoch_plan = lru_cache(maxsize=2)(self._plan_epoch)
        self._window_order = lru_cache(maxsize=2)(self._shuffle_window)

    def sample(self, position: int) -> SamplePosition:
        """Return the sample at a position of the endless sequence."""
        # Position -> epoch and offset in it -> window -> place in the window's permutation -> shard and row.
        epoch, offset = divmod(position, self.samples_per_epoch)
        shards, window_starts = self._epoch_plan(epoch)
        window = int(np.searchsorted(window_starts, offset, side="right")) - 1
        order, row_starts = self._window_order(epoch, window)
        place = int(order[offset - window_starts[window]])
        slot = int(np.searchsorted(row_starts, place, side="right")) - 1
        shard = int(self._shards[shards[window * self.window + slot]])
        row = place - int(row_starts[slot])
        # Rows were counted without the excluded ones: those that lie before this one are added again.
        if (kept_before := self._kept_before.get(shard)) is not None:
            row += int(np.searchsorted(kept_before, row, side="right"))
        return SamplePosition(position, epoch, shard, row)

    def slice(self, cursor: int, global_batch: int, rank: int, world: int) -> list[SamplePosition]:
        """Return the part of the global batch at `cursor` that belongs to one of `world` workers.

        The parts of all ranks, joined in order, are the same global batch whatever their number.

        Raises:
            ValueError: the batch does not divide among the workers.
        """
        if global_batch % world:
            raise ValueError(f"the global batch of {global_batch} must be divisible by the {world} workers")
        share = global_batch // world
        first = cursor + rank * share
        return [self.sample(position) for position in range(first, first + share)]

    def shards_ahead(self, position: int) -> list[int]:
        """Return the shards to fetch ahead: those of the window at a position, then those of the next one."""
        epoch, offset = divmod(position, self.samples_per_epoch)
        shards, window_starts = self._epoch_plan(epoch)
        window = int(np.searchsorted(window_starts, offset, side="right")) - 1
        ahead = [*shards[window * self.window : (window + 2) * self.window]]
        if window == len(window_starts) - 1:
            ahead += [*self._epoch_plan(epoch + 1)[0][: self.window]]
        return list(dict.fromkeys(int(self._shards[shard]) for shard in ahead))

    def _plan_epoch(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the permuted shards of an epoch, and the offset in the epoch at which each window starts."""
        shards = generator(self.seed, Purpose.SHARD_ORDER, epoch).permutation(len(self._rows))
        ends = np.cumsum(self._rows[shards])
        starts = np.concatenate([[0], ends[self.window - 1 :: self.window]])
        # If the last window is full, its end is listed too; it is the start of the next epoch, not of a window.
        return shards, starts[starts < self.samples_per_epoch]

    def _shuffle_window(self, epoch: int, window: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the permutation of a window's samples, and the place at which each of its shards starts."""
        shards, _ = self._epoch_plan(epoch)
        rows = self._rows[shards[window * self.window : (window + 1) * self.window]]
        order = generator(self.seed, Purpose.SAMPLE_ORDER, epoch, window).permutation(int(rows.sum()))
        return order, np.concatenate([[0], np.cumsum(rows)[:-1]])


def _kept_before(excluded: Iterable[Place]) -> dict[int, NDArray[np.int64]]:
    """Return for each shard with excluded rows how many rows are kept before each of them, ascending."""
    rows: dict[int, list[int]] = {}
    for shard, row in sorted(set(excluded)):
        rows.setdefault(shard, []).append(row)
    return {shard: np.array(found, dtype=np.int64) - np.arange(len(found)) for shard, found in rows.items()}
