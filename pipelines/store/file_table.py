"""Files of an artifact as a columnar table: a hundred bytes a file, and on disk instead of in memory if they are many.

name      string
rows      int64      samples in the file; 0 for files that hold none
bytes     int64
sha256    binary(32) digest of the file
content   binary(32) digest of what it holds, without what depends on its place; null if nothing is taken over
origin    binary(32) digest of all that its bytes were made from; null likewise
"""

from __future__ import annotations

import bisect
import hashlib
import io
import tempfile
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from pipelines.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from numpy.typing import NDArray

# `pyarrow` is imported when a table is made or read: `ldm --help` and a plan need none.

_DIGEST_BYTES = 32
# Records that are made at once while a table is gone through.
_RECORDS_AT_ONCE = 1024
# Tables of more files are not held in memory.
_MOST_IN_MEMORY = 10_000
_UNPACKED_AT_ONCE = 8192


class FileRecord(BaseModel):
    """One committed file: a shard, a weights file, a grid.

    Attributes:
        name: its path in the artifact's folder.
        rows: samples in it; 0 for files that hold none.
        bytes: its size.
        sha256: hexadecimal digest of its bytes.
        content: hexadecimal digest of what it holds, without what depends on its place (sample keys, shard number).
            None if nothing is to be taken over by it.
        origin: hexadecimal digest of all that its bytes were made from: files with equal ones are interchangeable.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    rows: int = 0
    bytes: int
    sha256: str
    content: str | None = None
    origin: str | None = None


class FileTable:
    """Records of committed files by name, in the order of their names; immutable.

    Args:
        table: an Arrow table with the columns above, sorted by name, each name once.
    """

    def __init__(self, table: pa.Table) -> None:
        self._table = table

    @classmethod
    def of(cls, records: Iterable[FileRecord]) -> FileTable:
        """Make a table of records; of several with one name the first counts."""
        import pyarrow as pa

        first: dict[str, FileRecord] = {}
        for record in records:
            first.setdefault(record.name, record)
        ordered = [first[name] for name in sorted(first)]
        columns = {
            "name": [record.name for record in ordered],
            "rows": [record.rows for record in ordered],
            "bytes": [record.bytes for record in ordered],
            "sha256": [bytes.fromhex(record.sha256) for record in ordered],
            "content": [bytes.fromhex(record.content) if record.content else None for record in ordered],
            "origin": [bytes.fromhex(record.origin) if record.origin else None for record in ordered],
        }
        return cls(pa.table(columns, schema=_schema()))

    @classmethod
    def decode(cls, data: bytes) -> FileTable:
        """Read a table from parquet. Raises ValueError if it is not one of these."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            return cls(pq.read_table(io.BytesIO(data)).cast(_schema()))
        except (pa.ArrowException, OSError) as error:
            raise ValueError(" ".join(str(error).split())[:200]) from error

    @classmethod
    def open(cls, path: Path) -> FileTable:
        """Read a table from a local parquet file.

        A large one is unpacked to a temporary file, of which the kernel keeps in memory what is used, as long as there
        is room: so many processes may each have a table of millions of files.

        Raises:
            FileNotFoundError: there is no file.
            ValueError: it is not one of these.
            UserError: there is no room for the temporary file.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            with pq.ParquetFile(path, memory_map=True) as packed:
                if packed.metadata.num_rows <= _MOST_IN_MEMORY:
                    return cls(packed.read().cast(_schema()))
                batches = (
                    pa.Table.from_batches([batch]).cast(_schema())
                    for batch in packed.iter_batches(_UNPACKED_AT_ONCE, use_threads=False)
                )
                table = cls(_on_disk(batches))
            # Arrow's allocator would keep what was unpacked, some 30 MB, in every process.
            pa.default_memory_pool().release_unused()
            return table
        except FileNotFoundError:
            raise
        except (pa.ArrowException, OSError) as error:
            raise ValueError(" ".join(str(error).split())[:200]) from error

    def encode(self) -> bytes:
        """Write the table as parquet."""
        import pyarrow.parquet as pq

        buffer = io.BytesIO()
        # Digests do not compress, and names hardly need to: a dictionary of either would only cost.
        pq.write_table(self._table, buffer, compression="zstd", use_dictionary=False, store_schema=False)
        return buffer.getvalue()

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def __iter__(self) -> Iterator[FileRecord]:
        for batch in self._table.to_batches(max_chunksize=_RECORDS_AT_ONCE):
            yield from map(_record, batch.to_pylist())

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self.position(name) is not None

    def holds(self, names: Iterable[str]) -> list[bool]:
        """Return of each of many names whether such a file is there: much faster than one after the other."""
        import pyarrow as pa
        import pyarrow.compute as pc

        found = pc.is_in(pa.array(names, pa.string()), value_set=self._table.column("name"))
        return [bool(each) for each in found.to_pylist()]

    def __getitem__(self, name: str) -> FileRecord:
        if (position := self.position(name)) is None:
            raise KeyError(name)
        return self.at(position)

    def position(self, name: str) -> int | None:
        """Return where a file stands in the order of the names; None if it is not there."""
        names = self._table.column("name")
        position = bisect.bisect_left(_Names(names), name)
        return position if position < len(names) and names[position].as_py() == name else None

    def positions(self, suffix: str = ".tar") -> NDArray[np.int64]:
        """Return the positions of the files whose names end with `suffix`."""
        import numpy as np
        import pyarrow.compute as pc

        found, first = [np.empty(0, np.int64)], 0
        # Chunk by chunk, in this thread: others would keep memory of their own.
        for names in self._table.column("name").chunks:
            found.append(np.flatnonzero(pc.ends_with(names, suffix).to_numpy(zero_copy_only=False)) + first)
            first += len(names)
        return np.concatenate(found)

    def at(self, position: int) -> FileRecord:
        """Return the record at a position, in the order of the names."""
        return _record(self._table.slice(position, 1).to_pylist()[0])

    def get(self, name: str) -> FileRecord | None:
        """Return the record of a file; None if there is none."""
        try:
            return self[name]
        except KeyError:
            return None

    @property
    def names(self) -> list[str]:
        """All names, in order."""
        return [str(name) for name in self._table.column("name").to_pylist()]

    @cached_property
    def rows(self) -> int:
        """Samples in all files."""
        return self._sum("rows")

    @cached_property
    def bytes(self) -> int:
        """Size of all files."""
        return self._sum("bytes")

    @property
    def table(self) -> pa.Table:
        """The Arrow table, for what is done to all files at once."""
        return self._table

    def shards(self, suffix: str = ".tar") -> FileTable:
        """Return the files whose names end with `suffix`."""
        import pyarrow.compute as pc

        return FileTable(self._table.filter(pc.ends_with(self._table.column("name"), suffix)))

    def without(self, names: Iterable[str]) -> FileTable:
        """Return the files of other names."""
        import pyarrow as pa
        import pyarrow.compute as pc

        given = pa.array(names, pa.string())
        return FileTable(self._table.filter(pc.invert(pc.is_in(self._table.column("name"), value_set=given))))

    def union(self, *others: FileTable) -> FileTable:
        """Return the files of all; of a name that several have, the first table's record counts."""
        import pyarrow as pa
        import pyarrow.compute as pc

        # One sort however many tables there are: a driver that goes on reads dozens of segments. It is stable.
        every = pa.concat_tables([self._table, *(other._table for other in others)])
        every = every.take(pc.sort_indices(every, sort_keys=[("name", "ascending")]))
        names = every.column("name").combine_chunks()
        new = pc.not_equal(names[1:], names[:-1])
        return FileTable(every.filter(pa.concat_arrays([pa.array([True] * min(len(names), 1), pa.bool_()), new])))

    def digest(self, leave_out: tuple[str, ...] = ()) -> str:
        """Return a digest of names and contents, equal for two tables of the same bytes under the same names.

        Args:
            leave_out: files, or folders ending in "/", that do not count.
        """
        digest = hashlib.sha256()
        for record in self:
            if not any(_is_in(record.name, place) for place in leave_out):
                digest.update(f"{record.name}\0{record.sha256}\n".encode())
        return digest.hexdigest()

    def _sum(self, column: str) -> int:
        import pyarrow.compute as pc

        return int(pc.sum(self._table.column(column)).as_py() or 0)

    def __repr__(self) -> str:
        return f"FileTable({len(self)} files)"


def _on_disk(parts: Iterable[pa.Table]) -> pa.Table:
    """Return a table that lies in a file without a name, mapped into memory."""
    import pyarrow as pa

    try:
        with tempfile.NamedTemporaryFile(prefix="ldm-files-") as file:
            with pa.ipc.new_file(file, _schema()) as unpacked:
                for part in parts:
                    unpacked.write_table(part)
            file.flush()
            return pa.ipc.open_file(pa.memory_map(file.name)).read_all()
    except OSError as error:
        # Arrow's own errors, of a damaged table, have no number.
        if error.errno is None:
            raise
        raise UserError(
            f"cannot write to {tempfile.gettempdir()} ({error.strerror}): make room there, or set TMPDIR to another "
            "folder"
        ) from error


class _Names:
    """An Arrow array of names, as `bisect` reads it."""

    def __init__(self, names: Any) -> None:
        self._names = names

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, position: int) -> str:
        return str(self._names[position].as_py())


def _is_in(name: str, place: str) -> bool:
    """Tell whether a file is `place`, or lies in it if that is a folder (ends in "/")."""
    return name.startswith(place) if place.endswith("/") else name == place


def _schema() -> pa.Schema:
    import pyarrow as pa

    digest = pa.binary(_DIGEST_BYTES)
    return pa.schema(
        [
            ("name", pa.string()),
            ("rows", pa.int64()),
            ("bytes", pa.int64()),
            ("sha256", digest),
            ("content", digest),
            ("origin", digest),
        ]
    )


def _record(values: dict[str, Any]) -> FileRecord:
    content, origin = values["content"], values["origin"]
    # Not validated again: the columns have their types, and this is called for every file of an artifact.
    return FileRecord.model_construct(
        name=values["name"],
        rows=values["rows"],
        bytes=values["bytes"],
        sha256=values["sha256"].hex(),
        content=content.hex() if content is not None else None,
        origin=origin.hex() if origin is not None else None,
    )
