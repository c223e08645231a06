"""The work of the pairs stage, in the driver: shards are made in parallel, then published.

If no row's fate depends on other rows, each worker publishes a shard as soon as it is made. With deduplication or
scoring, shards are staged under `work/` first, and published once it is known what is left out.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from pipelines.compute.actor_pool import map_on_actors, pool_size
from pipelines.compute.tasks import for_each
from pipelines.errors import UserError
from pipelines.stage import StageContext
from pipelines.stages.pairs.assignment import Assignment
from pipelines.stages.pairs.config import PairsConfig
from pipelines.stages.pairs.filters import column_filters
from pipelines.stages.pairs.held_out import commit_held_out
from pipelines.stages.pairs.inputs import limited_rows
from pipelines.stages.pairs.making.progress import ProgressDisplay
from pipelines.stages.pairs.making.progress_board import ProgressBoard
from pipelines.stages.pairs.making.worker import ShardMaker
from pipelines.stages.pairs.publishing.duplicate_search import DuplicateSearch, ShardsOfRun
from pipelines.stages.pairs.publishing.publish import publish
from pipelines.stages.pairs.retries import PastRuns
from pipelines.stages.pairs.rows import Source
from pipelines.stages.pairs.shard.files import shard_name, table_name, tar_name
from pipelines.stages.pairs.shard.staged import StagedShard, staged_shards
from pipelines.stages.pairs.sources.columns import find_column
from pipelines.stages.pairs.sources.open import open_source
from pipelines.stages.pairs.summary.summary import summarise
from pipelines.stages.pairs.summary.unfinished import write_plan
from pipelines.store.commits import COMMITS
from pipelines.store.file_table import FileRecord
from pipelines.store.ledger import WORK
from pipelines.store.storage import Storage

# Publishing is mostly renaming: a task should do more than one of it.
_SHARDS_PER_PUBLISHING_TASK = 64
# Two for each row that kills its worker, and one more for a shard without any: ten such rows are found in a shard.
_ALONE_TRIES = 21


def run(context: StageContext[PairsConfig]) -> dict[str, Any]:
    """Make every shard that is not committed yet, and summarise the artifact.

    Every step passes over what an earlier run has finished.

    Returns:
        The manifest's details.

    Raises:
        UserError: the source is missing, damaged, empty or lacks a column; or no row gave a sample.
    """
    config: PairsConfig = context.config
    source = open_source(config)
    if limited_rows(source, config) == 0:
        raise UserError(f"{config.source} has no rows: say `--set pairs.source=PATH` of a source with pairs in it")
    _require_columns(source, config)
    past = PastRuns.of(context.existing)
    if past.end:
        retried = past.rows_to_retry(context.writer.storage, partial(for_each, check=context.check))
        assignment = Assignment.of_retry(retried, config.rows_per_shard, past.end)
    else:
        assignment = Assignment.of_parts(source.parts, config.rows_per_shard, config.limit)
    _PairsRun(context, source, assignment, past).run()
    return _summarise(context, past.followed_by(assignment))


@dataclass(frozen=True)
class _PairsRun:
    """One run of the stage: the first, or a retry."""

    context: StageContext
    source: Source
    assignment: Assignment
    past: PastRuns

    @property
    def config(self) -> PairsConfig:
        config: PairsConfig = self.context.config
        return config

    @property
    def work(self) -> Storage:
        return self.context.writer.storage / WORK

    @property
    def stages_shards(self) -> bool:
        """True if a shard can only be published once all others are known."""
        return self.config.deduplicate or self.config.scoring is not None

    def run(self) -> None:
        committed = set(self.context.writer.committed().names)
        pending = [shard for shard in self.assignment.shards if not self._files(shard) <= committed]
        if self.stages_shards and pending:
            # Also those that are committed already: the others may be duplicates of their rows.
            staged = set(staged_shards(self.work))
            self._make([shard for shard in self.assignment.shards if shard not in staged])
            self._score()
            self._publish(pending)
        else:
            self._make(pending)
        # Not earlier: until the last shard is committed, each of them may be needed to decide what is a duplicate.
        self.context.writer.storage.remove(WORK)

    def _files(self, shard: int) -> set[str]:
        """Return the files that every committed shard has; with buckets the tars differ: its table stands for them."""
        return {table_name(shard), *([] if self.config.resize == "buckets" else [tar_name(shard)])}

    def _make(self, shards: Sequence[int]) -> None:
        if not shards:
            return
        context = self.context
        write_plan(self.work, self.assignment.rows, len(self.assignment.shards))
        size = pool_size(len(shards), workers=self.config.workers, use_gpu=False)
        at_once = self.config.shards_in_flight if self.source.downloads else 1
        board = ProgressBoard()
        results = map_on_actors(
            [{"shard": shard} for shard in shards],
            ShardMaker,
            arguments={
                "source": self.source,
                "config": self.config,
                "assignment": self.assignment,
                "work": self.work,
                "writer": None if self.stages_shards else context.writer,
                "board": board,
            },
            size=size,
            # No more than its share: a worker that starts first would otherwise take them all.
            calls_at_once=min(at_once, math.ceil(len(shards) / size.workers)),
            alone_tries=_ALONE_TRIES,
            set_aside=_give_up,
            check=context.check,
        )
        before = self.assignment.rows - self.assignment.count_rows(shards)
        with contextlib.closing(board), ProgressDisplay(context, board, before, self.assignment.rows) as display:
            for made in results:
                context.writer.gather(map(FileRecord.model_validate, made["records"]))
                board.finish(made["shard"], made["statuses"], made["bytes"])
                display.track()

    def _score(self) -> None:
        if self.config.scoring is not None:
            # Torch takes seconds and hundreds of megabytes, and most recipes score nothing.
            from pipelines.stages.pairs.publishing.scoring import score_shards

            context = self.context
            score_shards(self.config.scoring, self.work, self.assignment.shards, context.progress, context.check)

    def _publish(self, pending: Sequence[int]) -> None:
        context, config, work = self.context, self.config, self.work
        context.check()
        search = self._duplicate_search() if config.deduplicate else None
        if search is not None:
            search.run(partial(for_each, check=context.check))
        # Every task is sent this: an array is a few bytes a shard, which the tasks of a node share.
        numbers, size, writer = np.array(pending), _SHARDS_PER_PUBLISHING_TASK, context.writer

        def publish_group(group: int) -> list[dict[str, Any]]:
            shards = numbers[group * size : (group + 1) * size].tolist()
            records = publish([StagedShard.open(work, shard) for shard in shards], config, writer, search)
            return [record.model_dump() for record in records]

        for records in for_each(publish_group, range(math.ceil(len(numbers) / size)), context.check):
            writer.gather(map(FileRecord.model_validate, records))

    def _duplicate_search(self) -> DuplicateSearch:
        run = len(self.past.shards)
        earlier = [ShardsOfRun(self.context.writer.storage, shards, n) for n, shards in enumerate(self.past.shards)]
        return DuplicateSearch(
            # A folder for each run: what an earlier one has found is not what this one looks for.
            self.work / f"run-{run}",
            (*earlier, ShardsOfRun(self.work, self.assignment.shards, run, staged=True)),
            limited_rows(self.source, self.config),
            self.config.near_duplicates,
        )


def _give_up(item: dict[str, Any]) -> dict[str, Any]:
    raise UserError(
        f"making shard {item['shard']} of the pairs killed its worker {1 + _ALONE_TRIES} times, more than a few "
        "pictures explain: out of memory? Set pairs.workers or pairs.shards_in_flight lower, and run it again"
    )


def _require_columns(source: Source, config: PairsConfig) -> None:
    names = list(source.extra_types)
    for name in column_filters(config):
        if find_column(names, name) is None:
            raise UserError(
                f"{config.source} has no column `{name}`, which pairs.filters.{name} needs: it has "
                f"{', '.join(names) or 'none'}; take the filter out of the recipe or name a column"
            )


def _summarise(context: StageContext, runs: PastRuns) -> dict[str, Any]:
    config: PairsConfig = context.config
    storage, committed = context.writer.storage, context.writer.committed()
    details, held_out = summarise(
        storage,
        runs.shards,
        image_size=config.image_size,
        stored_bytes=committed.shards(".tar").bytes,
        for_each=partial(for_each, check=context.check),
    )
    details["rounds"] = list(runs.first_shards)
    # The retries that gave samples: later stages have something new to read after each of them.
    filled = {record.name.partition(".")[0] for record in committed if record.rows}
    details["additions"] = sum(any(shard_name(shard) in filled for shard in shards) for shards in runs.shards[1:])
    if not details["samples"]:
        # Nothing is lost by it, and after a network failure the next run must try again.
        storage.remove_files([*storage.names("*.tar"), *storage.names("*.parquet")])
        storage.remove(COMMITS)
        counts = ", ".join(f"{count} {status}" for status, count in Counter(details["statuses"]).most_common())
        raise UserError(f"no row of {config.source} gave a sample ({counts}): mend the source, or what refuses it")
    details["held_out"] = commit_held_out(context.writer, len(runs.shards) - 1, held_out)
    details["held_out_samples"] = len(held_out)
    for status, count in details["statuses"].items():
        context.tracker.metric(f"pairs/{status.replace(':', '_')}", count)
    return details
