"""The assignment of input rows to shards: ranges of rows, cut at a source's large parts, or the rows of a retry."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipelines.stages.pairs.rows_file import RowsFile


@dataclass(frozen=True, eq=False)
class Assignment:
    """The shards of one run of the stage, and the rows of each.

    Rows are cut into stretches, and each stretch into shards from its start on, so that what is before a stretch does
    not change how it is cut.

    Args:
        rows_per_shard: input rows of a shard; the last shard of a stretch may have fewer.
        ends: number of rows up to the end of each stretch; none is empty.
        first_shard: number of the first shard; the shards before it are of earlier runs.
        retried: the rows to try again; None in the first run, which takes all rows.
    """

    rows_per_shard: int
    ends: NDArray[np.int64]
    first_shard: int = 0
    retried: RowsFile | None = None

    @classmethod
    def of_parts(cls, parts: Sequence[int], rows_per_shard: int, limit: int | None = None) -> Assignment:
        """Assign all rows of a source, or the first `limit` of them.

        A part with at least `rows_per_shard` rows is a stretch of its own, and so are the smaller ones between two
        such parts together: moving or adding a large part leaves the contents of all other shards as they are.

        Args:
            parts: rows of each part of the source, in order.
            rows_per_shard: input rows of a shard.
            limit: how many rows to take; None for all.
        """
        counts = np.asarray(parts, np.int64)
        is_large = counts >= rows_per_shard
        # By the parts' whole sizes: a larger limit goes on where a smaller one ended.
        is_last = is_large | np.append(is_large[1:], True)
        ends = np.cumsum(counts)[is_last]
        # Empty parts end where others do.
        return cls(rows_per_shard, np.setdiff1d(ends if limit is None else np.minimum(ends, limit), [0]))

    @classmethod
    def of_retry(cls, retried: RowsFile, rows_per_shard: int, first_shard: int) -> Assignment:
        """Assign the rows of a retry, to shards that are numbered on from `first_shard`."""
        return cls(rows_per_shard, np.setdiff1d([retried.count], [0]), first_shard, retried)

    @property
    def rows(self) -> int:
        """The number of rows in all."""
        return int(self.ends[-1]) if len(self.ends) else 0

    @property
    def shards(self) -> range:
        count = int(self._shard_ends[-1]) if len(self.ends) else 0
        return range(self.first_shard, self.first_shard + count)

    def count_rows(self, shards: Sequence[int]) -> int:
        """Count the rows of several shards."""
        starts, stops = self._spans(np.asarray(shards, np.int64))
        return int((stops - starts).sum())

    def rows_of(self, shard: int) -> NDArray[np.int64]:
        """Return the numbers of a shard's rows, ascending; those of a retry are read from its file."""
        (start,), (stop,) = self._spans(np.asarray([shard], np.int64))
        return np.arange(start, stop) if self.retried is None else self.retried.part(int(start), int(stop))

    @functools.cached_property
    def _shard_ends(self) -> NDArray[np.int64]:
        """Number of shards up to the end of each stretch."""
        return np.cumsum(-(-np.diff(self.ends, prepend=0) // self.rows_per_shard))

    def _spans(self, shards: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return where shards begin and end, among all rows of the run."""
        numbers = shards - self.first_shard
        stretch = np.searchsorted(self._shard_ends, numbers, side="right")
        shards_before, rows_before = (np.insert(ends, 0, 0) for ends in (self._shard_ends, self.ends))
        starts = rows_before[stretch] + (numbers - shards_before[stretch]) * self.rows_per_shard
        return starts, np.minimum(starts + self.rows_per_shard, self.ends[stretch])
