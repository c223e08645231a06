"""The samples of all pairs as conditions see them, from the tables beside their shards."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.compute.tasks import ForEach, chunks
from pipelines.errors import UserError
from pipelines.stages.pairs.artifact import count_shards
from pipelines.stages.pairs.held_out import held_out_samples
from pipelines.stages.pairs.shard.files import CAPTION_COLUMNS, read_tables, sample_captions_of
from pipelines.stages.pairs.shard.outcome import OK
from pipelines.store.ledger import Artifact

SHARDS_PER_TASK = 256


class PairsRows:
    """The samples of a finished artifact of pairs; see `pipelines.conditions.kind.Rows`.

    Args:
        pairs: the artifact.
        for_each: maps a function over a range of numbers, somewhere, with the results in order. There is a number for
            every SHARDS_PER_TASK shards.
    """

    def __init__(self, pairs: Artifact, for_each: ForEach = map) -> None:
        self.pairs, self.for_each = pairs, for_each

    def captions(self, summarise: Callable[[Iterable[list[str]]], Any]) -> Iterator[Any]:
        held_out = {sample.key for sample in held_out_samples(self.pairs)}
        return self._map(["key", *CAPTION_COLUMNS], lambda table: sample_captions_of(table, held_out), summarise)

    def values(self, column: str, summarise: Callable[[Iterable[list[Any]]], Any]) -> Iterator[Any]:
        url = self.pairs.storage.url

        def values_of(table: pa.Table) -> list[Any]:
            if column not in table.column_names:
                raise UserError(
                    f"{url} has no column {column!r}, or one of lists: set condition.column to a column of the source"
                )
            samples = table.filter(pc.equal(table.column("status"), OK))
            values: list[Any] = samples.column(column).to_pylist()
            return values

        return self._map(["status", column], values_of, summarise)

    def _map(
        self,
        columns: list[str],
        extract: Callable[[pa.Table], list[Any]],
        summarise: Callable[[Iterable[list[Any]]], Any],
    ) -> Iterator[Any]:
        storage, groups = self.pairs.storage, list(chunks(range(count_shards(self.pairs)), SHARDS_PER_TASK))

        def summarise_group(number: int) -> Any:
            return summarise(map(extract, read_tables(storage, groups[number], columns)))

        return iter(self.for_each(summarise_group, range(len(groups))))
