"""Random access to the samples of tar shards, local or remote.

Where a shard's files lie is read from its index, or found by a scan of its headers if it was written without one; a
sample is then one `pread` a file, held against the checksum that the index has. Remote shards are fetched whole into
the cache of this node, their indexes with them.
"""

import hashlib
import os
import threading
import zlib
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, chain
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from pipelines.errors import UserError
from pipelines.shards.index import MOST_INDEX_BYTES, ShardIndex, Span, index_name, scan_shard
from pipelines.shards.node_cache import NodeCache, NotAsCommittedError
from pipelines.shards.order import Place
from pipelines.shards.tar_headers import TarError
from pipelines.store.failures import MissingFileError
from pipelines.store.file_table import FileRecord, FileTable
from pipelines.store.storage import Storage

# Those of a few shuffle windows. One takes some sixty bytes a sample, so that the second bound holds for large shards.
MAX_INDEXES = 4096
MAX_INDEXES_BYTES = 128 << 20
NAMES_AT_ONCE = 8192
# Those with the json of their samples: whoever reads that goes from one sample to the next.
MAX_FACTS = 16


class ShardReader:
    """Samples by (shard, row). Safe to use from several threads.

    Args:
        storage: the folder of an artifact.
        files: its files: the shards, numbered in the order of their names, and their indexes if they have any.
        max_open: number of files kept open.
        cache_bytes: size of the node's cache of remote shards; None takes LDM_CACHE_GIB, or 32 GiB.
    """

    def __init__(
        self,
        storage: Storage,
        files: FileTable,
        *,
        max_open: int = 256,
        cache_bytes: int | None = None,
    ) -> None:
        self.storage, self._files = storage, files
        # A record is made when it is needed: as an object it would take many times what it takes in the table.
        self._positions = _compact(files.positions())
        self._max_open = max_open
        self._lock = threading.Lock()
        self._indexes: OrderedDict[int, ShardIndex] = OrderedDict()
        self._indexes_bytes = 0
        self._facts: OrderedDict[int, ShardIndex] = OrderedDict()
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()
        self._ahead: list[int] = []
        self._in_ranges: frozenset[int] = frozenset()
        self._cache = None if storage.is_local else NodeCache(storage, cache_bytes)

    @property
    def rows_per_shard(self) -> NDArray[np.int64]:
        """Samples in each shard, (shards,) int64; not kept, since they lie in the table of files."""
        rows = self._files.table.column("rows")
        if isinstance(self._positions, range):
            return rows.slice(self._positions.start, len(self._positions)).to_numpy()
        return rows.to_numpy()[self._positions]

    def names(self) -> Iterator[str]:
        """Yield the names of the shards, in order."""
        names = self._files.table.column("name")
        for first in range(0, len(self._positions), NAMES_AT_ONCE):
            positions = self._positions[first : first + NAMES_AT_ONCE]
            if isinstance(positions, range):
                yield from names.slice(positions.start, len(positions)).to_pylist()
            else:
                yield from names.take(positions).to_pylist()

    def key(self, shard: int, row: int) -> str:
        """Return the key of one sample. Raises as `read` does."""
        return self._index(shard).key(row)

    def read(self, shard: int, row: int, extensions: Iterable[str] | None = None) -> dict[str, bytes]:
        """Return the files of one sample by extension (`jpg`, `tokens.npy`); all of them, or only those named.

        Raises:
            UserError: the shard or its index is missing, truncated, damaged or of another shard; names the shard and,
                where a file of the sample is not what was written, the sample.
            OSError: the disk for fetched shards is full.
        """
        index, file = self._index(shard), self._file(shard)
        files = {}
        for extension, span in index.spans(row, extensions).items():
            data = file.read(span.offset, span.size)
            self._check((shard, row), extension, span, len(data), zlib.crc32(data))
            files[extension] = data
        return files

    def read_into(self, shard: int, row: int, extension: str, head: bytearray, values: memoryview) -> bool:
        """Read one file of a sample into memory that is there: its first bytes into `head`, the rest into `values`.

        Returns:
            False if the file is missing or of another size than both together: nothing is read then.

        Raises:
            UserError: as `read` does.
        """
        span = self._index(shard).span(row, extension)
        if span is None or span.size != len(head) + len(values):
            return False
        found = self._file(shard).read_into(span.offset, [head, values])
        self._check((shard, row), extension, span, found, zlib.crc32(values, zlib.crc32(head)))
        return True

    def facts(self, shard: int, row: int) -> bytes:
        """Return the json of one sample, which its shard's index has: the shard itself is not read.

        Raises:
            UserError: the index is missing, damaged or of another shard.
        """
        with self._lock:
            index = self._facts.pop(shard, None)
        if index is None:
            record = self._record(shard)
            written = self._files.get(index_name(record.name))
            index = None if written is None else self._load(record, written, facts=True)
            if index is None or not index.has_facts:
                raise self._damaged(record, "has no index with the json of its samples")
            with self._lock:
                held = index.nbytes + sum(each.nbytes for each in self._facts.values())
                while self._facts and (len(self._facts) >= MAX_FACTS or held > MAX_INDEXES_BYTES):
                    held -= self._facts.popitem(last=False)[1].nbytes
        with self._lock:
            self._facts[shard] = index
        return index.facts(row)

    def fetch_ahead(self, shards: list[int]) -> None:
        """Start to fetch remote shards in the background, and let go of others; a no-op if storage is local.

        Args:
            shards: those that are needed now or soon, in the order of need; may be called with the same ones often.
        """
        if self._cache is None:
            return
        if shards == self._ahead:
            self._cache.keep_fetching()
            return
        self._ahead = list(shards)
        with self._lock:
            # The bytes of a shard that leaves the cache stay on the disk as long as it is open.
            for shard in self._open.keys() - set(shards):
                del self._open[shard]
        records = [self._record(shard) for shard in shards]
        # Each with its index, so that whoever reads its first sample waits for neither.
        wanted = chain.from_iterable((self._files.get(index_name(record.name)), record) for record in records)
        self._cache.fetch_ahead([record for record in wanted if record is not None])

    def read_in_ranges(self, shards: Iterable[int]) -> None:
        """Have files in these remote shards read one by one, a request each: for a few samples of each shard.

        Others are fetched whole, and these too once `fetch_ahead` names them.
        """
        self._in_ranges = frozenset(shards)

    def close(self) -> None:
        with self._lock:
            self._open.clear()
        if self._cache is not None:
            self._cache.close()

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
        with self._lock:
            if shard not in self._indexes:
                self._indexes[shard] = index
                self._indexes_bytes += index.nbytes
            while len(self._indexes) > 1 and (
                len(self._indexes) > MAX_INDEXES or self._indexes_bytes > MAX_INDEXES_BYTES
            ):
                self._indexes_bytes -= self._indexes.popitem(last=False)[1].nbytes
        return index

    def _load(self, record: FileRecord, written: FileRecord, *, facts: bool = False) -> ShardIndex:
        """Read the index that was written with a shard; with the json of its samples if `facts`."""
        try:
            if written.bytes > MOST_INDEX_BYTES:
                raise ValueError(f"it has {written.bytes} bytes, more than {MOST_INDEX_BYTES}")
            index = ShardIndex.decode(self._read(written), shard_bytes=record.bytes, facts=facts)
            return self._of_all_rows(record, index)
        except MissingFileError:
            raise self._damaged(record, f"has lost its index: {written.name} is missing") from None
        except NotAsCommittedError as error:
            raise self._damaged(record, f"cannot be read by its index {written.name} (it {error})") from None
        except ValueError as error:
            raise self._damaged(record, f"cannot be read by its index {written.name} ({error})") from error

    def _read(self, record: FileRecord) -> bytes:
        """Return the bytes of a file of the artifact that is not a shard, if they are those that were committed."""
        if self._cache is not None:
            with self._cache.open(record) as file:
                return file.read()
        data = self.storage.read_range(record.name, 0, record.bytes)
        if (found := hashlib.sha256(data).hexdigest()) != record.sha256:
            raise ValueError(f"it has the sha256 {found[:12]}… instead of {record.sha256[:12]}…")
        return data

    def _scan(self, shard: int, record: FileRecord) -> ShardIndex:
        """Find the samples of a shard that was written without an index."""
        with self._open_anew(shard) as file:
            try:
                return self._of_all_rows(record, scan_shard(file, checksums=False))
            except TarError as error:
                raise self._damaged(record, f"is not a whole tar ({error})") from error

    def _of_all_rows(self, record: FileRecord, index: ShardIndex) -> ShardIndex:
        if len(index) != record.rows:
            raise self._damaged(record, f"holds {len(index)} samples, but {record.rows} were committed")
        return index

    def _file(self, shard: int) -> "_OpenShard | _RemoteShard":
        if self._cache is not None and shard in self._in_ranges and shard not in self._ahead:
            return _RemoteShard(self.storage, self._record(shard).name)
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
        if self._cache is not None:
            try:
                return self._cache.open(record)
            except NotAsCommittedError as error:
                raise self._damaged(record, str(error)) from None
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

    def _check(self, place: Place, extension: str, span: Span, found: int, crc32: int) -> None:
        """Refuse bytes of a file that are not those that its index says: how many were read, and their CRC-32."""
        if found == span.size and span.crc32 in (None, crc32):
            return
        shard, row = place
        what = f"has {found} of {span.size} bytes" if found != span.size else "does not have the CRC-32"
        raise self._damaged(
            self._record(shard),
            f"is damaged, or another shard stands in its place: {extension} of sample {self.key(shard, row)} "
            f"{what} that its index says",
        )

    def _check_size(self, record: FileRecord, size: int) -> None:
        if size != record.bytes:
            raise self._damaged(record, f"has {size} bytes, but {record.bytes} were committed")

    def _damaged(self, record: FileRecord, what: str) -> UserError:
        return UserError(
            f"shard {self.storage.url}/{record.name} {what}: `ldm verify {self.storage.url}` tells what is whole; "
            "remove the folder and run the same command again to rebuild it"
        )


def _compact(positions: NDArray[np.int64]) -> NDArray[np.int64] | range:
    """Return positions as a range where they follow each other, as those of latents do: every process holds them."""
    if len(positions) and positions[-1] - positions[0] == len(positions) - 1:
        return range(int(positions[0]), int(positions[-1]) + 1)
    return positions


class _OpenShard:
    """An open file that several threads may read at once: `pread` has no position that they could move."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

        self._number = file.fileno()

    def read(self, offset: int, size: int) -> bytes:
        return os.pread(self._number, size, offset)

    def read_into(self, offset: int, buffers: Sequence[bytearray | memoryview]) -> int:
        """Read as many bytes as the buffers hold, or as there are; return how many."""
        return os.preadv(self._number, buffers, offset)


class _RemoteShard:
    """A shard of which a range is read at a time."""

    def __init__(self, storage: Storage, name: str) -> None:
        self._storage, self._name = storage, name

    def read(self, offset: int, size: int) -> bytes:
        return self._storage.read_range(self._name, offset, offset + size)

    def read_into(self, offset: int, buffers: Sequence[bytearray | memoryview]) -> int:
        """Read as many bytes as the buffers hold, or as there are; return how many."""
        data = memoryview(self.read(offset, sum(len(buffer) for buffer in buffers)))
        done = 0
        for buffer in buffers:
            part = data[done : done + len(buffer)]
            buffer[: len(part)] = part
            done += len(part)
        return done


def joined(readers: Sequence[ShardReader]) -> "ShardReader | JoinedReader":
    """Return one reader of all shards; a single one as it is."""
    return readers[0] if len(readers) == 1 else JoinedReader(readers)


class JoinedReader:
    """The shards of several readers as those of one, numbered one reader after the other; see `ShardReader`.

    Readers of remote shards share the cache of their node.

    Attributes:
        rows_per_shard: samples in each shard, (shards,) int64.
    """

    def __init__(self, readers: Sequence[ShardReader]) -> None:
        self._readers = list(readers)
        self._ends = list(accumulate(len(each.rows_per_shard) for each in readers))
        self.rows_per_shard = np.concatenate([each.rows_per_shard for each in readers])

    def key(self, shard: int, row: int) -> str:
        """Return the key of one sample; samples of different readers may have the same."""
        number, shard = self._find(shard)
        return self._readers[number].key(shard, row)

    def read(self, shard: int, row: int, extensions: Iterable[str] | None = None) -> dict[str, bytes]:
        """Return the files of one sample by extension; raises as `ShardReader.read` does."""
        number, shard = self._find(shard)
        return self._readers[number].read(shard, row, extensions)

    def read_into(self, shard: int, row: int, extension: str, head: bytearray, values: memoryview) -> bool:
        """Read one file of a sample into memory that is there, as `ShardReader.read_into` does."""
        number, shard = self._find(shard)
        return self._readers[number].read_into(shard, row, extension, head, values)

    def facts(self, shard: int, row: int) -> bytes:
        """Return the json of one sample; raises as `ShardReader.facts` does."""
        number, shard = self._find(shard)
        return self._readers[number].facts(shard, row)

    def fetch_ahead(self, shards: list[int]) -> None:
        """Start to fetch remote shards in the background, and let go of others."""
        wanted: list[list[int]] = [[] for _ in self._readers]
        for each in shards:
            number, shard = self._find(each)
            wanted[number].append(shard)
        for reader, its_own in zip(self._readers, wanted, strict=True):
            reader.fetch_ahead(its_own)

    def read_in_ranges(self, shards: Iterable[int]) -> None:
        """Have files in these remote shards read one by one, as `ShardReader.read_in_ranges` does."""
        places = [self._find(shard) for shard in shards]
        for number, reader in enumerate(self._readers):
            reader.read_in_ranges(shard for of, shard in places if of == number)

    def close(self) -> None:
        for reader in self._readers:
            reader.close()

    def _find(self, shard: int) -> tuple[int, int]:
        """Return the number of the reader that has a shard, and the number that the shard has there."""
        number = bisect_right(self._ends, shard)
        return number, shard - (self._ends[number - 1] if number else 0)
