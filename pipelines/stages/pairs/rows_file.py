"""Ascending row numbers in a file: a task reads its own few of the millions that a retry or a summary goes by."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipelines.store.storage import Storage

_NUMBER = np.dtype("<i8")
# Numbers between two marks: 32 KiB are read for a few of them.
_STEP = 4096


@dataclass(frozen=True, eq=False)
class RowsFile:
    """A file of ascending row numbers; cheap to pickle, and any part of it is one read.

    Attributes:
        storage, name: where it is.
        count: how many numbers it holds.
        marks: every _STEP-th of them.
    """

    storage: Storage
    name: str
    count: int
    marks: NDArray[np.int64]

    @classmethod
    def write(cls, storage: Storage, name: str, rows: NDArray[np.int64]) -> RowsFile:
        """Write numbers to a file."""
        with storage.writer(name) as path:
            # Straight from memory: `tobytes` would hold them twice.
            rows.astype(_NUMBER, copy=False).tofile(path)
        return cls._of(storage, name, rows)

    @classmethod
    def open(cls, storage: Storage, name: str) -> RowsFile:
        """Open what an earlier process has written."""
        return cls._of(storage, name, np.frombuffer(storage.read_bytes(name), _NUMBER))

    @classmethod
    def _of(cls, storage: Storage, name: str, rows: NDArray[np.int64]) -> RowsFile:
        # A copy: a view would keep all numbers in memory.
        return cls(storage, name, len(rows), rows[::_STEP].copy())

    def part(self, start: int, stop: int) -> NDArray[np.int64]:
        """Read the numbers at positions start to stop - 1."""
        if start >= stop:
            return np.empty(0, np.int64)
        size = _NUMBER.itemsize
        return np.frombuffer(self.storage.read_range(self.name, start * size, stop * size), _NUMBER)

    def holds(self, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return which of these ascending numbers, (N,), are in the file: (N,) booleans."""
        if not len(rows):
            return np.zeros(0, bool)
        start = max(int(np.searchsorted(self.marks, rows[0], side="right")) - 1, 0)
        stop = int(np.searchsorted(self.marks, rows[-1], side="right"))
        return np.isin(rows, self.part(start * _STEP, min(stop * _STEP, self.count)))
