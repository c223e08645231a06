"""One input row, whatever kind of source it comes from, with its values as JSON and Arrow can hold them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import pyarrow as pa

# Names of a shard's own columns and json fields; a source's column of such a name becomes `source_NAME`.
RESERVED = frozenset(
    {"row", "key", "status", "url", "caption", "captions", "sha256"}
    | {"width", "height", "original_width", "original_height"}
    | {"bucket", "phash", "duplicate_of", "clip_score", "aesthetic_score"}
)
# Deepest nesting of lists and objects in a carried column: a hostile table can nest deeper than JSON writers recurse.
_MAX_DEPTH = 32


class RejectedError(Exception):
    """A row that gives no sample, for the reason `status`. Never leaves the `pairs` package."""

    def __init__(self, status: str) -> None:
        super().__init__(status)
        self.status = status


@dataclass(frozen=True)
class Row:
    """One image-text pair of the source.

    Attributes:
        index: number of the row in the whole source, from 0.
        captions: the texts that are not blank, unchanged; may be empty.
        url: the URL of the picture; downloaded from there unless `load` is given.
        load: reads the picture's bytes, given how many it may have at most; raises RejectedError.
        extra: all other columns that can be written as JSON, by name.
        status: why the row gives no sample, if that was known after reading the table.
    """

    index: int
    captions: tuple[str, ...]
    url: str | None = None
    load: Callable[[int], bytes] | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    status: str | None = None


class Source(Protocol):
    """A set of pairs with numbered rows. It is cheap to pickle, and any range of rows is cheap to read."""

    @property
    def total(self) -> int:
        """The number of rows."""
        ...

    @property
    def parts(self) -> Sequence[int]:
        """The number of rows in each file that holds rows, in order; shards are cut where large ones begin and end."""
        ...

    @property
    def extra_types(self) -> Mapping[str, pa.DataType]:
        """Arrow types of those columns of `Row.extra` that hold a single value (no list or object) in each row."""
        ...

    @property
    def downloads(self) -> bool:
        """True if pictures must be downloaded."""
        ...

    def read(self, start: int, stop: int) -> list[Row]:
        """Read rows start to stop - 1, in order."""
        ...

    def digest(self) -> str:
        """Digest the contents: equal for two copies of one data set in different places."""
        ...


def captions_of(value: Any) -> tuple[str, ...]:
    """Extract the captions from a table's cell or JSON field: a string or a list of strings, without blank ones.

    Numbers become text and bytes are read as UTF-8; a missing number (NaN) and objects are no captions.
    """
    values = value if isinstance(value, list | tuple) else [value]
    texts = (_text(v) for v in values)
    return tuple(text for text in texts if text.strip())


def url_of(value: Any) -> str | None:
    """Extract the URL from a table's cell, without surrounding white space; None if the cell is blank."""
    return _text(value).strip() or None


def _text(value: Any) -> str:
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if value is None or isinstance(value, dict | list | tuple) or (isinstance(value, float) and math.isnan(value)):
        return ""
    return str(plain(value if isinstance(value, str) else str(value)))


def extra_names(columns: list[str]) -> dict[str, str]:
    """Map a source's other columns to the names under which they are carried over."""
    names: dict[str, str] = {}
    taken = set(RESERVED)
    for column in columns:
        name = column
        while name in taken:
            name = f"source_{name}"
        names[column] = name
        taken.add(name)
    return names


def plain(value: Any, depth: int = 0) -> Any:
    """Convert a value to JSON's types: NaN, bytes and deep nesting become null, dates and the like become text."""
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, str):
        # Half of a surrogate pair cannot be written as UTF-8.
        return value if value.isascii() else value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, bytes) or depth > _MAX_DEPTH:
        return None
    if isinstance(value, dict):
        return {plain(str(k)): plain(v, depth + 1) for k, v in value.items() if not isinstance(v, bytes)}
    if isinstance(value, list | tuple):
        return [plain(v, depth + 1) for v in value if not isinstance(v, bytes)]
    return plain(str(value))


class _Huge:
    """Stands for integers that do not fit into Arrow's int64."""


def kind_of(value: Any) -> type:
    """Return the type that `type_of` takes for a value."""
    kind = type(value)
    return _Huge if kind is int and not -(2**63) <= value < 2**63 else kind


def type_of(kinds: Iterable[type]) -> pa.DataType | None:
    """Return the Arrow type that holds JSON values of all these kinds: text if they differ, None if one is nested."""
    found = set(kinds) - {type(None)}
    if found & {list, dict, tuple, bytes}:
        return None
    if found == {bool}:
        return pa.bool_()
    if found == {int}:
        return pa.int64()
    # Integers beyond int64 (identifiers, mostly) become numbers only beside floats, where digits are lost anyway;
    # otherwise they become text with all their digits.
    if float in found and found <= {int, float, _Huge}:
        return pa.float64()
    return pa.string()


def widest(first: pa.DataType, second: pa.DataType) -> pa.DataType:
    """Return the type of a column that has one type in one part of a table and another type in the next."""
    if first == second:
        return first
    numbers = all(pa.types.is_integer(kind) or pa.types.is_floating(kind) for kind in (first, second))
    return pa.float64() if numbers else pa.string()


def fit(value: Any, kind: pa.DataType) -> Any:
    """Convert a JSON value for a column of an Arrow type; None if it does not fit."""
    if value is None or isinstance(value, list | dict):
        return None
    if pa.types.is_string(kind):
        return value if isinstance(value, str) else str(value)
    if pa.types.is_boolean(kind):
        return value if isinstance(value, bool) else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if pa.types.is_integer(kind):
        low, high = (0, 2**64) if pa.types.is_uint64(kind) else (-(2**63), 2**63)
        return value if isinstance(value, int) and low <= value < high else None
    try:
        return float(value)
    except OverflowError:
        return None
