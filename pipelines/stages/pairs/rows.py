"""One input row, whatever it came from, and what can be said of it before its picture is read."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import pyarrow as pa

# Names that a shard's own columns and json fields have; a source's column of that name becomes `source_NAME`.
RESERVED = frozenset(
    {"row", "key", "status", "url", "caption", "captions", "sha256"}
    | {"width", "height", "original_width", "original_height"}
    | {"bucket", "phash", "duplicate_of", "clip_score", "aesthetic_score"}
)
# Of lists and objects in a carried column; JSON writers give up far below what a hostile table can nest.
_MAX_DEPTH = 32


class RejectedError(Exception):
    """This row gives no sample, and `status` says why. Never leaves the `pairs` package."""

    def __init__(self, status: str) -> None:
        super().__init__(status)
        self.status = status


@dataclass(frozen=True)
class Row:
    """One image-text pair of the source.

    Attributes:
        index: of the row in the whole source, from 0.
        captions: the texts that are not blank, unchanged; empty where there is none.
        url: where the picture is or was; downloaded from there unless `load` is given.
        load: reads the picture's bytes, at most as many as given; raises RejectedError.
        extra: every other column that can be written as JSON.
        status: why the row gives no sample, where reading it was enough to know.
    """

    index: int
    captions: tuple[str, ...]
    url: str | None = None
    load: Callable[[int], bytes] | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    status: str | None = None


class Source(Protocol):
    """A set of pairs whose rows are numbered; cheap to pickle, any range of rows is cheap to read."""

    @property
    def total(self) -> int:
        """Rows in all."""
        ...

    @property
    def extra_types(self) -> Mapping[str, pa.DataType]:
        """Arrow types of the columns of `Row.extra` that hold one plain value a row."""
        ...

    @property
    def downloads(self) -> bool:
        """Whether pictures are behind URLs."""
        ...

    def read(self, start: int, stop: int) -> list[Row]:
        """Rows start to stop - 1, in order."""
        ...

    def digest(self) -> str:
        """Of the contents: equal for two copies of one data set at different places."""
        ...


def captions_of(value: Any) -> tuple[str, ...]:
    """The captions in a table's cell or JSON field: a string, or a list of strings; blank ones are left out.

    Numbers count by their text, bytes as UTF-8; a missing number (NaN) and objects are no captions.
    """
    values = value if isinstance(value, list | tuple) else [value]
    texts = (_text(v) for v in values)
    return tuple(text for text in texts if text.strip())


def url_of(value: Any) -> str | None:
    """The URL in a table's cell, without the white space around it; None where there is none."""
    return _text(value).strip() or None


def _text(value: Any) -> str:
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if value is None or isinstance(value, dict | list | tuple) or (isinstance(value, float) and math.isnan(value)):
        return ""
    return str(plain(value if isinstance(value, str) else str(value)))


def extra_names(columns: list[str]) -> dict[str, str]:
    """The name under which each of a source's other columns is carried over."""
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
    """A value as JSON can hold it: NaN, bytes and deep nesting become null, dates and the like their text."""
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
    """Stands for integers that Arrow's int64 does not hold."""


def kind_of(value: Any) -> type:
    """What `type_of` needs to know of a value."""
    kind = type(value)
    return _Huge if kind is int and not -(2**63) <= value < 2**63 else kind


def type_of(kinds: Iterable[type]) -> pa.DataType | None:
    """The Arrow type that holds JSON values of all these kinds; None for nested ones, text where they differ."""
    import pyarrow as pa

    found = set(kinds) - {type(None)}
    if found & {list, dict, tuple, bytes}:
        return None
    if found == {bool}:
        return pa.bool_()
    if found == {int}:
        return pa.int64()
    # An integer of any size alone stays text, so that none of its digits is lost.
    if float in found and found <= {int, float, _Huge}:
        return pa.float64()
    return pa.string()


def widest(first: pa.DataType, second: pa.DataType) -> pa.DataType:
    """The type of a column that has one type in one part of a table and another in the next."""
    import pyarrow as pa

    if first == second:
        return first
    numbers = all(pa.types.is_integer(kind) or pa.types.is_floating(kind) for kind in (first, second))
    return pa.float64() if numbers else pa.string()


def fit(value: Any, kind: pa.DataType) -> Any:
    """A JSON value for a column of that Arrow type; None where it does not fit."""
    import pyarrow as pa

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
