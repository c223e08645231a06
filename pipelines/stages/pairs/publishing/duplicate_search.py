"""The search for duplicates among all shards of a data set, in parts that fit into memory.

Tokens are read group by group of shards and dealt out to parts; each part is searched; its verdicts are dealt out to
ranges of rows, and what all parts say of a range is merged: publishing a shard then reads the few ranges that its rows
are in. Each step leaves one file, so that a run that was killed continues from there.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from pipelines.compute.tasks import ForEach, chunks
from pipelines.shards.format import decode_npy, encode_npy
from pipelines.stages.pairs.shard.duplicate_tokens import (
    NO_TOKENS,
    NO_VERDICTS,
    Tokens,
    Verdicts,
    find_duplicates,
    merge,
    parts_for,
    split,
    token_columns,
    tokens_of_table,
    with_run,
)
from pipelines.stages.pairs.shard.files import read_table
from pipelines.stages.pairs.shard.staged import StagedShard
from pipelines.store.storage import Storage
from pipelines.store.threads import map_in_threads

T = TypeVar("T")
R = TypeVar("R")

# 32 bytes a token, and a few copies while they are sorted.
TOKENS_PER_PART = 4_000_000
# Below this the driver searches alone: starting tasks would take longer.
TOKENS_IN_DRIVER = 500_000
SHARDS_PER_TASK = 256
# 17 bytes a duplicate: a range is a few megabytes, and read by the few tasks that publish its rows.
ROWS_PER_RANGE = 1 << 21
# Proves that all verdicts are there.
_DONE = "duplicates/done"
_OFFSET = np.dtype("<i8")


@dataclass(frozen=True)
class ShardsOfRun:
    """The shards that the first run or one of the retries made.

    Attributes:
        folder: the artifact's folder, or its work folder if the shards are staged.
        numbers: the shards' numbers.
        run: 0 for the first run, 1 for the first retry, and so on.
        staged: whether they are staged; otherwise they are committed.
    """

    folder: Storage
    numbers: Sequence[int]
    run: int = 0
    staged: bool = False

    def read_tokens(self, distance: int | None) -> Tokens:
        """Read the tokens of all `ok` rows."""
        found = _many(self.folder, lambda number: self._tokens(number, distance), self.numbers)
        return with_run(np.concatenate([NO_TOKENS, *found]), self.run)

    def _tokens(self, number: int, distance: int | None) -> Tokens:
        columns = token_columns(distance)
        if not self.staged:
            # Tokens are not part of the artifact: a retry makes those of earlier runs from their tables.
            return tokens_of_table(read_table(self.folder, number, columns), distance)
        shard = StagedShard.open(self.folder, number)
        # An earlier version staged shards without tokens.
        return shard.tokens if shard.has_tokens else tokens_of_table(shard.read_columns(columns), distance)


@dataclass(frozen=True)
class DuplicateSearch:
    """Finds the duplicates of a data set; cheap to pickle.

    Args:
        work: a folder for intermediate files.
        shards: all shards: the staged ones and, in a retry, those that are committed already.
        rows: an upper bound on the number of rows.
        distance: bits in which near duplicates may differ; None if only exact ones count.
    """

    work: Storage
    shards: tuple[ShardsOfRun, ...]
    rows: int
    distance: int | None

    @functools.cached_property
    def parts(self) -> int:
        return parts_for(self.rows, self.distance, TOKENS_PER_PART)

    @functools.cached_property
    def _groups(self) -> list[ShardsOfRun]:
        return [
            ShardsOfRun(shards.folder, numbers, shards.run, shards.staged)
            for shards in self.shards
            for numbers in chunks(shards.numbers, SHARDS_PER_TASK)
        ]

    @property
    def ranges(self) -> int:
        return max(1, math.ceil(self.rows / ROWS_PER_RANGE))

    def run(self, for_each: ForEach) -> None:
        """Find all duplicates, for `verdicts` to answer about. Finished steps of a run that was killed are skipped."""
        if self.work.exists(_DONE):
            return
        if parts_for(self.rows, self.distance, TOKENS_IN_DRIVER) == 1:
            tokens = np.concatenate([group.read_tokens(self.distance) for group in self._groups])
            for number, verdicts in enumerate(self._by_range(find_duplicates(tokens, self.distance))):
                self._save(number, verdicts)
        else:
            steps = (self._deal_out, len(self._groups)), (self._search, self.parts), (self._gather, self.ranges)
            for step, count in steps:
                for _ in for_each(step, range(count)):
                    pass
        self.work.write_bytes(_DONE, b"")

    def verdicts(self, first_row: int, last_row: int) -> Verdicts:
        """Return the verdicts on the rows from the first to the last, both included, sorted by row."""
        found = [NO_VERDICTS]
        for number in range(first_row // ROWS_PER_RANGE, last_row // ROWS_PER_RANGE + 1):
            verdicts = decode_npy(self.work.read_bytes(_range_name(number)))
            start, stop = np.searchsorted(verdicts["row"], [first_row, last_row + 1])
            # A view would keep the whole range in memory.
            found.append(verdicts[start:stop].copy())
        return np.concatenate(found)

    def _deal_out(self, group: int) -> None:
        """Deal the tokens of a group of shards out to the parts."""
        if not self.work.exists(_tokens_name(group)):
            self._save_dealt(_tokens_name(group), split(self._groups[group].read_tokens(self.distance), self.parts))

    def _search(self, part: int) -> None:
        """Find the duplicates of a part, and deal them out to the ranges of rows."""
        if not self.work.exists(_verdicts_name(part)):
            names = map(_tokens_name, range(len(self._groups)))
            verdicts = find_duplicates(self._load_dealt(names, part, NO_TOKENS.dtype), self.distance)
            self._save_dealt(_verdicts_name(part), self._by_range(verdicts))

    def _gather(self, number: int) -> None:
        """Merge what the parts say of a range of rows."""
        if not self.work.exists(_range_name(number)):
            names = map(_verdicts_name, range(self.parts))
            self._save(number, merge([self._load_dealt(names, number, NO_VERDICTS.dtype)]))

    def _by_range(self, verdicts: Verdicts) -> list[Verdicts]:
        return np.split(verdicts, np.searchsorted(verdicts["row"], ROWS_PER_RANGE * np.arange(1, self.ranges)))

    def _save(self, number: int, verdicts: Verdicts) -> None:
        self.work.write_bytes(_range_name(number), encode_npy(verdicts))

    def _save_dealt(self, name: str, pieces: Sequence[NDArray[np.void]]) -> None:
        """Write pieces one after the other, behind the offsets at which they begin and end."""
        ends = _OFFSET.itemsize * (len(pieces) + 1) + np.cumsum([0, *(piece.nbytes for piece in pieces)])
        self.work.write_bytes(name, b"".join([ends.astype(_OFFSET).tobytes(), *(each.tobytes() for each in pieces)]))

    def _load_dealt(self, names: Iterable[str], piece: int, kind: np.dtype[np.void]) -> NDArray[np.void]:
        """Read one piece of each of several files."""

        def load(name: str) -> NDArray[np.void]:
            size = _OFFSET.itemsize
            start, stop = np.frombuffer(self.work.read_range(name, piece * size, (piece + 2) * size), _OFFSET).tolist()
            return np.frombuffer(self.work.read_range(name, start, stop) if start < stop else b"", kind)

        return np.concatenate([np.empty(0, kind), *_many(self.work, load, names)])


def _many(folder: Storage, function: Callable[[T], R], items: Iterable[T]) -> Iterable[R]:
    """Map a function that reads files: an object store takes long for one answer, but gives many at once."""
    return map(function, items) if folder.is_local else map_in_threads(function, items)


def _tokens_name(group: int) -> str:
    return f"tokens/{group:06d}"


def _verdicts_name(part: int) -> str:
    return f"verdicts/{part:05d}"


def _range_name(number: int) -> str:
    return f"duplicates/{number:05d}.npy"
