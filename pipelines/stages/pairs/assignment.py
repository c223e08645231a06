"""The assignment of input rows to shards: consecutive ranges or, in a retry, the rows that failed."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Assignment:
    """The shards of one run of the stage, and the rows of each.

    Args:
        rows_per_shard: input rows of a shard; the last shard may have fewer.
        total: rows of the source, or fewer if the recipe limits them.
        first_shard: number of the first shard; the shards before it are of earlier runs.
        retried: the rows to try again, ascending; None in the first run, which takes all rows.
    """

    rows_per_shard: int
    total: int
    first_shard: int = 0
    retried: NDArray[np.int64] | None = None

    @property
    def rows(self) -> int:
        """The number of rows in all."""
        return self.total if self.retried is None else len(self.retried)

    @property
    def shards(self) -> range:
        return range(self.first_shard, self.first_shard + math.ceil(self.rows / self.rows_per_shard))

    def row_count(self, shard: int) -> int:
        """Return how many rows a shard has."""
        return min(self.rows_per_shard, self.rows - self._start(shard))

    def rows_of(self, shard: int) -> NDArray[np.int64]:
        """Return the numbers of a shard's rows, ascending."""
        start = self._start(shard)
        stop = start + self.row_count(shard)
        return np.arange(start, stop) if self.retried is None else self.retried[start:stop]

    def _start(self, shard: int) -> int:
        return (shard - self.first_shard) * self.rows_per_shard
