"""Parquet files, read forward in small pieces: LAION's have row groups of a million rows."""

from __future__ import annotations

import contextlib
import io
import itertools
import threading
from bisect import bisect_right
from collections import deque
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.errors import UserError
from pipelines.store.failures import readable
from pipelines.store.location import Location
from pipelines.store.remembered import remember_by_stamp

_BATCH_ROWS = 1024
_BATCH_BYTES = 2 * 2**20
# Of batches that are kept after they were read: requests of a process's threads come nearly in order.
_WINDOW_BYTES = 16 * 2**20
# Without it, Arrow reads a row group's whole column at once.
_COLUMN_BUFFER_BYTES = 2**18
_OPEN_FILES = 3
_FOOTER_GUESS_BYTES = 2**16


def read_footer(url: str) -> tuple[int, dict[str, pa.DataType | None]]:
    """Return the number of rows, and every column's type as it is carried over: None for nested and binary ones."""
    metadata = _metadata(url)
    return metadata.num_rows, {column.name: _carried_type(column.type) for column in metadata.schema.to_arrow_schema()}


def holds_pictures(url: str, column: str) -> bool:
    """Tell from the footer whether every value of a column is the bytes of a picture, and none the path of one."""
    metadata = _metadata(url)
    kind = metadata.schema.to_arrow_schema().field(column).type
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return True
    # As Hugging Face's tables have them: a struct of bytes and a path.
    place = f"{column}.bytes"
    groups = (metadata.row_group(number) for number in range(metadata.num_row_groups))
    chunks = [group.column(i) for group in groups for i in range(group.num_columns)]
    bytes_of = [chunk.statistics for chunk in chunks if chunk.path_in_schema == place]
    return bool(bytes_of) and all(found is not None and found.null_count == 0 for found in bytes_of)


def _metadata(url: str) -> pq.FileMetaData:
    with readable(url):
        try:
            file = Location.of(url)
            metadata = pq.read_metadata(file.path if file.is_local else io.BytesIO(_footer(file)))
            metadata.schema.to_arrow_schema()
        except pa.ArrowException as error:
            raise _damaged(url, error) from None
    return metadata


def _footer(file: Location) -> bytes:
    """Read the end of a remote file that holds its footer: mostly one request."""
    tail = file.read_tail(_FOOTER_GUESS_BYTES)
    # The last eight bytes are the footer's length and a magic.
    size = int.from_bytes(tail[-8:-4], "little") + 8
    return file.read_tail(size) if size > len(tail) == _FOOTER_GUESS_BYTES else tail


def _carried_type(kind: pa.DataType) -> pa.DataType | None:
    if pa.types.is_uint64(kind) or pa.types.is_boolean(kind):
        return kind
    if pa.types.is_integer(kind):
        return pa.int64()
    if pa.types.is_floating(kind):
        return pa.float64()
    binary = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary, pa.types.is_binary_view)
    return None if pa.types.is_nested(kind) or any(test(kind) for test in binary) else pa.string()


def read_parquet(url: str, start: int, stop: int) -> list[dict[str, Any]]:
    """Return rows start to stop - 1. Cheap for ranges that ascend; safe to call from many threads.

    Raises:
        UserError: damaged, or not the file that was counted.
    """
    batches = _cursor(Location.of(url)).read(start, stop)
    if sum(batch.num_rows for batch in batches) != stop - start:
        raise UserError(f"{url} has changed since it was first read: run again")
    return [row for batch in batches for row in _rows(batch)]


def read_column(url: str, column: str) -> Iterator[Any]:
    """Yield all values of one column, in order."""
    with _explained(url):
        for batch in _batches(_open(Location.of(url)), 0, [column]):
            yield from _cells(batch.column(0))


class _Cursor:
    """A reading position in a file that moves forward, and the batches just behind it."""

    def __init__(self, location: Location) -> None:
        self._location = location
        self._lock = threading.Lock()
        self._file: pq.ParquetFile | None = None
        self._group_starts: list[int] = []
        self._batches: Iterator[pa.RecordBatch] = iter(())
        self._window: deque[tuple[int, pa.RecordBatch]] = deque()
        self._window_bytes = 0
        self._position = 0

    def read(self, start: int, stop: int) -> list[pa.RecordBatch]:
        with self._lock, _explained(self._location.url):
            try:
                return self._read(start, stop)
            except BaseException:
                # An iterator that has raised is at an unknown row: the next call opens the file again.
                self._file = None
                raise

    def _read(self, start: int, stop: int) -> list[pa.RecordBatch]:
        if self._file is None:
            self._file = _open(self._location)
            metadata = self._file.metadata
            sizes = (metadata.row_group(group).num_rows for group in range(metadata.num_row_groups))
            self._group_starts = [0, *itertools.accumulate(sizes)]
            self._move_to(start)
        first = self._window[0][0] if self._window else self._position
        if start < first or self._group_of(start) > self._group_of(self._position):
            self._move_to(start)
        found = [piece for begin, batch in self._window if (piece := _overlap(begin, batch, start, stop))]
        while self._position < stop and (batch := next(self._batches, None)) is not None:
            if piece := _overlap(self._position, batch, start, stop):
                found.append(piece)
            self._keep(batch)
        return found

    def _group_of(self, row: int) -> int:
        return bisect_right(self._group_starts, row) - 1

    def _move_to(self, row: int) -> None:
        assert self._file is not None
        group = min(self._group_of(row), self._file.metadata.num_row_groups)
        self._batches = _batches(self._file, group, None)
        self._window.clear()
        self._window_bytes = 0
        self._position = self._group_starts[group]

    def _keep(self, batch: pa.RecordBatch) -> None:
        self._window.append((self._position, batch))
        self._window_bytes += batch.nbytes
        self._position += batch.num_rows
        while self._window_bytes > _WINDOW_BYTES and len(self._window) > 1:
            self._window_bytes -= self._window.popleft()[1].nbytes


# A remote file that changes under a cursor has other rows than were counted, or is no parquet at the old offsets.
@remember_by_stamp(_OPEN_FILES, unstamped=True)
def _cursor(file: Location) -> _Cursor:
    return _Cursor(file)


def _overlap(begin: int, batch: pa.RecordBatch, start: int, stop: int) -> pa.RecordBatch | None:
    first, last = max(start - begin, 0), min(stop - begin, batch.num_rows)
    return batch.slice(first, last - first) if first < last else None


def _open(location: Location) -> pq.ParquetFile:
    file = location.path if location.is_local else location.open_by_ranges()
    return pq.ParquetFile(file, pre_buffer=False, buffer_size=_COLUMN_BUFFER_BYTES)


def _batches(file: pq.ParquetFile, group: int, columns: list[str] | None) -> Iterator[pa.RecordBatch]:
    for number in range(group, file.metadata.num_row_groups):
        facts = file.metadata.row_group(number)
        rows = _BATCH_BYTES * facts.num_rows // max(facts.total_byte_size, 1)
        size = max(1, min(rows, _BATCH_ROWS))
        yield from file.iter_batches(size, row_groups=[number], columns=columns, use_threads=False)


def _rows(batch: pa.RecordBatch) -> Iterator[dict[str, Any]]:
    names = batch.schema.names
    return (dict(zip(names, values)) for values in zip(*map(_cells, batch.columns)))


def _cells(column: pa.Array) -> list[Any]:
    """Convert values to Python's; one that Python cannot hold does not cost the others."""
    try:
        return list(column.to_pylist())
    except (ValueError, OverflowError):
        return [_cell(scalar) for scalar in column]


def _cell(scalar: pa.Scalar) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        if isinstance(scalar, pa.ListScalar):
            return [_cell(item) for item in scalar.values]
        return scalar.as_buffer().to_pybytes().decode("utf-8", "replace") if hasattr(scalar, "as_buffer") else None
    except (ValueError, OverflowError):
        # A time outside of Python's calendar, or finer than its clock.
        with contextlib.suppress(pa.ArrowException):
            return scalar.cast(pa.string()).as_py()
        return None


@contextlib.contextmanager
def _explained(url: str) -> Iterator[None]:
    with readable(url):
        try:
            yield
        except pa.ArrowException as error:
            raise _damaged(url, error) from None
        except OSError as error:
            if isinstance(error, FileNotFoundError | PermissionError | ConnectionError | TimeoutError):
                raise
            raise _damaged(url, error) from None


def _damaged(url: str, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:200]
    return UserError(f"{url} is not a readable parquet file ({reason}): download or write it again")
