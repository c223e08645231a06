"""The search for duplicates among all shards of a data set, in parts that fit into memory.

Tokens are read group by group of shards and dealt out to parts; each part is searched; publishing a shard then asks
all parts about its rows. Each step leaves a file, so that a run that was killed continues from there.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipelines.compute.tasks import ForEach, chunks
from pipelines.shards.format import decode_npy, encode_npy
from pipelines.stages.pairs.shard.duplicate_tokens import (
    NO_TOKENS,
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

# 32 bytes a token, and a few copies while they are sorted.
TOKENS_PER_PART = 4_000_000
# Below this the driver searches alone: starting tasks would take longer.
TOKENS_IN_DRIVER = 500_000
SHARDS_PER_TASK = 256


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
        found = [self._tokens(number, distance) for number in self.numbers]
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

    def run(self, for_each: ForEach) -> None:
        """Find all duplicates, for `verdicts` to answer about. Finished steps of a run that was killed are skipped."""
        if self.work.exists(_verdicts_name(self.parts - 1)):
            return
        if parts_for(self.rows, self.distance, TOKENS_IN_DRIVER) == 1:
            tokens = np.concatenate([group.read_tokens(self.distance) for group in self._groups])
            self._save(_verdicts_name(0), find_duplicates(tokens, self.distance))
            return
        for _ in for_each(self._deal_out, range(len(self._groups))):
            pass
        # The last part is searched last and alone: its verdicts prove that all others are there.
        for _ in for_each(self._search, range(self.parts - 1)):
            pass
        self._search(self.parts - 1)

    def verdicts(self, first_row: int, last_row: int) -> Verdicts:
        """Return the verdicts on the rows from the first to the last, both included."""
        found = []
        for part in range(self.parts):
            verdicts = self._load(_verdicts_name(part))
            start, stop = np.searchsorted(verdicts["row"], [first_row, last_row + 1])
            # A view would keep the whole part in memory.
            found.append(verdicts[start:stop].copy())
        return merge(found)

    def _deal_out(self, group: int) -> None:
        # The last part is written last: if it is there, a task that was killed had nothing left to do.
        if not self.work.exists(_tokens_name(group, self.parts - 1)):
            for part, tokens in enumerate(split(self._groups[group].read_tokens(self.distance), self.parts)):
                self._save(_tokens_name(group, part), tokens)

    def _search(self, part: int) -> None:
        if not self.work.exists(_verdicts_name(part)):
            tokens = [self._load(_tokens_name(group, part)) for group in range(len(self._groups))]
            self._save(_verdicts_name(part), find_duplicates(np.concatenate(tokens), self.distance))

    def _save(self, name: str, array: Tokens) -> None:
        self.work.write_bytes(name, encode_npy(array))

    def _load(self, name: str) -> Tokens:
        return decode_npy(self.work.read_bytes(name))


def _tokens_name(group: int, part: int) -> str:
    return f"tokens/{group:06d}-{part:05d}.npy"


def _verdicts_name(part: int) -> str:
    return f"duplicates/{part:05d}.npy"
