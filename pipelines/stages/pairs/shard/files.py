"""The files of one shard: tars of samples, and beside them a parquet with one line for every input row."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.shards.format import ShardWriter
from pipelines.stages.pairs.config import PairsConfig
from pipelines.stages.pairs.rows import Row, fit
from pipelines.stages.pairs.shard.outcome import Outcome
from pipelines.stages.pairs.shard.spool import Spool
from pipelines.store.ledger import FileRecord
from pipelines.store.storage import Storage, sha256_file

if TYPE_CHECKING:
    import pyarrow as pa

# Of a caption that is too long to be kept whole.
_SHOWN_CHARACTERS = 1000


def shard_name(shard: int) -> str:
    return f"{shard:06d}"


def tar_name(shard: int, bucket: str | None = None) -> str:
    """`000042.tar`, or `000042.320x192.tar` where a shard's samples are kept apart by their size."""
    return f"{shard_name(shard)}.{bucket}.tar" if bucket else f"{shard_name(shard)}.tar"


def table_name(shard: int) -> str:
    return f"{shard_name(shard)}.parquet"


def sample_key(shard: int, row_in_shard: int) -> str:
    """5 digits of the shard, 4 of the row in it, as img2dataset names samples."""
    return f"{shard:05d}{row_in_shard:04d}"


def score_names(config: PairsConfig) -> list[str]:
    """What a model says of each sample, where the recipe names one."""
    if config.scoring is None:
        return []
    return ["clip_score", *(["aesthetic_score"] if config.scoring.aesthetic_head else [])]


def write_files(
    target: Storage,
    shard: int,
    rows: Sequence[Row],
    outcomes: Sequence[Outcome],
    spool: Spool,
    extra_types: Mapping[str, pa.DataType],
    config: PairsConfig,
) -> list[FileRecord]:
    """Write the tars of a shard and then its parquet, each whole; returns what was written, in that order.

    What is written depends on the rows and their outcomes alone.
    """
    keys = [sample_key(shard, position) for position in range(len(rows))]
    with ShardTars(target, shard, config) as tars:
        for key, row, outcome in zip(keys, rows, outcomes, strict=True):
            if outcome.picture is not None and outcome.stored is not None:
                files = {
                    config.encode: spool.get(outcome.stored),
                    "txt": row.captions[0].encode(),
                    "json": encode_facts(_facts(row, outcome)),
                }
                tars.add(outcome.picture.bucket, key, files)
    return [*tars.records, write_table(target, shard, _table(keys, rows, outcomes, extra_types, config))]


class ShardTars:
    """The tars of one shard: one for all samples, or one a bucket. After the block, `records` says what is there."""

    def __init__(self, target: Storage, shard: int, config: PairsConfig) -> None:
        self.records: list[FileRecord] = []
        self._target, self._shard = target, shard
        self._writers: dict[str | None, ShardWriter] = {}
        self._stack = contextlib.ExitStack()
        if config.resize != "buckets":
            # There always is one, even of no samples.
            self._open(None)

    def __enter__(self) -> ShardTars:
        return self

    def add(self, bucket: str | None, key: str, files: Mapping[str, bytes]) -> None:
        (self._writers.get(bucket) or self._open(bucket)).add(key, files)

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)
        if error[0] is None:
            self.records = [
                FileRecord(name=tar_name(self._shard, bucket), rows=tar.rows, bytes=tar.bytes, sha256=tar.sha256)
                for bucket, tar in sorted(self._writers.items(), key=lambda item: item[0] or "")
            ]

    def _open(self, bucket: str | None) -> ShardWriter:
        path = self._stack.enter_context(self._target.writer(tar_name(self._shard, bucket)))
        self._writers[bucket] = self._stack.enter_context(ShardWriter(path))
        return self._writers[bucket]


def encode_facts(facts: Mapping[str, Any]) -> bytes:
    """The json of a sample."""
    return json.dumps(facts, sort_keys=True, ensure_ascii=False, allow_nan=False).encode()


def _facts(row: Row, outcome: Outcome) -> dict[str, Any]:
    picture = outcome.picture
    assert picture is not None
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
    if picture.bucket is not None:
        facts["bucket"] = picture.bucket
    return facts


def _table(
    keys: Sequence[str],
    rows: Sequence[Row],
    outcomes: Sequence[Outcome],
    extra_types: Mapping[str, pa.DataType],
    config: PairsConfig,
) -> pa.Table:
    import pyarrow as pa

    pictures = [outcome.picture for outcome in outcomes]
    columns: dict[str, Any] = {
        "row": pa.array([row.index for row in rows], pa.int64()),
        "key": pa.array(keys, pa.string()),
        "status": pa.array([outcome.status for outcome in outcomes], pa.string()),
        "url": pa.array([row.url for row in rows], pa.string()),
        "caption": pa.array([_caption(row, outcome) for row, outcome in zip(rows, outcomes)], pa.string()),
        "sha256": pa.array([outcome.sha256 for outcome in outcomes], pa.string()),
        "width": pa.array([picture and picture.original_width for picture in pictures], pa.int32()),
        "height": pa.array([picture and picture.original_height for picture in pictures], pa.int32()),
    }
    if config.resize == "buckets":
        columns["bucket"] = pa.array([picture and picture.bucket for picture in pictures], pa.string())
    if config.near_duplicates is not None:
        columns["phash"] = pa.array([picture and picture.phash for picture in pictures], pa.int64())
    if config.deduplicate:
        columns["duplicate_of"] = pa.nulls(len(rows), pa.int64())
    for name in score_names(config):
        columns[name] = pa.nulls(len(rows), pa.float64())
    for name, kind in extra_types.items():
        columns[name] = pa.array([fit(row.extra.get(name), kind) for row in rows], kind)
    return pa.table(columns)


def _caption(row: Row, outcome: Outcome) -> str | None:
    if not row.captions:
        return None
    return row.captions[0][:_SHOWN_CHARACTERS] if outcome.status == "caption_too_long" else row.captions[0]


def write_table(target: Storage, shard: int, table: pa.Table) -> FileRecord:
    """Write the parquet of a shard; its bytes depend on the table alone."""
    import pyarrow.parquet as pq

    name = table_name(shard)
    with target.writer(name) as path:
        pq.write_table(table, path, compression="zstd", row_group_size=max(table.num_rows, 1), store_schema=False)
        return FileRecord(name=name, bytes=Path(path).stat().st_size, sha256=sha256_file(path))


def read_table(storage: Storage, shard: int, columns: list[str] | None = None) -> pa.Table:
    """Columns of a shard's parquet; all of them where none are named."""
    import pyarrow.parquet as pq

    with storage.open(table_name(shard)) as file:
        return pq.read_table(file, columns=columns)
