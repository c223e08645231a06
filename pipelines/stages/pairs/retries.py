"""Retries: which rows to try again, and which of a row's statuses counts.

A retry (`pairs.retry=failed`) adds shards of its own to a finished artifact and never touches earlier ones. A row that
was tried several times therefore has a line in several tables; the latest one counts.

Tables are read in tasks, which return row numbers packed into text; the driver holds those of the failed rows alone.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipelines.compute.tasks import ForEach, chunks
from pipelines.stages.pairs.artifact import count_shards
from pipelines.stages.pairs.assignment import Assignment
from pipelines.stages.pairs.rows_file import RowsFile
from pipelines.stages.pairs.shard.files import read_tables
from pipelines.stages.pairs.shard.outcome import is_transient
from pipelines.store.ledger import WORK, Artifact
from pipelines.store.storage import Storage

SHARDS_PER_TASK = 256
_NONE = np.empty(0, np.int64)


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
        return cls(tuple(artifact.details["rounds"]), count_shards(artifact))

    @property
    def shards(self) -> list[range]:
        """The shards of every run."""
        return [range(first, stop) for first, stop in zip(self.first_shards, [*self.first_shards[1:], self.end])]

    def rows_to_retry(self, storage: Storage, for_each: ForEach = map) -> RowsFile:
        """Write down the rows whose failure was transient, for the workers to read; once for each retry."""
        work, name = storage / WORK, f"retry-{self.end}.rows"
        if work.exists(name):
            return RowsFile.open(work, name)
        return RowsFile.write(work, name, failed_rows(storage, self.shards, for_each))

    def followed_by(self, assignment: Assignment) -> PastRuns:
        """Return these runs and the one that this assignment was for."""
        return PastRuns((*self.first_shards, assignment.first_shard), assignment.shards.stop)


def failed_rows(storage: Storage, runs: Sequence[range], for_each: ForEach = map) -> NDArray[np.int64]:
    """Return the rows whose latest status is a transient failure, ascending.

    Args:
        storage: the artifact's folder.
        runs: the shards of the first run and of each retry, in order.
        for_each: maps a function over a range of numbers, somewhere, with the results in order. There is a number for
            every SHARDS_PER_TASK shards.
    """
    failed = _NONE
    for tried, failing in _rows_of_runs(storage, runs, for_each):
        # Rows ascend within each run, but a retried row is among those of the runs before it.
        failed = np.sort(np.concatenate([_without(failed, tried), failing]), kind="stable")
    return failed


def replaced_rows(storage: Storage, runs: Sequence[range], for_each: ForEach = map) -> list[RowsFile | None]:
    """Write down for each run the rows that a later run tried again: their lines in its tables do not count.

    Args:
        storage: the artifact's folder; the files are under `work/` in it.
        runs, for_each: as for `failed_rows`.

    Returns:
        A file for each run; None for the last one, of which nothing is replaced.
    """
    replaced, files = _NONE, list[RowsFile | None]([None])
    # From the last run back: what replaces rows of one run also replaces them in all runs before it.
    retries = list(_rows_of_runs(storage, [range(0), *runs[1:]], for_each))[1:]
    for number, (tried, _) in enumerate(reversed(retries)):
        replaced = np.union1d(replaced, tried)
        files.append(RowsFile.write(storage / WORK, f"replaced-{number}.rows", replaced))
    return files[::-1]


def _rows_of_runs(
    storage: Storage, runs: Sequence[range], for_each: ForEach
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Yield for each run the rows that it tried again (none of the first run: it tried all) and those that failed."""
    groups = [(run, shards) for run, numbers in enumerate(runs) for shards in chunks(numbers, SHARDS_PER_TASK)]

    def read_group(number: int) -> list[str]:
        run, shards = groups[number]
        tried, failing = [_NONE], [_NONE]
        for table in read_tables(storage, shards, ["row", "status"]):
            rows = table.column("row").to_numpy()
            if run:
                tried.append(rows)
            failing.append(rows[[is_transient(status) for status in table.column("status").to_pylist()]])
        return [_pack(np.concatenate(rows)) for rows in (tried, failing)]

    results = iter(for_each(read_group, range(len(groups))))
    for numbers in runs:
        pieces = [[_unpack(text) for text in next(results)] for _ in chunks(numbers, SHARDS_PER_TASK)]
        tried, failing = (np.concatenate([_NONE, *(piece[which] for piece in pieces)]) for which in (0, 1))
        yield tried, failing


def _without(rows: NDArray[np.int64], others: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return those of some ascending numbers that are not among other ascending ones."""
    if not len(others):
        return rows
    places = np.minimum(np.searchsorted(others, rows), len(others) - 1)
    return rows[others[places] != rows]


def _pack(rows: NDArray[np.int64]) -> str:
    """Encode ascending numbers as text: about a byte each where they are near each other."""
    return base64.b64encode(zlib.compress(np.diff(rows, prepend=0).astype("<i8").tobytes(), 1)).decode()


def _unpack(text: str) -> NDArray[np.int64]:
    return np.cumsum(np.frombuffer(zlib.decompress(base64.b64decode(text)), "<i8"), dtype=np.int64)
