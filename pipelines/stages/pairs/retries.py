"""Retries: which rows to try again, and which of a row's statuses counts.

A retry (`pairs.retry=failed`) adds shards of its own to a finished artifact and never touches earlier ones. A row that
was tried several times therefore has a line in several tables; the latest one counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipelines.stages.pairs.assignment import Assignment
from pipelines.stages.pairs.shard.files import read_table
from pipelines.stages.pairs.shard.outcome import is_transient
from pipelines.store.ledger import Artifact
from pipelines.store.storage import Storage


@dataclass(frozen=True)
class PastRuns:
    """The shards that each run has made: the first run and every retry after it.

    Attributes:
        first_shards: the number of each run's first shard. A retry that found nothing new made shards too.
        end: the number of all shards.
    """

    first_shards: tuple[int, ...] = ()
    end: int = 0

    @classmethod
    def of(cls, artifact: Artifact | None) -> PastRuns:
        """Read the runs of a finished artifact; none without one."""
        if artifact is None:
            return cls()
        # Kept as `rounds`: manifests have had this key since the first retry was written.
        tables = [record for record in artifact.shards(".parquet") if "/" not in record.name]
        return cls(tuple(artifact.details["rounds"]), len(tables))

    @property
    def shards(self) -> list[range]:
        """The shards of every run."""
        return [range(first, stop) for first, stop in zip(self.first_shards, [*self.first_shards[1:], self.end])]

    def assign(self, storage: Storage, rows_per_shard: int, total: int) -> Assignment:
        """Assign rows to the shards that are made now: all rows, or in a retry those whose failure was transient."""
        if not self.end:
            return Assignment(rows_per_shard, total)
        return Assignment(rows_per_shard, total, self.end, failed_rows(storage, self.shards))

    def followed_by(self, assignment: Assignment) -> PastRuns:
        """Return these runs and the one that this assignment was for."""
        return PastRuns((*self.first_shards, assignment.first_shard), assignment.shards.stop)


def failed_rows(storage: Storage, runs: Sequence[range]) -> NDArray[np.int64]:
    """Return the rows whose latest status is a transient failure, ascending.

    Args:
        storage: the artifact's folder.
        runs: the shards of the first run and of each retry, in order.
    """
    none = np.empty(0, np.int64)
    failed = none
    for shards in runs:
        tried, failing = [none], [none]
        for shard in shards:
            table = read_table(storage, shard, ["row", "status"])
            rows = table.column("row").to_numpy()
            # Only failed rows are tried again: while there are none (as in the first run), none can drop out, and the
            # numbers of all rows need not be held in memory.
            if len(failed):
                tried.append(rows)
            failing.append(rows[[is_transient(status) for status in table.column("status").to_pylist()]])
        failed = np.union1d(np.setdiff1d(failed, np.concatenate(tried)), np.concatenate(failing))
    return failed


def replaced_rows(storage: Storage, runs: Sequence[range]) -> list[NDArray[np.int64]]:
    """Return for each run the rows that a later run tried again, ascending: their lines in its tables do not count."""
    replaced = [np.empty(0, np.int64)]
    # From the last run back: what replaces rows of one run also replaces them in all runs before it.
    for shards in reversed(runs[1:]):
        rows = [read_table(storage, shard, ["row"]).column("row").to_numpy() for shard in shards]
        replaced.append(np.union1d(replaced[-1], np.concatenate(rows)))
    return replaced[::-1]
