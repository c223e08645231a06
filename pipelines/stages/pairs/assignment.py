"""Which input rows each shard is made of: one range after the other, or, in a retry, the rows that failed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipelines.stages.pairs.rows import Row, Source

# Rows that are read and thrown away are cheaper than another read.
_GAP_ROWS = 256
_READ_ROWS = 4096


@dataclass(frozen=True)
class Schedule:
    """The shards of one round of work.

    Args:
        rows_per_shard: input rows of a shard.
        total: rows of the source, or fewer where the recipe limits them.
        first_shard: number of the first shard; the shards before it are of earlier rounds.
        retried: the rows of this round, ascending, where it is a retry.
    """

    rows_per_shard: int
    total: int
    first_shard: int = 0
    retried: NDArray[np.int64] | None = None

    @property
    def rows(self) -> int:
        return self.total if self.retried is None else len(self.retried)

    @property
    def shards(self) -> range:
        return range(self.first_shard, self.first_shard + math.ceil(self.rows / self.rows_per_shard))

    def rows_of(self, shard: int) -> int:
        """How many rows a shard has."""
        return min(self.rows_per_shard, self.rows - self._start(shard))

    def read(self, source: Source, shard: int) -> list[Row]:
        """The rows of a shard, in order."""
        start = self._start(shard)
        stop = start + self.rows_of(shard)
        if self.retried is None:
            return source.read(start, stop)
        wanted = self.retried[start:stop]
        rows = []
        for first, last in _spans(wanted):
            chosen = set(wanted[np.searchsorted(wanted, first) : np.searchsorted(wanted, last)].tolist())
            rows += [row for row in source.read(first, last) if row.index in chosen]
        return rows

    def _start(self, shard: int) -> int:
        return (shard - self.first_shard) * self.rows_per_shard


def _spans(rows: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Ranges (start, stop) that hold all of these ascending rows, and few others."""
    first = last = int(rows[0])
    for row in rows[1:].tolist():
        if row - last > _GAP_ROWS or row - first >= _READ_ROWS:
            yield first, last + 1
            first = row
        last = row
    yield first, last + 1
