"""Looking for duplicates among all shards of a data set, in pieces that fit into memory."""

from __future__ import annotations

import dataclasses
import functools
import io
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipelines.compute.tasks import ForEach
from pipelines.stages.pairs.publishing.duplicate_tokens import (
    Shards,
    Tokens,
    Verdicts,
    find_duplicates,
    merge,
    parts_for,
    read_tokens,
    split,
)
from pipelines.store.storage import Storage

# 32 bytes a token, and a few copies while they are sorted.
TOKENS_A_PART = 4_000_000
# Below this the driver does it: starting tasks would take longer.
TOKENS_IN_DRIVER = 500_000
SHARDS_A_TASK = 256


@dataclass(frozen=True)
class DuplicateSearch:
    """Finds the duplicates of a data set; cheap to pickle. What is found is kept in files under `work`.

    Args:
        work: a folder for what is found on the way.
        shards: all shards: those in the making, and in a retry those that are committed already.
        rows: in all, at most.
        distance: bits in which near duplicates may differ; None where only exact ones count.
    """

    work: Storage
    shards: tuple[Shards, ...]
    rows: int
    distance: int | None

    @functools.cached_property
    def parts(self) -> int:
        return parts_for(self.rows, self.distance, TOKENS_A_PART)

    @functools.cached_property
    def _groups(self) -> list[Shards]:
        return [
            dataclasses.replace(shards, numbers=shards.numbers[start : start + SHARDS_A_TASK])
            for shards in self.shards
            for start in range(0, len(shards.numbers), SHARDS_A_TASK)
        ]

    def run(self, for_each: ForEach) -> None:
        """Find all duplicates; afterwards `verdicts` answers. What an earlier run has found is not looked for again."""
        if self.work.exists(_verdicts_name(self.parts - 1)):
            return
        if parts_for(self.rows, self.distance, TOKENS_IN_DRIVER) == 1:
            tokens = np.concatenate([read_tokens(group, self.distance) for group in self._groups])
            self._save(_verdicts_name(0), find_duplicates(tokens, self.distance))
            return
        for _ in for_each(self._deal, range(len(self._groups))):
            pass
        # The last one is looked for last: it says that all are there.
        for _ in for_each(self._look, range(self.parts - 1)):
            pass
        self._look({"item": self.parts - 1})

    def verdicts(self, first_row: int, last_row: int) -> Verdicts:
        """What was found on the rows from the first to the last."""
        found = []
        for part in range(self.parts):
            verdicts = self._load(_verdicts_name(part))
            start, stop = np.searchsorted(verdicts["row"], [first_row, last_row + 1])
            # A view would keep them all.
            found.append(verdicts[start:stop].copy())
        return merge(found)

    def _deal(self, item: dict[str, Any]) -> dict[str, Any]:
        group = int(item["item"])
        if not self.work.exists(_tokens_name(group, self.parts - 1)):
            for part, tokens in enumerate(split(read_tokens(self._groups[group], self.distance), self.parts)):
                self._save(_tokens_name(group, part), tokens)
        return {"item": group}

    def _look(self, item: dict[str, Any]) -> dict[str, Any]:
        part = int(item["item"])
        if not self.work.exists(_verdicts_name(part)):
            tokens = [self._load(_tokens_name(group, part)) for group in range(len(self._groups))]
            self._save(_verdicts_name(part), find_duplicates(np.concatenate(tokens), self.distance))
        return {"item": part}

    def _save(self, name: str, array: Tokens) -> None:
        buffer = io.BytesIO()
        np.save(buffer, array, allow_pickle=False)
        self.work.write_bytes(name, buffer.getvalue())

    def _load(self, name: str) -> Tokens:
        array: Tokens = np.load(io.BytesIO(self.work.read_bytes(name)), allow_pickle=False)
        return array


def _tokens_name(group: int, part: int) -> str:
    return f"tokens/{group:06d}-{part:05d}.npy"


def _verdicts_name(part: int) -> str:
    return f"duplicates/{part:05d}.npy"
