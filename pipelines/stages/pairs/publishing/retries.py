"""Retries: which rows are to be tried again, and which of a row's statuses counts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pipelines.stages.pairs.shard.files import read_table
from pipelines.stages.pairs.shard.outcome import may_pass
from pipelines.store.storage import Storage


def failed_rows(storage: Storage, rounds: Sequence[range]) -> NDArray[np.int64]:
    """Rows whose last failure may have passed, ascending.

    Args:
        storage: the artifact's folder.
        rounds: the shards of the first run and of each retry; what a later round says of a row replaces the earlier.
    """
    failed = np.empty(0, np.int64)
    for shards in rounds:
        tried, failing = [failed[:0]], [failed[:0]]
        first = not len(failed)
        for shard in shards:
            table = read_table(storage, shard, ["row", "status"])
            rows = table.column("row").to_numpy()
            if not first:
                tried.append(rows)
            failing.append(rows[[may_pass(status) for status in table.column("status").to_pylist()]])
        failed = np.union1d(np.setdiff1d(failed, np.concatenate(tried)), np.concatenate(failing))
    return failed


def replaced_rows(storage: Storage, rounds: Sequence[range]) -> list[NDArray[np.int64]]:
    """For each round the rows that a later one has tried again, ascending: what it says of them no longer counts."""
    replaced = [np.empty(0, np.int64)]
    for shards in reversed(rounds[1:]):
        rows = [read_table(storage, shard, ["row"]).column("row").to_numpy() for shard in shards]
        replaced.append(np.union1d(replaced[-1], np.concatenate(rows)))
    return replaced[::-1]
