"""Random access to the samples of tar shards, local or remote.

A shard's member offsets are indexed on first use; a sample is then one `pread` a file. Remote shards are fetched
whole into the cache of this node.
"""

import os
import threading
from collections import OrderedDict
from collections.abc import Iterable
from functools import lru_cache
from typing import BinaryIO

from pipelines.errors import UserError
from pipelines.shards.node_cache import NodeCache, NotAsCommittedError
from pipelines.shards.samples import Sample, shard_samples
from pipelines.shards.tar_headers import FileBytes, Member, TarError
from pipelines.store.file_table import FileRecord
from pipelines.store.storage import Storage

MAX_INDEXES = 512

# Offset and size of a file in its shard.
_Span = tuple[int, int]


class ShardReader:
    """Samples by (shard, row). Safe to use from several threads.

    Args:
        storage: the folder of the shards.
        shards: their records, in order; `rows` of a record is its number of samples.
        max_open: number of files kept open.
        cache_bytes: size of the node's cache of remote shards; None takes LDM_CACHE_GIB, or 32 GiB.
    """

    def __init__(
        self,
        storage: Storage,
        shards: Iterable[FileRecord],
        *,
        max_open: int = 64,
        cache_bytes: int | None = None,
    ) -> None:
        self.storage, self.shards = storage, list(shards)
        self._max_open = max_open
        self._lock = threading.Lock()
        self._index = lru_cache(maxsize=MAX_INDEXES)(self._scan)
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()
        self._ahead: list[int] = []
        self._cache = None if storage.is_local else NodeCache(storage, cache_bytes)

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

    def fetch_ahead(self, shards: list[int]) -> None:
        """Start to fetch remote shards in the background, and let go of others; a no-op if storage is local.

        Args:
            shards: those that are needed now or soon, in the order of need; may be called with the same ones often.
        """
        if self._cache is None or shards == self._ahead:
            return
        self._ahead = list(shards)
        with self._lock:
            # The bytes of a shard that leaves the cache stay on the disk as long as it is open.
            for shard in self._open.keys() - set(shards):
                del self._open[shard]
        self._cache.fetch_ahead([self.shards[shard] for shard in shards])

    def close(self) -> None:
        with self._lock:
            self._open.clear()
        if self._cache is not None:
            self._cache.close()

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
        record = self.shards[shard]
        if self._cache is not None:
            try:
                return self._cache.open(record)
            except NotAsCommittedError as error:
                raise self._damaged(record, str(error)) from None
        try:
            return open(self.storage.path(record.name), "rb")
        except FileNotFoundError:
            raise self._damaged(record, "is missing") from None

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
