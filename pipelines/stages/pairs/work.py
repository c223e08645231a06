"""The work of the pairs stage: raw image-text pairs to WebDataset shards, in parallel, one shard at a time."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipelines.compute.tasks import _for_each
from pipelines.errors import UserError
from pipelines.stage import StageContext
from pipelines.stages.pairs.config import PairsConfig
from pipelines.stages.pairs.making.progress import _Showing
from pipelines.stages.pairs.shard.staged import WORK
from pipelines.store.ledger import COMMITS, Artifact

if TYPE_CHECKING:
    from pipelines.stages.pairs.assignment import Schedule
    from pipelines.stages.pairs.rows import Source


# Publishing is mostly renaming: so many shards are one task.
_PUBLISHED_AT_ONCE = 64


def source_digests(config: PairsConfig) -> dict[str, str]:
    """The source by content, and the files of models, as part of the artifact's key."""
    from pipelines.stages.pairs.publishing.scoring import digests
    from pipelines.stages.pairs.sources.open import open_source

    return {"source": open_source(config).digest(), **digests(config.scoring)}


def count_rows(config: PairsConfig) -> int | None:
    """Input rows, for estimates; None where counting them means reading the whole source over a network."""
    from pipelines.stages.pairs.sources.open import open_source
    from pipelines.stages.pairs.sources.tars import TarSource

    source = open_source(config)
    if isinstance(source, TarSource) and any("://" in url for url in source.urls):
        return None
    return _total(source, config)


def run(context: StageContext) -> dict[str, Any]:
    """Make every shard that is not committed yet, and say what came out.

    Where nothing has to be known of other rows, shards are committed one by one as they are made. With deduplication
    or scoring they are made under `work/` first, and published when what is to be left out is known. Every step passes
    over what an earlier run has left finished.

    Raises:
        UserError: the source is missing, damaged, empty or lacks a column; or no row gave a sample.
    """
    from pipelines.stages.pairs.sources.open import open_source

    config: PairsConfig = context.config
    source = open_source(config)
    total = _total(source, config)
    if total == 0:
        raise UserError(f"{config.source} has no rows: say `--set pairs.source=PATH` of a source with pairs in it")
    _require_columns(source, config)
    rounds = _Rounds.of(context.existing)
    work = _Work(context, source, rounds.schedule(context, total), rounds)
    work.run()
    return _summarise(context, rounds.with_round(work.schedule), total)


@dataclass(frozen=True)
class _Rounds:
    """The shards of the first run, and of each retry after it: [first shard, …] and the number of all shards."""

    first_shards: tuple[int, ...] = ()
    end: int = 0

    @classmethod
    def of(cls, finished: Artifact | None) -> _Rounds:
        if finished is None:
            return cls()
        return cls(tuple(finished.details["rounds"]), len(finished.shards(".parquet")))

    def schedule(self, context: StageContext, total: int) -> Schedule:
        """What is to be made now."""
        from pipelines.stages.pairs.assignment import Schedule
        from pipelines.stages.pairs.publishing.retries import failed_rows

        size = context.config.rows_per_shard
        if not self.end:
            return Schedule(size, total)
        return Schedule(size, total, self.end, failed_rows(context.writer.storage, self.shards))

    @property
    def shards(self) -> list[range]:
        """The shards of every round."""
        return [range(first, stop) for first, stop in zip(self.first_shards, [*self.first_shards[1:], self.end])]

    def with_round(self, schedule: Schedule) -> _Rounds:
        return _Rounds((*self.first_shards, schedule.first_shard), schedule.shards.stop)


@dataclass(frozen=True)
class _Work:
    """One round of the stage."""

    context: StageContext
    source: Source
    schedule: Schedule
    rounds: _Rounds

    @property
    def config(self) -> PairsConfig:
        config: PairsConfig = self.context.config
        return config

    @property
    def in_two_steps(self) -> bool:
        return self.config.deduplicate or self.config.scoring is not None

    def run(self) -> None:
        committed = self.context.writer.committed().keys()
        pending = [shard for shard in self.schedule.shards if not self._files(shard) <= committed]
        if self.in_two_steps and pending:
            self._make(self._not_made())
            self._score()
            self._publish(pending)
        else:
            self._make(pending)
        # Only now: until the last shard is committed, each of them may be needed to decide what is a duplicate.
        self.context.writer.storage.remove(WORK)

    def _files(self, shard: int) -> set[str]:
        """The files that every committed shard has; with buckets its tars are known by its parquet alone."""
        from pipelines.stages.pairs.shard.files import table_name, tar_name

        return {table_name(shard), *([] if self.config.resize == "buckets" else [tar_name(shard)])}

    def _not_made(self) -> list[int]:
        from pipelines.stages.pairs.shard.staged import record_name

        found = set((self.context.writer.storage / WORK).names("*.json"))
        return [shard for shard in self.schedule.shards if record_name(shard) not in found]

    def _make(self, shards: Sequence[int]) -> None:
        from pipelines.compute.actor_pool import map_on_actors, pool_size
        from pipelines.stages.pairs.making.board import Board
        from pipelines.stages.pairs.making.worker import ShardMaker
        from pipelines.stages.pairs.publishing.publish import Publisher

        if not shards:
            return
        context, writer = self.context, self.context.writer
        board = Board()
        arguments = {
            "source": self.source,
            "config": self.config,
            "schedule": self.schedule,
            "work": writer.storage / WORK,
            "publisher": None if self.in_two_steps else Publisher(self.config, writer.storage / WORK, writer),
            "board": board,
        }
        size = pool_size(len(shards), workers=self.config.workers, use_gpu=False)
        at_once = self.config.shards_in_flight if self.source.downloads else 1
        results = map_on_actors(
            [{"shard": shard} for shard in shards],
            ShardMaker,
            arguments=arguments,
            size=size,
            # No more than its share: a worker that starts first would otherwise take them all.
            calls_at_once=min(at_once, math.ceil(len(shards) / size.workers)),
        )
        before = self.schedule.rows - sum(map(self.schedule.rows_of, shards))
        with contextlib.closing(board), _Showing(context, board, before, self.schedule.rows) as showing:
            for _ in results:
                context.check()
                showing.track()

    def _score(self) -> None:
        if self.config.scoring is not None:
            from pipelines.stages.pairs.publishing.scoring import score_shards

            work = self.context.writer.storage / WORK
            score_shards(self.config.scoring, work, self.schedule.shards, self.context.progress)

    def _publish(self, pending: Sequence[int]) -> None:
        from pipelines.compute.tasks import chunks
        from pipelines.stages.pairs.publishing.duplicate_search import DuplicateSearch
        from pipelines.stages.pairs.publishing.duplicate_tokens import Shards
        from pipelines.stages.pairs.publishing.publish import Publisher

        storage = self.context.writer.storage
        work = storage / WORK
        earlier = [Shards(storage, shards, number) for number, shards in enumerate(self.rounds.shards)]
        search = DuplicateSearch(
            # What an earlier round has found is not what this one looks for.
            work / f"round-{len(earlier)}",
            (*earlier, Shards(work, self.schedule.shards, len(earlier), in_the_making=True)),
            self.schedule.total,
            self.config.near_duplicates,
        )
        if self.config.deduplicate:
            search.run(_for_each)
        publisher = Publisher(self.config, work, self.context.writer)
        groups = list(chunks(pending, _PUBLISHED_AT_ONCE))
        deduplicate = self.config.deduplicate

        def publish(item: dict[str, Any]) -> dict[str, Any]:
            publisher.publish_all(groups[int(item["item"])], search if deduplicate else None)
            return {"item": item["item"]}

        for _ in _for_each(publish, range(len(groups))):
            pass


def _total(source: Source, config: PairsConfig) -> int:
    total = source.total
    return total if config.limit is None else min(total, config.limit)


def _require_columns(source: Source, config: PairsConfig) -> None:
    from pipelines.stages.pairs.filters import column_filters
    from pipelines.stages.pairs.sources.columns import find_column

    names = list(source.extra_types)
    for name in column_filters(config):
        if find_column(names, name) is None:
            raise UserError(
                f"{config.source} has no column `{name}`, which pairs.filters.{name} needs: it has "
                f"{', '.join(names) or 'none'}; take the filter out of the recipe or name a column"
            )


def _summarise(context: StageContext, rounds: _Rounds, total: int) -> dict[str, Any]:
    from pipelines.stages.pairs.summary.summary import summarise

    config: PairsConfig = context.config
    storage = context.writer.storage
    details = summarise(storage, rounds.shards, image_size=config.image_size, for_each=_for_each)
    details["rounds"] = list(rounds.first_shards)
    details["additions"] = _additions(context, rounds)
    if not details["samples"]:
        # Nothing is lost by it, and after a network failure the next run must try again.
        for name in [COMMITS, *storage.names("*.tar"), *storage.names("*.parquet")]:
            storage.remove(name)
        counts = ", ".join(f"{count} {status}" for status, count in details["statuses"].items())
        raise UserError(f"no row of {config.source} gave a sample ({counts}): mend the source, or what refuses it")
    for status, count in details["statuses"].items():
        context.tracker.metric(f"pairs/{status.replace(':', '_')}", count)
    return details


def _additions(context: StageContext, rounds: _Rounds) -> int:
    """How many retries gave samples."""
    from pipelines.stages.pairs.shard.files import shard_name

    rows = Counter[str]()
    for name, record in context.writer.committed().items():
        rows[name.partition(".")[0]] += record.rows
    return sum(any(rows[shard_name(shard)] for shard in shards) for shards in rounds.shards[1:])
