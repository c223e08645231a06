"""Dropping pairs whose picture was there before: which stay depends on row numbers, not on the order of arrival."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.pairs.shard import OK, shard_name, write_table
from pipelines.records import read_shard, write_shard
from pipelines.storage import Storage


def find_duplicates(work: Storage, shards: int) -> list[int]:
    """Rows (numbers in the whole source) with an earlier `ok` row of the same source bytes or the same URL, sorted.

    Args:
        work: the folder with `NNNNNN.parquet` of every shard, before deduplication.
        shards: how many.
    """
    rows, by_bytes, by_url = [], [], []
    for shard in range(shards):
        table = _read_table(work, shard, ["row", "status", "url", "sha256"])
        for row in table.to_pylist():
            if row["status"] == OK:
                rows.append(row["row"])
                by_bytes.append(bytes.fromhex(row["sha256"])[:16])
                # A row without a URL is like no other.
                url = f"url {row['url']}" if row["url"] is not None else f"row {row['row']}"
                by_url.append(hashlib.sha256(url.encode()).digest()[:16])
    numbers = np.array(rows, dtype=np.int64)
    repeated = _repeated(by_bytes) | _repeated(by_url)
    return [int(row) for row in numbers[repeated]]


def _repeated(digests: list[bytes]) -> np.ndarray:
    """Which of these 16-byte digests were there before."""
    repeated = np.ones(len(digests), dtype=bool)
    repeated[np.unique(np.array(digests, dtype="S16"), return_index=True)[1]] = False
    return repeated


def finish_shard(work: Storage, shard: int, duplicates: list[int], target: Storage) -> None:
    """Write a shard without its duplicates, whose status becomes `duplicate`.

    Args:
        work, target: folders to read from and to write to.
        duplicates: rows to drop, of this shard.
    """
    import pyarrow as pa

    name = shard_name(shard)
    if not duplicates:
        for suffix in (".tar", ".parquet"):
            with work.local_copy(name + suffix) as path, target.writer(name + suffix) as new:
                _link_or_copy(path, new)
        return
    table = _read_table(work, shard)
    dropped = np.isin(table.column("row").to_numpy(), duplicates)
    keys = set(table.column("key").filter(pa.array(dropped)).to_pylist())
    status = pa.array(
        ["duplicate" if gone else old for gone, old in zip(dropped, table.column("status").to_pylist())], pa.string()
    )
    with work.open(f"{name}.tar") as file, target.writer(f"{name}.tar") as new:
        write_shard(new, _without(read_shard(file), keys))
    with target.writer(f"{name}.parquet") as new:
        write_table(new, table.set_column(table.column_names.index("status"), "status", status))


def _without(samples: Iterable[dict[str, Any]], keys: set[str]) -> Iterator[tuple[str, dict[str, bytes]]]:
    for sample in samples:
        key = sample.pop("__key__")
        if key not in keys:
            yield key, sample


def _link_or_copy(path: Path, new: Path) -> None:
    # A second name for the same bytes costs nothing; both stay valid when the work folder is removed.
    try:
        os.link(path, new)
    except OSError:
        shutil.copyfile(path, new)


def _read_table(work: Storage, shard: int, columns: list[str] | None = None) -> Any:
    import pyarrow.parquet as pq

    with work.open(f"{shard_name(shard)}.parquet") as file:
        return pq.read_table(file, columns=columns)
