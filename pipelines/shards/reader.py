"""Random access to the samples of tar shards, local or remote.

Where a shard's files lie is read from its index, or found by a scan of its headers if it was written without one; a
sample is then one `pread` a file, held against the checksum that the index has. Remote shards are fetched whole into a
local cache folder of bounded size.
"""

import hashlib
import os
import tempfile
import threading
import zlib
from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

from pipelines.errors import UserError
from pipelines.patience import give_up_at
from pipelines.shards.index import MOST_INDEX_BYTES, ShardIndex, index_name, scan_shard
from pipelines.shards.tar_headers import TarError
from pipelines.store.failures import MissingFileError
from pipelines.store.file_table import FileRecord, FileTable
from pipelines.store.storage import Storage

DEFAULT_CACHE_BYTES = 32 << 30
FETCH_THREADS = 4
# Those of a few shuffle windows. One takes some sixty bytes a sample, so that the second bound holds for large shards.
MAX_INDEXES = 4096
MAX_INDEXES_BYTES = 128 << 20
# Fetches of one shard that is gone from the local disk each time it is to be opened.
MOST_FETCHES = 5


class ShardReader:
    """Samples by (shard, row). Safe to use from several threads.

    Args:
        storage: the folder of an artifact.
        files: its files: the shards, numbered in the order of their names, and their indexes if they have any.
        max_open: number of files kept open.
        cache_bytes: bytes of fetched remote shards kept on the local disk; the shards being read are kept whatever
            their size.

    Attributes:
        rows_per_shard: samples in each shard, (shards,) int64.
    """

    def __init__(
        self,
        storage: Storage,
        files: FileTable,
        *,
        max_open: int = 64,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
    ) -> None:
        self.storage, self._files = storage, files
        # A record is made when it is needed: as an object it would take many times what it takes in the table.
        self._positions = files.positions()
        self.rows_per_shard = files.table.column("rows").to_numpy()[self._positions]
        self._bytes = files.table.column("bytes").to_numpy()[self._positions]
        self._max_open, self._cache_bytes = max_open, cache_bytes
        self._lock = threading.Lock()
        self._indexes: OrderedDict[int, ShardIndex] = OrderedDict()
        self._indexes_bytes = 0
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()
        self._fetched: OrderedDict[int, Future[Path]] = OrderedDict()
        self._cache: tempfile.TemporaryDirectory[str] | None = None
        self._end = threading.Event()
        self._fetcher = ThreadPoolExecutor(
            FETCH_THREADS, thread_name_prefix="fetch", initializer=give_up_at, initargs=(self._end,)
        )

    def key(self, shard: int, row: int) -> str:
        """Return the key of one sample."""
        return self._index(shard).key(row)

    def read(self, shard: int, row: int, extensions: Iterable[str] | None = None) -> dict[str, bytes]:
        """Return the files of one sample by extension (`jpg`, `tokens.npy`); all of them, or only those named.

        Raises:
            UserError: the shard or its index is missing, truncated, damaged or of another shard; names the shard and,
                where a file of the sample is not what was written, the sample.
        """
        index, file = self._index(shard), self._file(shard)
        files = {}
        for extension, (offset, size, crc32) in index.spans(row, extensions).items():
            data = file.read(offset, size)
            if len(data) != size or (crc32 is not None and zlib.crc32(data) != crc32):
                found = f"has {len(data)} of {size} bytes" if len(data) != size else "does not have the CRC-32"
                raise self._damaged(
                    self._record(shard),
                    f"is damaged, or another shard stands in its place: {extension} of sample {index.key(row)} "
                    f"{found} that its index says",
                )
            files[extension] = data
        return files

    def fetch_ahead(self, shards: Iterable[int]) -> None:
        """Start fetching remote shards in the background; a no-op if storage is local."""
        if not self.storage.is_local:
            for shard in shards:
                self._fetch(shard)

    def close(self) -> None:
        self._end.set()
        self._fetcher.shutdown(wait=True, cancel_futures=True)
        with self._lock:
            self._open.clear()
            self._fetched.clear()
        if self._cache:
            self._cache.cleanup()

    def _record(self, shard: int) -> FileRecord:
        return self._files.at(int(self._positions[shard]))

    def _index(self, shard: int) -> ShardIndex:
        with self._lock:
            if (known := self._indexes.get(shard)) is not None:
                self._indexes.move_to_end(shard)
                return known
        record = self._record(shard)
        written = self._files.get(index_name(record.name))
        index = self._scan(shard, record) if written is None else self._load(record, written)
        if len(index) != record.rows:
            raise self._damaged(record, f"holds {len(index)} samples, but {record.rows} were committed")
        with self._lock:
            if shard not in self._indexes:
                self._indexes[shard] = index
                self._indexes_bytes += index.nbytes
            while len(self._indexes) > 1 and (
                len(self._indexes) > MAX_INDEXES or self._indexes_bytes > MAX_INDEXES_BYTES
            ):
                self._indexes_bytes -= self._indexes.popitem(last=False)[1].nbytes
        return index

    def _load(self, record: FileRecord, written: FileRecord) -> ShardIndex:
        """Read the index that was written with a shard."""
        try:
            if written.bytes > MOST_INDEX_BYTES:
                raise ValueError(f"it has {written.bytes} bytes, more than {MOST_INDEX_BYTES}")
            data = self.storage.read_range(written.name, 0, written.bytes)
            if (found := hashlib.sha256(data).hexdigest()) != written.sha256:
                raise ValueError(f"it has the sha256 {found[:12]}… instead of {written.sha256[:12]}…")
            return ShardIndex.decode(data, shard_bytes=record.bytes)
        except MissingFileError:
            raise self._damaged(record, f"has lost its index: {written.name} is missing") from None
        except ValueError as error:
            raise self._damaged(record, f"cannot be read by its index {written.name} ({error})") from error

    def _scan(self, shard: int, record: FileRecord) -> ShardIndex:
        """Find the samples of a shard that was written without an index."""
        with self._open_anew(shard) as file:
            try:
                return scan_shard(file, checksums=False)
            except TarError as error:
                raise self._damaged(record, f"is not a whole tar ({error})") from error

    def _file(self, shard: int) -> "_OpenShard":
        with self._lock:
            if shard in self._open:
                self._open.move_to_end(shard)
                return self._open[shard]
        opened = _OpenShard(self._open_anew(shard))
        with self._lock:
            self._open[shard] = opened
            # Not closed here: another thread may be reading. The garbage collector closes the file once the last
            # reader lets go of it.
            while len(self._open) > self._max_open:
                self._open.popitem(last=False)
        return opened

    def _open_anew(self, shard: int) -> BinaryIO:
        """Open a local file of the shard, fetched if storage is remote."""
        record = self._record(shard)
        if self.storage.is_local:
            try:
                file = open(self.storage.path(record.name), "rb")  # noqa: SIM115 - closed by the caller
            except FileNotFoundError:
                raise self._damaged(record, "is missing") from None
            try:
                self._check_size(record, os.fstat(file.fileno()).st_size)
            except UserError:
                file.close()
                raise
            return file
        for _ in range(MOST_FETCHES):
            fetched = self._fetch(shard)
            try:
                return open(fetched.result(), "rb")
            except FileNotFoundError:
                # Evicted by another thread since it was fetched, or removed by whoever tidies up the disk.
                self._forget(shard, fetched)
        raise UserError(
            f"{self._cache.name if self._cache else 'the cache'}: fetched shards are removed from it while they are "
            "needed: keep whatever tidies up temporary files away, or set TMPDIR to another folder"
        )

    def _forget(self, shard: int, fetched: "Future[Path]") -> None:
        with self._lock:
            if self._fetched.get(shard) is fetched:
                del self._fetched[shard]

    def _fetch(self, shard: int) -> "Future[Path]":
        with self._lock:
            earlier = self._fetched.get(shard)
            # A download that failed ahead of its use is tried again: the store may be back.
            if earlier is not None and not (earlier.done() and earlier.exception()):
                self._fetched.move_to_end(shard)
                return earlier
            # Two threads that want the same shard share one download through its future.
            if self._cache is None:
                self._cache = tempfile.TemporaryDirectory(prefix="ldm-shards-")
            self._evict()
            future = self._fetcher.submit(self._download, shard, Path(self._cache.name))
            self._fetched[shard] = future
            return future

    def _download(self, shard: int, folder: Path) -> Path:
        record = self._record(shard)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{shard:06d}.tar"
        # Before it is fetched: a shard that is missing or cut is not worth its way over the network.
        self._check_size(record, self.storage.size(record.name))
        if index_name(record.name) in self._files:
            # With its shard, so that whoever reads the first sample of it waits for neither.
            self._index(shard)
        # Under its name only when whole: a thread that was told of an earlier download, evicted since, may open it.
        partial = path.with_suffix(".partial")
        self.storage.download(record.name, partial)
        return partial.replace(path)

    def _evict(self) -> None:
        """Forget the shards used longest ago until the rest fits; called with the lock held."""
        kept = sum(int(self._bytes[shard]) for shard in self._fetched)
        for shard in list(self._fetched):
            if kept <= self._cache_bytes:
                return
            if not self._fetched[shard].done():
                continue
            # Removing the file takes nothing from a thread that reads it: an open file outlives its name.
            future = self._fetched.pop(shard)
            self._open.pop(shard, None)
            if future.exception() is None:
                future.result().unlink(missing_ok=True)
            kept -= int(self._bytes[shard])

    def _check_size(self, record: FileRecord, size: int) -> None:
        if size < 0:
            raise self._damaged(record, "is missing")
        if size != record.bytes:
            raise self._damaged(record, f"has {size} bytes, but {record.bytes} were committed")

    def _damaged(self, record: FileRecord, what: str) -> UserError:
        return UserError(
            f"shard {self.storage.url}/{record.name} {what}: `ldm verify {self.storage.url}` tells what is whole; "
            "remove the folder and run the same command again to rebuild it"
        )


class _OpenShard:
    """An open file that several threads may read at once: `pread` has no position that they could move."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def read(self, offset: int, size: int) -> bytes:
        return os.pread(self._file.fileno(), size, offset)
