"""The `pairs` stage: raw image-text pairs to WebDataset shards, in parallel, one shard at a time."""

from __future__ import annotations

import contextlib
import math
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipelines.errors import UserError
from pipelines.shards.format import PAIRS_FORMAT
from pipelines.stage import Stage, StageContext
from pipelines.stages.pairs.config import PairsConfig
from pipelines.stages.pairs.shard.outcome import OK, may_pass
from pipelines.store.ledger import COMMITS, Artifact

if TYPE_CHECKING:
    from pipelines.stages.pairs.assignment import Schedule
    from pipelines.stages.pairs.making.board import Board
    from pipelines.stages.pairs.rows import Source

# Shards in the making; removed when all are published.
WORK = "work"
_SHOW_EVERY_S = 1.0
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


def may_grow(config: PairsConfig, finished: Artifact) -> bool:
    """Whether a finished artifact has rows that are to be tried again."""
    statuses = finished.details.get("statuses", {})
    return config.retry == "failed" and any(count and may_pass(status) for status, count in statuses.items())


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
    rounds = _Rounds.of(context.finished)
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
        from pipelines.stages.pairs.publishing.duplicate_search import DuplicateSearch, chunks
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


class _Showing:
    """Tells the display and the tracker how far the workers are, while they work."""

    def __init__(self, context: StageContext, board: Board, before: int, total: int) -> None:
        from pipelines.stages.pairs.making.recent_rate import RecentRate

        self._context, self._board, self._before, self._total = context, board, before, total
        self._rates = {"rows": RecentRate(), "bytes": RecentRate()}
        self._now = {"rows": 0.0, "bytes": 0.0}
        self._rows = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="progress")

    def __enter__(self) -> _Showing:
        from pipelines.stages.pairs.summary.unfinished import write_plan

        write_plan(self._context.writer.storage / WORK, self._total, self._context.config.rows_per_shard)
        self._show()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        self._show()
        self.track()

    def track(self) -> None:
        """Log the rates of this moment."""
        step = self._before + self._rows
        self._context.tracker.metric("throughput/rows_per_s", self._now["rows"], step=step)
        self._context.tracker.metric("throughput/mb_per_s", self._now["bytes"] / 1e6, step=step)

    def _watch(self) -> None:
        while not self._stop.wait(_SHOW_EVERY_S):
            self._show()

    def _show(self) -> None:
        # Of this run alone: what an earlier one has done took none of this one's time.
        counts = self._board.read()
        if counts["rows"] < self._rows:
            return
        self._rows = counts["rows"]
        self._now = {name: rate.update(counts[name]) for name, rate in self._rates.items()}
        facts = {}
        if self._rows:
            facts = {
                "rows/s": f"{self._now['rows']:,.0f}",
                "MB/s": f"{self._now['bytes'] / 1e6:.1f}",
                OK: f"{100 * counts[f'status:{OK}'] / self._rows:.1f} %",
                **_most_frequent_failures(counts, self._rows),
            }
        self._context.progress(min(self._before + self._rows, self._total), self._total, **facts)


def _most_frequent_failures(counts: Counter[str], rows: int, most: int = 3) -> dict[str, str]:
    failures = Counter({name.removeprefix("status:"): n for name, n in counts.items() if name.startswith("status:")})
    failures.pop(OK, None)
    return {name: f"{100 * count / rows:.1f} %" for name, count in failures.most_common(most)}


def _for_each(function: Callable[[dict[str, Any]], dict[str, Any]], items: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Call a function on every item: here where there is one, else as tasks of Ray Data."""
    if len(items) <= 1:
        yield from (function({"item": item}) for item in items)
        return
    import ray.data

    yield from ray.data.from_items(list(items), override_num_blocks=len(items)).map(function, num_cpus=1).iter_rows()


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


STAGE = Stage(
    name="pairs",
    format_version=PAIRS_FORMAT,
    upstream=(),
    inputs=source_digests,
    run=run,
    uses_seed=False,
    may_grow=may_grow,
)
