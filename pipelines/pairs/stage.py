"""The `pairs` stage: raw image-text pairs to WebDataset shards, in parallel, one shard at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from pipelines.errors import UserError
from pipelines.ledger import COMMITS, ArtifactWriter
from pipelines.pairs.config import PairsConfig
from pipelines.stage import RateMeter, Stage, StageContext

if TYPE_CHECKING:
    from pipelines.pairs.rows import Source

FORMAT_VERSION = 1
# Shards before deduplication; removed when all are finished.
WORK = "work"
# Tasks a CPU, where pictures are downloaded: while the last slow hosts of one shard are waited for, another is decoded.
_DOWNLOADS_PER_CPU = 2


def source_digests(config: PairsConfig) -> dict[str, str]:
    """The source by content, as part of the artifact's key."""
    from pipelines.pairs.sources import open_source

    return {"source": open_source(config).digest()}


def count_rows(config: PairsConfig) -> int | None:
    """Input rows, for estimates; None where counting them means reading the whole source over a network."""
    from pipelines.pairs.sources import open_source
    from pipelines.pairs.tars import TarSource

    source = open_source(config)
    if isinstance(source, TarSource) and any("://" in url for url in source.urls):
        return None
    return _total(source, config)


def run(context: StageContext) -> dict[str, Any]:
    """Make every shard that is not committed yet, and say what came out.

    With `deduplicate`, shards are first made under `work/`; when all are there, the duplicates among all rows are known
    and the final shards are written without them. Both steps pass over what an earlier run has left finished.

    Raises:
        UserError: the source is missing, damaged, empty or lacks a column; or no row gave a sample.
    """
    from pipelines.pairs.shard import shard_name
    from pipelines.pairs.sources import open_source
    from pipelines.pairs.summary import summarise

    config: PairsConfig = context.config
    writer = context.writer
    source = open_source(config)
    total = _total(source, config)
    if total == 0:
        raise UserError(f"{config.source} has no rows: say `--set pairs.source=PATH` of a source with pairs in it")
    _require_similarity(source, config)
    shards = math.ceil(total / config.rows_per_shard)
    committed = writer.committed()
    parquets = [f"{shard_name(shard)}.parquet" for shard in range(shards)]
    pending = [
        shard for shard in range(shards) if not {parquets[shard], f"{shard_name(shard)}.tar"} <= committed.keys()
    ]
    if pending:
        _make(context, source, pending, shards, total)
    # Only now: until the last shard is committed, each of them may be needed to decide what is a duplicate.
    writer.storage.remove(WORK)
    details = summarise(writer.storage, parquets, image_size=config.image_size)
    if not details["samples"]:
        # Nothing is lost by it, and after a network failure the next run must try again.
        for name in [COMMITS, *writer.storage.names("*.tar"), *writer.storage.names("*.parquet")]:
            writer.storage.remove(name)
        counts = ", ".join(f"{count} {status}" for status, count in details["statuses"].items())
        raise UserError(f"no row of {config.source} gave a sample ({counts}): mend the source, or what refuses it")
    for status, count in details["statuses"].items():
        context.tracker.metric(f"pairs/{status.replace(':', '_')}", count)
    return details


def _total(source: Source, config: PairsConfig) -> int:
    total = source.total
    return total if config.limit is None else min(total, config.limit)


def _make(context: StageContext, source: Source, pending: list[int], shards: int, total: int) -> None:
    from pipelines.pairs.deduplicate import find_duplicates
    from pipelines.pairs.shard import shard_name

    config: PairsConfig = context.config
    writer = context.writer
    work = writer.storage / WORK
    target = work if config.deduplicate else writer.storage
    wanted = range(shards) if config.deduplicate else pending
    # A shard's parquet is written after its tar: where it is, both are whole.
    found = set(target.names())
    missing = [s for s in wanted if not {f"{shard_name(s)}.tar", f"{shard_name(s)}.parquet"} <= found]

    tasks = _tasks(config, source, len(missing))
    meter, made, ok = RateMeter(), 0, 0
    before = total - sum(_rows_of(shard, config, total) for shard in missing)
    context.progress(before, total)

    def build(item: dict[str, Any]) -> dict[str, Any]:
        from pipelines.pairs.shard import build_shard

        return build_shard(source, config, int(item["item"]), total, target, tasks=tasks)

    for result in _map(build, missing, tasks=tasks, cpus=1 / _DOWNLOADS_PER_CPU if source.downloads else 1):
        made, ok = made + result["rows"], ok + result["ok"]
        rate = meter.rate(made)
        context.progress(before + made, total, rows_per_s=f"{rate:.0f}", ok=f"{100 * ok / made:.1f} %")
        context.tracker.metric("throughput/rows_per_s", rate, step=before + made)

    if not config.deduplicate:
        for shard in pending:
            _commit(writer, shard)
        return
    duplicates: dict[int, list[int]] = {}
    for row in find_duplicates(work, shards):
        duplicates.setdefault(row // config.rows_per_shard, []).append(row)

    def finish(item: dict[str, Any]) -> dict[str, Any]:
        from pipelines.pairs.deduplicate import finish_shard

        shard = int(item["item"])
        if not all(writer.storage.exists(f"{shard_name(shard)}.{kind}") for kind in ("tar", "parquet")):
            finish_shard(work, shard, duplicates.get(shard, []), writer.storage)
        _commit(writer, shard)
        return {"shard": shard}

    for _ in _map(finish, pending, tasks=_tasks(config, source, len(pending)), cpus=1):
        pass


def _commit(writer: ArtifactWriter, shard: int) -> None:
    import pyarrow.parquet as pq

    from pipelines.pairs.shard import OK, shard_name

    name = shard_name(shard)
    with writer.storage.open(f"{name}.parquet") as file:
        statuses = pq.read_table(file, columns=["status"]).column("status").to_pylist()
    writer.commit(f"{name}.tar", rows=statuses.count(OK))
    writer.commit(f"{name}.parquet")


def _map(
    function: Callable[[dict[str, Any]], dict[str, Any]], items: Iterable[int], *, tasks: int, cpus: float
) -> Iterator[dict[str, Any]]:
    """Call a function on every item through Ray Data; results come as they are ready."""
    import ray.data

    numbers = list(items)
    if not numbers:
        return
    # One block an item, so that each shard is a task of its own: the unit of work and of retry.
    dataset = ray.data.from_items(numbers, override_num_blocks=len(numbers)).map(
        function, num_cpus=cpus, compute=ray.data.TaskPoolStrategy(size=tasks)
    )
    yield from dataset.iter_rows()


def _tasks(config: PairsConfig, source: Source, items: int) -> int:
    """How many shards are made at once."""
    import ray

    cpus = max(1, int(ray.cluster_resources().get("CPU", 1)))
    possible = cpus * (_DOWNLOADS_PER_CPU if source.downloads else 1)
    return max(1, min(config.workers or possible, items))


def _rows_of(shard: int, config: PairsConfig, total: int) -> int:
    return min(config.rows_per_shard, total - shard * config.rows_per_shard)


def _require_similarity(source: Source, config: PairsConfig) -> None:
    names = list(source.extra_types)
    if config.min_similarity is not None and "similarity" not in (name.lower() for name in names):
        raise UserError(
            f"{config.source} has no column `similarity`, which pairs.min_similarity needs: it has {', '.join(names)}; "
            "say `--set pairs.min_similarity=null`"
        )


STAGE = Stage(
    name="pairs",
    format_version=FORMAT_VERSION,
    upstream=(),
    inputs=source_digests,
    run=run,
    uses_seed=False,
)
