"""One input row, whatever it came from, and what can be said of it before its picture is read."""

import datetime
import decimal
import math
import os
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import fsspec
    import pyarrow as pa

# Names that a shard's own columns and json fields have; a source's column of that name becomes `source_NAME`.
RESERVED = frozenset(
    {"row", "key", "status", "url", "caption", "captions", "sha256"}
    | {"width", "height", "original_width", "original_height"}
)


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
    def extra_types(self) -> Mapping[str, "pa.DataType"]:
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
    """The captions in a table's cell or JSON field: a string, or a list of strings; blank ones are left out."""
    values = value if isinstance(value, list | tuple) else [value]
    texts = (plain(v if isinstance(v, str) else str(v)) for v in values if v is not None)
    return tuple(text for text in texts if text.strip())


def extra_names(columns: list[str]) -> dict[str, str]:
    """The name under which each of a source's other columns is carried over."""
    names: dict[str, str] = {}
    for column in columns:
        name = column
        while name in RESERVED or name in names.values():
            name = f"source_{name}"
        names[column] = name
    return names


def plain(value: Any) -> Any:
    """A value as JSON can hold it: NaN becomes null, dates and decimals their text, bytes are left out."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, str):
        # Half of a surrogate pair cannot be written as UTF-8.
        return value if value.isascii() else value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, dict):
        return {str(plain(str(k))): plain(v) for k, v in value.items() if not isinstance(v, bytes)}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value if not isinstance(v, bytes)]
    if isinstance(value, datetime.date | datetime.time | datetime.timedelta | decimal.Decimal):
        return str(value)
    return value


def infer_type(values: list[Any]) -> "pa.DataType | None":
    """The Arrow type that holds all of these JSON values; None for nested ones, text where they differ."""
    import pyarrow as pa

    kinds = {type(v) for v in values if v is not None}
    if kinds & {list, dict, tuple, bytes}:
        return None
    if kinds == {bool}:
        return pa.bool_()
    if kinds == {int} and all(-(2**63) <= v < 2**63 for v in values if v is not None):
        return pa.int64()
    if kinds and kinds <= {int, float}:
        return pa.float64()
    return pa.string()


def fit(value: Any, kind: "pa.DataType") -> Any:
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
    return float(value)


def read_file(filesystem: "fsspec.AbstractFileSystem", path: str, max_bytes: int) -> bytes:
    """The bytes of a picture's file, at most `max_bytes`.

    Raises:
        RejectedError: `missing_file`, `unreadable_file` or `too_large`.
    """
    try:
        if "file" in filesystem.protocol:
            status = os.stat(path)
            # A pipe or a device named as a picture would block the shard for ever.
            if not stat.S_ISREG(status.st_mode):
                raise RejectedError("missing_file")
            size = status.st_size
        else:
            size = int(filesystem.size(path) or 0)
        if size > max_bytes:
            raise RejectedError("too_large")
        with filesystem.open(path, "rb") as file:
            return bytes(file.read(max_bytes))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        raise RejectedError("missing_file") from None
    except OSError:
        raise RejectedError("unreadable_file") from None
