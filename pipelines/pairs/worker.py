"""The worker process of the pairs stage: makes shards, several at once, each whole or not at all."""

from __future__ import annotations

import os
import uuid
from collections import Counter
from typing import Any

import pyarrow as pa
import pyarrow.parquet  # noqa: F401 (takes a second: better while the process starts than in its first shard)

from ldm_core.host_memory import keep_freed_memory
from pipelines.ledger import ArtifactWriter, FileRecord
from pipelines.pairs.board import Board, Counting
from pipelines.pairs.config import PairsConfig
from pipelines.pairs.process import Processor
from pipelines.pairs.rows import Source
from pipelines.pairs.schedule import Schedule
from pipelines.pairs.shard import shard_name, write_files
from pipelines.storage import Storage


class ShardMaker:
    """Built once in each process, then called with one shard at a time by each of several threads.

    Args:
        source, config, schedule: what to make shards of.
        work: the folder for shards in the making.
        writer: commits what was written to its own folder; None where shards stay in the making.
        board: is told how far the work is.
    """

    def __init__(
        self,
        *,
        source: Source,
        config: PairsConfig,
        schedule: Schedule,
        work: Storage,
        writer: ArtifactWriter | None,
        board: Board | None,
    ) -> None:
        self._source, self._config, self._schedule = source, config, schedule
        self._work, self._writer = work, writer
        keep_freed_memory()
        # Arrow's own choice keeps three times as much of what it freed.
        pa.set_memory_pool(pa.jemalloc_memory_pool())
        url = config.source
        self._processor = Processor(
            config,
            downloads=source.downloads,
            remote="://" in url and not url.startswith("file://"),
            counting=Counting(board, f"{os.getpid()}-{uuid.uuid4().hex[:8]}"),
        ).__enter__()

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        """Make the shard `item["shard"]`; returns how many rows came to which status."""
        shard = item["shard"]
        record = record_name(shard)
        if self._work.exists(record):
            # Made by a process that died before it could say so, or before everything was committed.
            made: dict[str, Any] = self._work.read_json(record)
        else:
            made = self._make(shard)
            self._work.write_json(record, made)
        if self._writer is not None:
            for file in map(FileRecord.model_validate, made["files"]):
                self._writer.commit(file.name, rows=file.rows, sha256=file.sha256)
        statuses: dict[str, int] = made["statuses"]
        return statuses

    def _make(self, shard: int) -> dict[str, Any]:
        target = self._work if self._writer is None else self._writer.storage
        rows = self._schedule.read(self._source, shard)
        with self._processor.spool() as spool:
            outcomes = self._processor.process(rows, spool)
            files = write_files(target, shard, rows, outcomes, spool, self._source.extra_types, self._config)
        statuses = Counter(outcome.status for outcome in outcomes)
        return {"files": [file.model_dump() for file in files], "statuses": dict(sorted(statuses.items()))}


def record_name(shard: int) -> str:
    """The file that says that a shard in the making is whole, and what it consists of: written last."""
    return f"{shard_name(shard)}.json"
