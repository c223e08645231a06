"""The worker process of the pairs stage: makes shards, several at once, each whole or not at all."""

from __future__ import annotations

import uuid
from collections import Counter
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from pipelines.compute.host_memory import keep_freed_memory
from pipelines.stages.pairs.assignment import Schedule
from pipelines.stages.pairs.config import PairsConfig
from pipelines.stages.pairs.making.board import Board, Counting
from pipelines.stages.pairs.making.process import Processor
from pipelines.stages.pairs.publishing.publish import Publisher
from pipelines.stages.pairs.rows import Source
from pipelines.stages.pairs.shard.files import write_files
from pipelines.stages.pairs.shard.staged import Made, keep_made, read_made, record_name
from pipelines.store.storage import Storage


class ShardMaker:
    """Built once in each process, then called with one shard at a time by each of several threads.

    Args:
        source, config, schedule: what to make shards of.
        work: the folder for shards in the making.
        publisher: publishes each shard at once; None where shards stay in the making.
        board: is told how far the work is.
    """

    def __init__(
        self,
        *,
        source: Source,
        config: PairsConfig,
        schedule: Schedule,
        work: Storage,
        publisher: Publisher | None,
        board: Board | None,
    ) -> None:
        self._source, self._config, self._schedule = source, config, schedule
        self._work, self._publisher = work, publisher
        self._attempt = uuid.uuid4().hex[:12]
        keep_freed_memory()
        # Arrow's own choice keeps three times as much of what it freed.
        pa.set_memory_pool(pa.jemalloc_memory_pool())
        url = config.source
        self._processor = Processor(
            config,
            downloads=source.downloads,
            remote="://" in url and not url.startswith("file://"),
            counting=Counting(board, self._attempt),
        ).__enter__()

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        """Make the shard `item["shard"]`; returns how many rows came to which status."""
        shard = item["shard"]
        # It may have been made by a process that died before it could say so, or before everything was committed.
        made = read_made(self._work, shard) if self._work.exists(record_name(shard)) else self._make(shard)
        if self._publisher is not None:
            self._publisher.publish_as_made(made)
        return dict(made.statuses)

    def _make(self, shard: int) -> Made:
        rows = self._schedule.read(self._source, shard)
        target = self._work / self._attempt
        with self._processor.spool() as spool:
            outcomes = self._processor.process(rows, spool)
            files = write_files(target, shard, rows, outcomes, spool, self._source.extra_types, self._config)
        return keep_made(self._work, shard, self._attempt, files, Counter(outcome.status for outcome in outcomes))
