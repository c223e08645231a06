"""One shard: a range of input rows to a tar of samples and a parquet with one line for every row."""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.pairs.config import PairsConfig
from pipelines.pairs.rows import RejectedError, Row, Source, fit
from pipelines.records import write_shard
from pipelines.storage import Storage

if TYPE_CHECKING:
    import pyarrow as pa

    from pipelines.pairs.decode import Picture

OK = "ok"
_LOOKUP_THREADS = 32


@dataclass(frozen=True)
class Outcome:
    """What became of one row: a status, and where it is `ok` the picture. `sha256` is of the source's bytes."""

    status: str
    sha256: str | None = None
    picture: Picture | None = None


def shard_name(shard: int) -> str:
    return f"{shard:06d}"


def sample_key(shard: int, row_in_shard: int) -> str:
    """5 digits of the shard, 4 of the row in it, as img2dataset names samples."""
    return f"{shard:05d}{row_in_shard:04d}"


def build_shard(
    source: Source, config: PairsConfig, shard: int, stop: int, target: Storage, *, tasks: int
) -> dict[str, int]:
    """Read, fetch, decode and write the rows of one shard.

    Writes `NNNNNN.tar`, then `NNNNNN.parquet`, each whole: the second says that the first is there. What is written
    depends on the rows and what servers answer, not on the order or speed of their answers.

    Args:
        shard: its number; its rows start at `shard * config.rows_per_shard`.
        stop: rows of the source that count (`limit`).
        target: the folder to write to.
        tasks: how many shards are made at once, to share cores and connections.

    Returns:
        `rows` and how many of them are `ok`.
    """
    start = shard * config.rows_per_shard
    rows = source.read(start, min(start + config.rows_per_shard, stop))
    outcomes = process_rows(rows, config, downloads=source.downloads, tasks=tasks)
    write_outcomes(target, shard, rows, outcomes, source, config)
    return {"rows": len(rows), "ok": sum(outcome.status == OK for outcome in outcomes)}


def process_rows(rows: Sequence[Row], config: PairsConfig, *, downloads: bool, tasks: int) -> list[Outcome]:
    """The outcome of every row, in order; pictures are decoded while others are still being read or fetched."""
    decided = [_decide(row, config) for row in rows]
    todo = [row for row, outcome in zip(rows, decided) if outcome is None]
    threads = max(1, math.ceil((os.cpu_count() or 1) / tasks))
    with ThreadPoolExecutor(threads) as pool:
        if downloads:
            urls = [row.url for row in todo if row.url is not None]
            made = asyncio.run(_fetch_all(urls, config, pool, tasks))
        else:
            made = list(pool.map(lambda row: _load_one(row, config), todo))
    results = iter(made)
    return [outcome or next(results) for outcome in decided]


def _decide(row: Row, config: PairsConfig) -> Outcome | None:
    """The outcome where the row alone, without its picture, is enough."""
    if row.status is not None:
        return Outcome(row.status)
    if not row.captions:
        return Outcome("empty_caption")
    if config.min_similarity is not None and not _similar(row, config.min_similarity):
        return Outcome("filtered:similarity")
    if row.load is None and row.url is None:
        return Outcome("missing_url")
    return None


def _similar(row: Row, least: float) -> bool:
    value = next((value for name, value in row.extra.items() if name.lower() == "similarity"), None)
    try:
        return value is not None and float(value) >= least
    except (TypeError, ValueError):
        return False


def _load_one(row: Row, config: PairsConfig) -> Outcome:
    assert row.load is not None
    try:
        data = row.load(config.max_image_bytes)
    except RejectedError as error:
        return Outcome(error.status)
    return _decode(data, config)


def _decode(data: bytes, config: PairsConfig) -> Outcome:
    from pipelines.pairs.decode import make_picture

    digest = hashlib.sha256(data).hexdigest()
    try:
        return Outcome(OK, digest, make_picture(data, config))
    except RejectedError as error:
        return Outcome(error.status, digest)


async def _fetch_all(urls: Sequence[str], config: PairsConfig, pool: ThreadPoolExecutor, tasks: int) -> list[Outcome]:
    from pipelines.pairs.download import Downloader

    loop = asyncio.get_running_loop()
    # Looking up a name blocks a thread, for long where its servers are gone.
    loop.set_default_executor(ThreadPoolExecutor(_LOOKUP_THREADS))
    async with Downloader(config.download, max_bytes=config.max_image_bytes, share=tasks) as downloader:

        async def fetch(url: str) -> Outcome:
            try:
                async with downloader.fetched(url) as data:
                    return await loop.run_in_executor(pool, _decode, data, config)
            except RejectedError as error:
                return Outcome(error.status)

        # One request for all the rows that name the same URL.
        distinct = list(dict.fromkeys(urls))
        outcomes = dict(zip(distinct, await asyncio.gather(*(fetch(url) for url in distinct))))
    return [outcomes[url] for url in urls]


def write_outcomes(
    target: Storage,
    shard: int,
    rows: Sequence[Row],
    outcomes: Sequence[Outcome],
    source: Source,
    config: PairsConfig,
) -> None:
    """Write the tar of a shard and then its parquet."""
    name = shard_name(shard)
    keys = [sample_key(shard, position) for position in range(len(rows))]
    with target.writer(f"{name}.tar") as path:
        write_shard(path, _samples(keys, rows, outcomes, config))
    with target.writer(f"{name}.parquet") as path:
        write_table(path, _status_table(keys, rows, outcomes, source))


def _samples(
    keys: Iterable[str], rows: Iterable[Row], outcomes: Iterable[Outcome], config: PairsConfig
) -> Iterable[tuple[str, dict[str, bytes]]]:
    for key, row, outcome in zip(keys, rows, outcomes):
        if (picture := outcome.picture) is None:
            continue
        facts: dict[str, Any] = {
            **row.extra,
            "captions": list(row.captions),
            "sha256": outcome.sha256,
            "original_width": picture.original_width,
            "original_height": picture.original_height,
            "width": picture.width,
            "height": picture.height,
        }
        if row.url is not None:
            facts["url"] = row.url
        text = json.dumps(facts, sort_keys=True, ensure_ascii=False, allow_nan=False)
        yield key, {config.encode: picture.data, "txt": row.captions[0].encode(), "json": text.encode()}


def _status_table(keys: Sequence[str], rows: Sequence[Row], outcomes: Sequence[Outcome], source: Source) -> pa.Table:
    import pyarrow as pa

    pictures = [outcome.picture for outcome in outcomes]
    columns: dict[str, Any] = {
        "row": pa.array([row.index for row in rows], pa.int64()),
        "key": pa.array(keys, pa.string()),
        "status": pa.array([outcome.status for outcome in outcomes], pa.string()),
        "url": pa.array([row.url for row in rows], pa.string()),
        "caption": pa.array([row.captions[0] if row.captions else None for row in rows], pa.string()),
        "sha256": pa.array([outcome.sha256 for outcome in outcomes], pa.string()),
        "width": pa.array([picture and picture.original_width for picture in pictures], pa.int32()),
        "height": pa.array([picture and picture.original_height for picture in pictures], pa.int32()),
    }
    for name, kind in source.extra_types.items():
        columns[name] = pa.array([fit(row.extra.get(name), kind) for row in rows], kind)
    return pa.table(columns)


def write_table(path: Path | str, table: pa.Table) -> None:
    """Write a parquet whose bytes depend on the table alone."""
    import pyarrow.parquet as pq

    pq.write_table(table, path, compression="zstd", row_group_size=max(table.num_rows, 1), store_schema=False)
