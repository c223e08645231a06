"""Tables of pairs: parquet (LAION's own format, in any number of parts) and the text formats."""

from __future__ import annotations

import functools
import itertools
import posixpath
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import fsspec

from pipelines.errors import UserError
from pipelines.ledger import digest_json
from pipelines.pairs.columns import ResolvedColumns, resolve_columns
from pipelines.pairs.config import Columns
from pipelines.pairs.fingerprint import digest_files, stamp
from pipelines.pairs.rows import (
    RejectedError,
    Row,
    captions_of,
    extra_names,
    infer_type,
    plain,
    read_file,
)
from pipelines.pairs.text_tables import TEXT_SUFFIXES, read_text_table

if TYPE_CHECKING:
    import pyarrow as pa

TABLE_SUFFIXES = (".parquet", *TEXT_SUFFIXES)
# Rows looked at to learn what a column holds.
_SAMPLE_ROWS = 100


@dataclass(frozen=True)
class TableSource:
    """Pairs listed in a table of one or more files (parts) of the same columns.

    Args:
        urls: the parts, in order.
        wanted: columns named by the recipe.
        pictures: folder that relative picture paths start from.
    """

    urls: tuple[str, ...]
    wanted: Columns
    pictures: str

    @functools.cached_property
    def _row_counts(self) -> tuple[int, ...]:
        return tuple(_row_count(url) for url in self.urls)

    @property
    def total(self) -> int:
        return sum(self._row_counts)

    @property
    def downloads(self) -> bool:
        return self.columns.image is None

    @functools.cached_property
    def columns(self) -> ResolvedColumns:
        names, head = _head(self.urls[0])
        first = {name: next((row[name] for row in head if row.get(name)), None) for name in names}
        filesystem = self._filesystem

        def exists(path: str) -> bool:
            resolved = self._picture_path(path)
            return resolved is not None and filesystem.exists(resolved)

        return resolve_columns(self.urls[0], names, self.wanted, first, exists)

    @functools.cached_property
    def extra_types(self) -> Mapping[str, pa.DataType]:
        """Types of the columns carried over; in text formats by all their values, in parquet by the schema."""
        names = extra_names([name for name in self._types if name not in self.columns.used])
        return {new: self._types[old] for old, new in names.items()}

    @functools.cached_property
    def _types(self) -> dict[str, pa.DataType]:
        types: dict[str, pa.DataType] = {}
        for url in self.urls:
            for name, kind in _column_types(url).items():
                types.setdefault(name, kind)
        return types

    def digest(self) -> str:
        """By the bytes of the table, and of the pictures that stand beside it."""
        filesystem = fsspec.core.url_to_fs(self.urls[0])[0]
        paths = [fsspec.core.url_to_fs(url)[1] for url in self.urls]
        table = digest_files(filesystem, [("", path) for path in paths], always_read=True)
        column = self.columns.image
        if column is None or column not in self._types:
            return table
        names = self._values(column)
        paths_by_name = {name: path for name in names if (path := self._picture_path(name)) is not None}
        return digest_json([table, digest_files(self._filesystem, list(paths_by_name.items()))])

    def read(self, start: int, stop: int) -> list[Row]:
        rows: list[dict[str, Any]] = []
        ends = list(itertools.accumulate(self._row_counts))
        for url, count, end in zip(self.urls, self._row_counts, ends):
            first, last = max(start - (end - count), 0), min(stop - (end - count), count)
            if first < last:
                rows += _read_part(url, first, last)
        names = extra_names([name for name in self._all_names if name not in self.columns.used])
        return [self._row(index, values, names) for index, values in enumerate(rows, start)]

    @functools.cached_property
    def _all_names(self) -> list[str]:
        return list(dict.fromkeys(name for url in self.urls for name in _column_names(url)))

    @functools.cached_property
    def _filesystem(self) -> fsspec.AbstractFileSystem:
        return fsspec.core.url_to_fs(self.pictures)[0]

    def __getstate__(self) -> dict[str, Any]:
        # Handles of remote stores do not travel between processes.
        return {name: value for name, value in self.__dict__.items() if name != "_filesystem"}

    def _row(self, index: int, values: dict[str, Any], names: Mapping[str, str]) -> Row:
        columns = self.columns
        url = values.get(columns.url) if columns.url else None
        extra = {
            names[name]: plain(value) for name, value in values.items() if name in names and not _is_picture(value)
        }
        return Row(
            index=index,
            captions=captions_of(values.get(columns.text)),
            url=plain(str(url)) if url else None,
            load=self._loader(values.get(columns.image)) if columns.image else None,
            extra=extra,
        )

    def _loader(self, value: Any) -> Callable[[int], bytes]:
        """How to read what the image column says: bytes, a path, or both as Hugging Face's tables have them."""
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")

        def load(max_bytes: int) -> bytes:
            if isinstance(value, bytes):
                if len(value) > max_bytes:
                    raise RejectedError("too_large")
                return value
            path = self._picture_path(value) if isinstance(value, str) and value else None
            if path is None:
                raise RejectedError("missing_file")
            return read_file(self._filesystem, path, max_bytes)

        return load

    def _picture_path(self, name: str) -> str | None:
        # A table may name any place, but not another kind of store than it is read from.
        if "://" in name:
            return None
        base = fsspec.core.url_to_fs(self.pictures)[1]
        local = "file" in self._filesystem.protocol
        return posixpath.normpath(posixpath.join(base, name if local else name.lstrip("/")))

    def _values(self, column: str) -> list[str]:
        found: list[str] = []
        for url in self.urls:
            rows = _read_part(url, 0, _row_count(url), column)
            found += [value for row in rows if isinstance(value := row.get(column), str)]
        return found


def _is_picture(value: Any) -> bool:
    return isinstance(value, bytes) or (isinstance(value, dict) and isinstance(value.get("bytes"), bytes))


def _is_text(url: str) -> bool:
    return url.lower().endswith(TEXT_SUFFIXES)


def _row_count(url: str) -> int:
    return len(read_text_table(url)[1]) if _is_text(url) else int(_parquet(url).metadata.num_rows)


def _column_names(url: str) -> list[str]:
    return read_text_table(url)[0] if _is_text(url) else list(_parquet(url).schema_arrow.names)


def _head(url: str) -> tuple[list[str], list[dict[str, Any]]]:
    return _column_names(url), _read_part(url, 0, min(_SAMPLE_ROWS, _row_count(url)))


def _column_types(url: str) -> dict[str, pa.DataType]:
    import pyarrow as pa

    types: dict[str, pa.DataType] = {}
    if _is_text(url):
        names, rows = read_text_table(url)
        inferred = {name: infer_type([row.get(name) for row in rows]) for name in names}
        return {name: kind for name, kind in inferred.items() if kind is not None}
    for column in _parquet(url).schema_arrow:
        kind = column.type
        if pa.types.is_uint64(kind) or pa.types.is_boolean(kind):
            types[column.name] = kind
        elif pa.types.is_integer(kind):
            types[column.name] = pa.int64()
        elif pa.types.is_floating(kind):
            types[column.name] = pa.float64()
        elif not (pa.types.is_nested(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
            types[column.name] = pa.string()
    return types


def _read_part(url: str, start: int, stop: int, column: str | None = None) -> list[dict[str, Any]]:
    """Rows start to stop - 1 of one file, as dicts; of one column only, where one is named."""
    if _is_text(url):
        return read_text_table(url)[1][start:stop]
    rows: list[dict[str, Any]] = []
    metadata, end = _parquet(url).metadata, 0
    for group in range(metadata.num_row_groups):
        begin, end = end, end + metadata.row_group(group).num_rows
        first, last = max(start, begin), min(stop, end)
        if first < last:
            table = _row_group(url, stamp(url), group, None if column is None else (column,))
            rows += table.slice(first - begin, last - first).to_pylist()
    return rows


def _parquet(url: str) -> Any:
    return _open_parquet(url, stamp(url))


@functools.lru_cache(maxsize=16)
def _open_parquet(url: str, stamp: tuple[int, int] | None) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        filesystem, path = fsspec.core.url_to_fs(url)
        return pq.ParquetFile(path if "file" in filesystem.protocol else filesystem.open(path, "rb"))
    except FileNotFoundError:
        raise UserError(f"{url} is missing") from None
    except (pa.ArrowException, OSError) as error:
        raise UserError(_unreadable(url, error)) from None


# One shard is a small part of a row group of LAION's tables (often a million rows), and the next shard that this
# process makes is mostly in the same one.
@functools.lru_cache(maxsize=2)
def _row_group(url: str, stamp: tuple[int, int] | None, group: int, columns: Sequence[str] | None) -> Any:
    import pyarrow as pa

    try:
        return _parquet(url).read_row_group(group, columns=list(columns) if columns else None)
    except (pa.ArrowException, OSError) as error:
        raise UserError(_unreadable(url, error)) from None


def _unreadable(url: str, error: Exception) -> str:
    reason = " ".join(str(error).split())[:200]
    return f"{url} is not a readable parquet file ({reason}): download or write it again"
