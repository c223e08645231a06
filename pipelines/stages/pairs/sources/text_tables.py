"""Text tables (.csv, .tsv, .jsonl).

A sparse index of byte offsets gives random access; strings are never converted to numbers.
"""

from __future__ import annotations

import csv
import io
import json
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any, BinaryIO

from pipelines.errors import UserError
from pipelines.stages.pairs.rows import kind_of, type_of
from pipelines.stages.pairs.sources.columns import headless_names
from pipelines.store.failures import readable
from pipelines.store.location import Location
from pipelines.store.remembered import remember_by_stamp

if TYPE_CHECKING:
    import pyarrow as pa

JSON_SUFFIXES = (".jsonl", ".ndjson")
TEXT_SUFFIXES = (*JSON_SUFFIXES, ".csv", ".tsv")
# Distance between two places that reading can begin at.
_STEP_ROWS = 1000
_STEP_BYTES = 4 * 2**20
# A file without line ends must not fill the memory.
_MAX_LINE_BYTES = 2**26
_REMEMBERED = 256


class _NotARowError(UserError):
    """A line that is no row of a table written in this way."""


class _Lines:
    """Lines of a file, decoded one at a time.

    Attributes:
        number: lines read so far.
        offset: bytes read so far.
    """

    def __init__(self, url: str, file: BinaryIO, *, from_start: bool) -> None:
        self.number = self.offset = 0
        self._from_start = from_start
        self._url = url
        self._file = file

    def __iter__(self) -> Iterator[str]:
        while line := self._file.readline(_MAX_LINE_BYTES + 1):
            self.number += 1
            if len(line) > _MAX_LINE_BYTES:
                raise UserError(f"{self._url} line {self.number} is longer than {_MAX_LINE_BYTES} bytes: remove it")
            try:
                text = line.decode()
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{self._url} is not UTF-8 (byte {self.offset + error.start}): save it as UTF-8"
                ) from None
            self.offset += len(line)
            yield text.removeprefix("\ufeff") if self._from_start and self.number == 1 else text


# Records of a file: cells, or JSON objects.
_Reader = Callable[[str, _Lines], Iterator[Any]]


def _json_records(url: str, lines: _Lines) -> Iterator[dict[str, Any]]:
    for line in lines:
        if line.isspace():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{url} line {lines.number} is not valid JSON ({error}): mend or remove it") from None
        if not isinstance(row, dict):
            raise UserError(f"{url} line {lines.number} is not a JSON object: one object a line is needed")
        yield row


def _csv_records(url: str, lines: _Lines) -> Iterator[list[str]]:
    return _quoted_records(url, lines, ",")


def _tsv_records(url: str, lines: _Lines) -> Iterator[list[str]]:
    return _quoted_records(url, lines, "\t")


def _quoted_records(url: str, lines: _Lines, delimiter: str) -> Iterator[list[str]]:
    # The csv module's own limit, 128 KiB, is for the whole process; captions may be longer.
    csv.field_size_limit(_MAX_LINE_BYTES)
    try:
        for cells in csv.reader(iter(lines), delimiter=delimiter, strict=True):
            if cells:
                yield cells
    except csv.Error as error:
        raise _NotARowError(f"{url} line {lines.number} is not a row of the table ({error})") from None


def _unquoted_records(url: str, lines: _Lines) -> Iterator[list[str]]:
    for line in lines:
        if text := line.removesuffix("\n").removesuffix("\r"):
            yield text.split("\t")


_READERS: dict[str, _Reader] = {
    "json": _json_records,
    "csv": _csv_records,
    "tsv": _tsv_records,
    "unquoted": _unquoted_records,
}


@dataclass(frozen=True)
class TextIndex:
    """Result of one pass over a text table: its columns, and where to begin reading for a row.

    Attributes:
        reader: how the table is written: `json`, `csv`, `tsv` or `unquoted` (tsv without quotes).
        rows: number of rows.
        names: names of the columns, in order.
        types: types of the columns; None for nested ones.
        mark_rows, mark_bytes: numbers of some rows and the byte each begins at; the last is the table's end.
    """

    reader: str
    rows: int
    names: tuple[str, ...]
    types: dict[str, pa.DataType | None]
    mark_rows: array[int] = field(repr=False)
    mark_bytes: array[int] = field(repr=False)


def index_text(url: str) -> TextIndex:
    """Read a table once, in memory that does not grow with it.

    Cells of .csv and .tsv are strings; a first line that holds a URL is a row, see `headless_names`.

    Raises:
        UserError: not UTF-8, or a line that is not a row of the table; names the line.
    """
    with readable(url):
        return _scan(Location.of(url))


@remember_by_stamp(_REMEMBERED)
def _scan(location: Location) -> TextIndex:
    lowered = location.path.lower()
    if lowered.endswith(JSON_SUFFIXES):
        return _index(location, "json")
    if not lowered.endswith(".tsv"):
        return _index(location, "csv")
    try:
        return _index(location, "tsv")
    except _NotARowError:
        # Published .tsv files mostly do not quote at all, and a caption may begin with a quotation mark.
        return _index(location, "unquoted")


def _index(location: Location, reader: str) -> TextIndex:
    url = location.url
    marks = _Marks()
    columns = _JsonColumns() if reader == "json" else _Cells(url)
    with location.open() as file:
        lines = _Lines(url, file, from_start=True)
        begin = 0
        for record in _READERS[reader](url, lines):
            if columns.take(record, lines.number):
                marks.add(begin)
            begin = lines.offset
        marks.end(begin)
    return TextIndex(reader, marks.count, tuple(columns.names), columns.types(), marks.rows, marks.offsets)


class _Marks:
    """Rows and bytes at which reading can begin: not too many of them, none too far from the next."""

    def __init__(self) -> None:
        self.count = 0
        self.rows, self.offsets = array("q"), array("q")

    def add(self, offset: int) -> None:
        far = not self.rows or self.count - self.rows[-1] >= _STEP_ROWS or offset - self.offsets[-1] >= _STEP_BYTES
        if far:
            self.rows.append(self.count)
            self.offsets.append(offset)
        self.count += 1

    def end(self, offset: int) -> None:
        self.rows.append(self.count)
        self.offsets.append(offset)


class _Cells:
    """Columns of a table of strings."""

    def __init__(self, url: str) -> None:
        self._url = url
        self.names: list[str] = []

    def take(self, cells: list[str], line: int) -> bool:
        """Check a record. Returns whether it is a row, not the header."""
        is_row = True
        if not self.names:
            names = headless_names(cells)
            self.names, is_row = names or cells, names is not None
        if len(cells) != len(self.names):
            raise _NotARowError(
                f"{self._url} line {line} has {len(cells)} fields where the first line has {len(self.names)}: "
                "quote fields that hold the separator"
            )
        return is_row

    def types(self) -> dict[str, pa.DataType | None]:
        return {name: type_of(()) for name in self.names}


class _JsonColumns:
    """Columns of JSON objects, with the types that each has in any of them."""

    def __init__(self) -> None:
        self.names: dict[str, set[type]] = {}
        self._last: tuple[Any, ...] = ()

    def take(self, row: dict[str, Any], line: int) -> bool:
        shape = (*row, *map(kind_of, row.values()))
        # Rows of one table mostly look alike, and one comparison is cheaper than a look at every column.
        if shape != self._last:
            self._last = shape
            for name, value in row.items():
                self.names.setdefault(name, set()).add(kind_of(value))
        return True

    def types(self) -> dict[str, pa.DataType | None]:
        return {name: type_of(kinds) for name, kinds in self.names.items()}


def read_text(url: str, index: TextIndex, start: int, stop: int) -> list[dict[str, Any]]:
    """Return rows start to stop - 1, reading little more of the file than they take.

    Raises:
        UserError: the file is not the one that was indexed.
    """
    first = bisect_right(index.mark_rows, start) - 1
    last = bisect_left(index.mark_rows, stop)
    with readable(url):
        data = Location.of(url).read_range(index.mark_bytes[first], index.mark_bytes[last])
    lines = _Lines(url, io.BytesIO(data), from_start=index.mark_bytes[first] == 0)
    skipped = index.mark_rows[first]
    try:
        records = list(islice(_READERS[index.reader](url, lines), start - skipped, stop - skipped))
        rows = records if index.reader == "json" else [dict(zip(index.names, r, strict=True)) for r in records]
    # The file was a table when it was indexed: if it is none now, it is another file.
    except (UserError, ValueError):
        rows = []
    if len(rows) != stop - start:
        raise UserError(f"{url} has changed since it was first read: run again")
    return rows
