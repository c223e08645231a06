"""Random access to the samples of tar shards, local or remote.

A shard's member offsets are indexed on first use; a sample is then one `pread` a file. Remote shards are fetched
whole into a local cache folder of bounded size.
"""

import os
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

from pipelines.errors import UserError
from pipelines.patience import give_up_at
from pipelines.shards.samples import Sample, shard_samples
from pipelines.shards.tar_headers import FileBytes, Member, TarError
from pipelines.store.file_table import FileRecord
from pipelines.store.storage import Storage

DEFAULT_CACHE_BYTES = 32 << 30
FETCH_THREADS = 4
MAX_INDEXES = 512
# Fetches of one shard that is gone from the local disk each time it is to be opened.
MOST_FETCHES = 5

# Offset and size of a file in its shard.
_Span = tuple[int, int]


class ShardReader:
    """Samples by (shard, row). Safe to use from several threads.

    Args:
        storage: the folder of the shards.
        shards: their records, in order; `rows` of a record is its number of samples.
        max_open: number of files kept open.
        cache_bytes: bytes of fetched remote shards kept on the local disk; the shards being read are kept whatever
            their size.
    """

    def __init__(
        self,
        storage: Storage,
        shards: Iterable[FileRecord],
        *,
        max_open: int = 64,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
    ) -> None:
        self.storage, self.shards = storage, list(shards)
        self._max_open, self._cache_bytes = max_open, cache_bytes
        self._lock = threading.Lock()
        self._index = lru_cache(maxsize=MAX_INDEXES)(self._scan)
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()
        self._fetched: OrderedDict[int, Future[Path]] = OrderedDict()
        self._cache: tempfile.TemporaryDirectory[str] | None = None
        self._end = threading.Event()
        self._fetcher = ThreadPoolExecutor(
            FETCH_THREADS, thread_name_prefix="fetch", initializer=give_up_at, initargs=(self._end,)
        )

    @property
    def rows_per_shard(self) -> list[int]:
        return [shard.rows for shard in self.shards]

    def keys(self, shard: int) -> list[str]:
        """Return the keys of a shard's samples, in their order in the file."""
        return [sample.key for sample in self._index(shard)]

    def read(self, shard: int, row: int, extensions: Iterable[str] | None = None) -> dict[str, bytes]:
        """Return the files of one sample by extension (`jpg`, `tokens.npy`); all of them, or only those named.

        Raises:
            UserError: the shard is missing, truncated, not a tar, or holds another number of samples than was
                committed.
        """
        found = self._index(shard)[row].files
        wanted = found if extensions is None else found.keys() & set(extensions)
        file = self._file(shard)
        return {extension: file.read(*found[extension]) for extension in found if extension in wanted}

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

    def _scan(self, shard: int) -> list[Sample[_Span]]:
        record = self.shards[shard]
        with self._open_anew(shard) as file:
            self._check_size(record, os.fstat(file.fileno()).st_size)
            try:
                found = list(shard_samples(FileBytes(file), _span))
            except TarError as error:
                raise self._damaged(record, f"is not a whole tar ({error})") from error
        if len(found) != record.rows:
            raise self._damaged(record, f"holds {len(found)} samples, but {record.rows} were committed")
        return found

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
        if self.storage.is_local:
            try:
                return open(self.storage.path(self.shards[shard].name), "rb")
            except FileNotFoundError:
                raise self._damaged(self.shards[shard], "is missing") from None
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
        record = self.shards[shard]
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{shard:06d}.tar"
        # Before it is fetched: a shard that is missing or cut is not worth its way over the network.
        self._check_size(record, self.storage.size(record.name))
        # Under its name only when whole: a thread that was told of an earlier download, evicted since, may open it.
        partial = path.with_suffix(".partial")
        self.storage.download(record.name, partial)
        return partial.replace(path)

    def _evict(self) -> None:
        """Forget the shards used longest ago until the rest fits; called with the lock held."""
        kept = sum(self.shards[shard].bytes for shard in self._fetched)
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
            kept -= self.shards[shard].bytes

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


def _span(member: Member) -> _Span:
    assert member.size is not None, "shard_samples gives regular files alone"
    return member.offset, member.size


class _OpenShard:
    """An open file that several threads may read at once: `pread` has no position that they could move."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def read(self, offset: int, size: int) -> bytes:
        return os.pread(self._file.fileno(), size, offset)
