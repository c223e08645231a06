"""The files of one shard: tars of samples, a parquet table with one line for every input row, and the spool.

Only `ok` rows become samples, but every row has its line in the table, with its status.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.shards.format import ShardWriter
from pipelines.stages.pairs.memory import Allowance
from pipelines.stages.pairs.shard.outcome import OK
from pipelines.store.file_table import FileRecord
from pipelines.store.storage import Storage, sha256_file
from pipelines.store.threads import map_in_threads

CAPTION_COLUMNS = ["status", "caption", "captions"]


def shard_name(shard: int) -> str:
    return f"{shard:06d}"


def tar_name(shard: int, bucket: str | None = None) -> str:
    """Return `000042.tar`, or `000042.320x192.tar` for the samples of one aspect-ratio bucket."""
    return f"{shard_name(shard)}.{bucket}.tar" if bucket else f"{shard_name(shard)}.tar"


def table_name(shard: int) -> str:
    return f"{shard_name(shard)}.parquet"


def sample_key(shard: int, row_in_shard: int) -> str:
    """Return 5 digits of the shard and 4 of the row in it, as img2dataset names samples."""
    return f"{shard:05d}{row_in_shard:04d}"


class ShardTars:
    """Writes the tars of one shard: one for all samples, or one a bucket.

    Use it as a context manager; afterwards `records` lists what was written.

    Args:
        target: the folder to write to.
        shard: the shard's number.
        by_bucket: whether samples are kept apart by their bucket. If not, the one tar is written even without samples.
    """

    def __init__(self, target: Storage, shard: int, *, by_bucket: bool) -> None:
        self.records: list[FileRecord] = []
        self._target, self._shard = target, shard
        self._writers: dict[str | None, ShardWriter] = {}
        self._stack = contextlib.ExitStack()
        if not by_bucket:
            self._open(None)

    def __enter__(self) -> ShardTars:
        return self

    def add(self, bucket: str | None, key: str, files: Mapping[str, bytes]) -> None:
        """Append a sample: its key and its files by extension."""
        (self._writers.get(bucket) or self._open(bucket)).add(key, files)

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)
        if error[0] is None:
            self.records = [
                FileRecord(
                    name=tar_name(self._shard, bucket),
                    rows=tar.rows,
                    bytes=tar.bytes,
                    sha256=tar.sha256,
                    content=tar.content,
                )
                for bucket, tar in sorted(self._writers.items(), key=lambda item: item[0] or "")
            ]

    def _open(self, bucket: str | None) -> ShardWriter:
        path = self._stack.enter_context(self._target.writer(tar_name(self._shard, bucket)))
        self._writers[bucket] = self._stack.enter_context(ShardWriter(path))
        return self._writers[bucket]


def encode_facts(facts: Mapping[str, Any]) -> bytes:
    """Encode a sample's `json` file: sorted keys, so that equal facts are equal bytes."""
    return json.dumps(facts, sort_keys=True, ensure_ascii=False, allow_nan=False).encode()


def write_table(target: Storage, shard: int, table: pa.Table) -> FileRecord:
    """Write the parquet of a shard; its bytes depend on the table alone."""
    name = table_name(shard)
    with target.writer(name) as path:
        # The Arrow schema is left out: it would say which version of Arrow wrote the file.
        pq.write_table(table, path, compression="zstd", row_group_size=max(table.num_rows, 1), store_schema=False)
        return FileRecord(name=name, bytes=Path(path).stat().st_size, sha256=sha256_file(path))


def read_table(storage: Storage, shard: int, columns: list[str] | None = None) -> pa.Table:
    """Read a shard's parquet: those of the named columns that it has, or all."""
    # Whole, since a store answers one request sooner than three small ones, and not by `pq.read_table`: with tables as
    # small as these its dataset takes twice as long.
    file = pq.ParquetFile(pa.BufferReader(storage.read_bytes(table_name(shard))))
    names = file.schema_arrow.names
    return file.read(names if columns is None else [name for name in columns if name in names], use_threads=False)


def read_tables(storage: Storage, shards: Iterable[int], columns: list[str]) -> Iterator[pa.Table]:
    """Read the tables of several shards, in order, in a bounded amount of memory."""
    # An object store takes long for one answer, but gives many at once.
    read = map if storage.is_local else map_in_threads
    yield from read(lambda shard: read_table(storage, shard, columns), shards)


def sample_captions_of(table: pa.Table, leave_out: Collection[str] = ()) -> list[str]:
    """Return every caption of the samples of a shard, without reading a tar.

    Args:
        table: the shard's table, with the columns CAPTION_COLUMNS, and `key` if some are left out.
        leave_out: keys of samples that do not count.
    """
    samples = table.filter(pc.equal(table.column("status"), OK))
    if leave_out:
        keys = pa.array(leave_out, pa.string())
        samples = samples.filter(pc.invert(pc.is_in(samples.column("key"), value_set=keys)))
    if "captions" not in samples.column_names:
        return [caption for caption in samples.column("caption").to_pylist() if caption is not None]
    return [caption for captions in samples.column("captions").to_pylist() for caption in captions]


@dataclass(frozen=True)
class Spooled:
    """A piece in a spool: its bytes, or where they are in the spool's file."""

    data: bytes | None
    offset: int
    size: int


class Spool:
    """Keeps the encoded pictures of one shard until all are there: in memory as far as the allowance goes, else in a
    temporary file.

    Pictures are finished in any order, but a tar is written in the order of the rows. `put` may be called from several
    threads, `get` once all pieces are there. Use it as a context manager.
    """

    def __init__(self, allowance: Allowance) -> None:
        self._allowance = allowance
        self._lock = threading.Lock()
        self._held = self._end = 0
        self._file: int | None = None
        self._closed = False

    def put(self, data: bytes) -> Spooled:
        with self._lock:
            if self._closed:
                # Its shard has failed; nobody will ask for it.
                return Spooled(b"", 0, 0)
            if self._allowance.take(len(data)):
                self._held += len(data)
                return Spooled(data, 0, len(data))
            if self._file is None:
                handle, path = tempfile.mkstemp(prefix="ldm-spool-")
                # Without a name it is gone with the process, however that ends.
                os.unlink(path)
                self._file = handle
            offset, self._end = self._end, self._end + len(data)
            written = 0
            while written < len(data):
                written += os.pwrite(self._file, data[written:], offset + written)
            return Spooled(None, offset, len(data))

    def get(self, piece: Spooled) -> bytes:
        if piece.data is not None:
            return piece.data
        assert self._file is not None
        return os.pread(self._file, piece.size, piece.offset)

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._closed = True
            self._allowance.give_back(self._held)
            self._held = 0
            if self._file is not None:
                os.close(self._file)
                self._file = None
