"""Tables of pairs: parquet (LAION's own format, in any number of parts) and the text formats."""

from __future__ import annotations

import functools
import itertools
import posixpath
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipelines.stages.pairs.config import Columns, IdentifyBy
from pipelines.stages.pairs.rows import RejectedError, Row, captions_of, extra_names, plain, url_of, widest
from pipelines.stages.pairs.sources.columns import ResolvedColumns, resolve_columns
from pipelines.stages.pairs.sources.files import read_file
from pipelines.stages.pairs.sources.fingerprint import digest_files
from pipelines.stages.pairs.sources.listing import UNLISTED, Listing
from pipelines.stages.pairs.sources.parquet_parts import holds_pictures, read_column, read_footer, read_parquet
from pipelines.stages.pairs.sources.text_tables import TEXT_SUFFIXES, TextIndex, index_text, read_text
from pipelines.store.ledger import digest_json
from pipelines.store.location import Location
from pipelines.store.threads import map_in_threads

if TYPE_CHECKING:
    import pyarrow as pa

TABLE_SUFFIXES = (".parquet", *TEXT_SUFFIXES)
# Number of rows looked at to learn what a column holds.
_SAMPLE_ROWS = 100
_STEP_ROWS = 1000
# Pictures in a store that are asked for one by one; if there are more, the folder is listed.
_MOST_REQUESTS = 1000


@dataclass(frozen=True)
class _Survey:
    """Facts that every part is asked for once.

    Attributes:
        ends: number of rows up to the end of each part.
        types: types of all columns of all parts, in order; None for those that hold no plain value.
        indexes: indexes of the parts, if they are text.
    """

    ends: array[int]
    types: dict[str, pa.DataType | None]
    indexes: tuple[TextIndex, ...]


@dataclass(frozen=True)
class TableSource:
    """Pairs listed in a table of one or more files (parts) of the same columns.

    Args:
        urls: the parts, in order, all of one suffix.
        wanted: the columns that the recipe names.
        pictures: the folder that relative picture paths start from.
        needs_text: whether a table without a column of captions is refused.
    """

    urls: Sequence[str]
    wanted: Columns
    pictures: str
    needs_text: bool = True

    @functools.cached_property
    def _survey(self) -> _Survey:
        types: dict[str, pa.DataType | None] = {}
        counts, indexes = array("q"), []
        for rows, found, index in map_in_threads(_survey_part, self.urls):
            counts.append(rows)
            for name, kind in found.items():
                known = types.setdefault(name, kind)
                types[name] = widest(known, kind) if known is not None and kind is not None else None
            indexes += [index] if index is not None else []
        return _Survey(array("q", itertools.accumulate(counts)), types, tuple(indexes))

    @property
    def total(self) -> int:
        return self._survey.ends[-1]

    @property
    def parts(self) -> Sequence[int]:
        ends = self._survey.ends
        return [end - begin for begin, end in itertools.pairwise([0, *ends])]

    @property
    def downloads(self) -> bool:
        return self.columns.image is None

    @functools.cached_property
    def columns(self) -> ResolvedColumns:
        names = list(self._survey.types)
        head = self._values(0, min(_SAMPLE_ROWS, self.total))
        first = {name: next((row[name] for row in head if row.get(name)), None) for name in names}

        def exists(name: str) -> bool:
            picture = self._picture(name)
            return picture is not None and picture.exists()

        return resolve_columns(self.urls[0], names, self.wanted, first, exists, needs_text=self.needs_text)

    @functools.cached_property
    def extra_types(self) -> Mapping[str, pa.DataType]:
        """Types of the columns carried over; in text formats by all their values, in parquet by the schemas."""
        types = self._survey.types
        return {new: kind for old, new in self._carried.items() if (kind := types[old]) is not None}

    @functools.cached_property
    def _carried(self) -> dict[str, str]:
        return extra_names([name for name in self._survey.types if name not in self.columns.used])

    def digest(self, listing: Listing = UNLISTED, identify_by: IdentifyBy = "contents") -> str:
        """Digest the bytes of the table, and of the pictures that stand beside it."""
        # The suffix decides how a part is read; its name does not matter.
        parts = ((posixpath.splitext(url)[1].lower(), Location.of(url)) for url in self.urls)
        table = digest_files(self.urls[0].rsplit("/", 1)[0], parts, listing, identify_by)
        column = self.columns.image
        if column is None or self._holds_bytes(column):
            return table
        if listing.folder is None and not self._folder.is_local and self.total > _MOST_REQUESTS:
            listing = Listing(self._folder.files_below(), self._folder.path)
        pictures = digest_files(f"{self.pictures} pictures", self._named_pictures(column), listing, identify_by)
        return digest_json([table, pictures])

    def _named_pictures(self, column: str) -> Iterator[tuple[str, Location]]:
        """Yield what a column says and the file it means, for values that name a picture."""
        for value in self._column(column):
            name = _bytes_or_path(value)
            if isinstance(name, str) and (picture := self._picture(name)) is not None:
                yield name, picture

    def _holds_bytes(self, column: str) -> bool:
        """Tell whether the pictures are in the table itself, in every part of it."""
        return not self._survey.indexes and all(holds_pictures(url, column) for url in self.urls)

    def _column(self, column: str) -> Iterator[Any]:
        if not self._survey.indexes:
            for url in self.urls:
                yield from read_column(url, column)
            return
        for start in range(0, self.total, _STEP_ROWS):
            yield from (row.get(column) for row in self._values(start, min(start + _STEP_ROWS, self.total)))

    def read(self, start: int, stop: int) -> list[Row]:
        values = self._values(start, min(stop, self.total))
        return [self._row(index, row) for index, row in enumerate(values, start)]

    def _values(self, start: int, stop: int) -> list[dict[str, Any]]:
        ends, rows = self._survey.ends, []
        part = bisect_right(ends, start)
        while start < stop:
            begin, end = ends[part - 1] if part else 0, min(stop, ends[part])
            rows += self._read_part(part, start - begin, end - begin)
            start, part = max(start, end), part + 1
        return rows

    def _read_part(self, part: int, start: int, stop: int) -> list[dict[str, Any]]:
        if start >= stop:
            return []
        if self._survey.indexes:
            return read_text(self.urls[part], self._survey.indexes[part], start, stop)
        return read_parquet(self.urls[part], start, stop)

    @functools.cached_property
    def _folder(self) -> Location:
        return Location.of(self.pictures)

    def __getstate__(self) -> dict[str, Any]:
        # Found out once, here, instead of once in every worker.
        _ = self.extra_types
        # Handles of remote stores do not travel between processes.
        return {name: value for name, value in self.__dict__.items() if name != "_folder"}

    def _row(self, index: int, values: dict[str, Any]) -> Row:
        columns, names = self.columns, self._carried
        return Row(
            index=index,
            captions=captions_of(values.get(columns.text)) if columns.text else (),
            url=url_of(values.get(columns.url)) if columns.url else None,
            load=self._loader(values.get(columns.image)) if columns.image else None,
            extra={names[n]: plain(value) for n, value in values.items() if n in names and not _is_picture(value)},
        )

    def _loader(self, value: Any) -> Callable[[int], bytes]:
        """Return how to read what the image column says: bytes, a path, or both as Hugging Face's tables have them."""
        value = _bytes_or_path(value)

        def load(max_bytes: int) -> bytes:
            if isinstance(value, bytes):
                if len(value) > max_bytes:
                    raise RejectedError("too_large")
                return value
            picture = self._picture(value) if isinstance(value, str) and value else None
            if picture is None:
                raise RejectedError("missing_file")
            return read_file(picture, max_bytes)

        return load

    def _picture(self, name: str) -> Location | None:
        # A table may name any place, but not another kind of store than it is read from.
        if "://" in name:
            return None
        folder = self._folder
        path = posixpath.join(folder.path, name if folder.is_local else name.lstrip("/"))
        return Location(folder.filesystem, posixpath.normpath(path))


def _bytes_or_path(value: Any) -> Any:
    """Return the bytes of a picture or its path; Hugging Face's tables have both, in a dict."""
    if not isinstance(value, dict):
        return value
    return value["bytes"] if value.get("bytes") is not None else value.get("path")


def _is_picture(value: Any) -> bool:
    return isinstance(value, bytes) or (isinstance(value, dict) and isinstance(value.get("bytes"), bytes))


def _survey_part(url: str) -> tuple[int, Mapping[str, pa.DataType | None], TextIndex | None]:
    if url.lower().endswith(TEXT_SUFFIXES):
        index = index_text(url)
        return index.rows, index.types, index
    return *read_footer(url), None
