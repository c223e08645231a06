"""Where the files of a shard's samples lie, and their checksums: written with the shard, so that no reader scans it.

An Arrow IPC file with a row for each sample, in the order of the tar; columns of other extensions follow likewise:

key                binary  the sample's key, UTF-8
json               binary  what is known of the sample; not there for shards that hold it in a file
latent.npy/offset  int64   first byte of KEY.latent.npy in the tar; -1 if the sample has no such file
latent.npy/size    int32   bytes
latent.npy/crc32   uint32  of these bytes

The json stands here where training does not read it: as a file it would take two blocks of a tar, and whoever wants it
would fetch the whole shard.
"""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipelines.shards.samples import MOST_EXTENSIONS, MOST_SAMPLE_BYTES, MOST_SAMPLES, contents, shard_samples
from pipelines.shards.tar_headers import FileBytes, Member

# An index of as many samples as a shard may have, with long keys and a dozen files each; or with long json.
MOST_INDEX_BYTES = 1 << 28

_KEY, FACTS = "key", "json"

_ABSENT = -1
_FIELDS = {"offset": pa.int64(), "size": pa.int32(), "crc32": pa.uint32()}


class Span(NamedTuple):
    """A file of a sample: its place in the tar, its size, and the CRC-32 of its bytes (None if unknown)."""

    offset: int
    size: int
    crc32: int | None


class _Columns(NamedTuple):
    """The files of one extension, a row for each sample. `crc32` is None where no checksum is known."""

    offset: NDArray[np.int64]
    size: NDArray[np.int32]
    crc32: NDArray[np.uint32] | None


def index_name(shard: str) -> str:
    """Return the name of the file with a shard's index: `index/000000.arrow`."""
    return f"index/{shard.removesuffix('.tar')}.arrow"


class ShardIndex:
    """Keys of a shard's samples, for each extension where the samples' files lie, and their json if it has it.

    Made by `IndexBuilder` while a shard is written, by `scan_shard`, or by `decode`.
    """

    def __init__(
        self, keys: pa.BinaryArray, files: Mapping[str, _Columns], facts: pa.BinaryArray | None = None
    ) -> None:
        self._keys, self._files, self._facts = keys, dict(files), facts

    def __len__(self) -> int:
        return len(self._keys)

    @property
    def nbytes(self) -> int:
        """Its size in memory."""
        arrays = (each for columns in self._files.values() for each in columns if each is not None)
        columns = (each for each in (self._keys, self._facts) if each is not None)
        return sum(int(each.nbytes) for each in columns) + sum(each.nbytes for each in arrays)

    @property
    def keys(self) -> list[str]:
        """The keys of all samples, in order."""
        return [self.key(row) for row in range(len(self))]

    def key(self, row: int) -> str:
        """Return the key of one sample."""
        return str(self._keys[row].as_py().decode("utf-8", "surrogateescape"))

    @property
    def has_facts(self) -> bool:
        """Whether it has the json of its samples."""
        return self._facts is not None

    def facts(self, row: int) -> bytes:
        """Return the json of one sample."""
        assert self._facts is not None, "an index without the json of its samples"
        return bytes(self._facts[row].as_py())

    def with_facts(self, facts: Sequence[bytes]) -> ShardIndex:
        """Return the same index with the json of each sample."""
        assert len(facts) == len(self), f"json of {len(facts)} samples for {len(self)}"
        return ShardIndex(self._keys, self._files, pa.array(facts, pa.binary()))

    def spans(self, row: int, extensions: Iterable[str] | None = None) -> dict[str, Span]:
        """Return the files of one sample by extension; all of them, or those of the extensions named."""
        wanted = self._files if extensions is None else extensions
        found = ((extension, self.span(row, extension)) for extension in wanted)
        return {extension: span for extension, span in found if span is not None}

    def span(self, row: int, extension: str) -> Span | None:
        """Return where one file of a sample lies; None if it has no such file."""
        if (columns := self._files.get(extension)) is None:
            return None
        offset, size, crc32 = columns
        if (first := int(offset[row])) == _ABSENT:
            return None
        return Span(first, int(size[row]), None if crc32 is None else int(crc32[row]))

    def encode(self) -> bytes:
        """Return the index as a file; equal indexes give equal bytes.

        Raises:
            ValueError: it has no checksums.
        """
        values: list[pa.Array] = [self._keys, *([] if self._facts is None else [self._facts])]
        for extension in sorted(self._files):
            columns = self._files[extension]
            if columns.crc32 is None:
                raise ValueError("an index without checksums is not kept")
            values += [pa.array(each, kind) for each, kind in zip(columns, _FIELDS.values(), strict=True)]
        schema = _schema(self._files, self.has_facts)
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, schema) as file:
            file.write_batch(pa.record_batch(values, schema=schema))
        return bytes(sink.getvalue())

    @classmethod
    def decode(cls, data: bytes, *, shard_bytes: int, facts: bool = False) -> ShardIndex:
        """Read an index from the bytes of its file.

        Args:
            data: the bytes.
            shard_bytes: size of the shard, beyond which no file may lie.
            facts: read the json of the samples, too, if it has it. Without, it takes no memory.

        Raises:
            ValueError: it is not an index, or not one of a shard of this size.
        """
        if len(data) > MOST_INDEX_BYTES:
            raise ValueError(f"{len(data)} bytes are more than {MOST_INDEX_BYTES}")
        try:
            with pa.ipc.open_file(pa.BufferReader(data)) as file:
                names = file.schema.names
            read = pa.ipc.IpcReadOptions(
                included_fields=[number for number, name in enumerate(names) if facts or name != FACTS]
            )
            with pa.ipc.open_file(pa.BufferReader(data), options=read) as file:
                table = file.read_all().combine_chunks()
            # Without it a damaged column of keys would be read beyond its end.
            table.validate(full=True)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(" ".join(str(error).split())[:200]) from error
        has_facts = FACTS in table.schema.names
        extensions = {name.rpartition("/")[0] for name in table.schema.names if name not in (_KEY, FACTS)}
        if len(extensions) > MOST_EXTENSIONS or not table.schema.equals(_schema(extensions, has_facts)):
            raise ValueError(f"unexpected columns {names[:8]}")
        if len(table) > MOST_SAMPLES or any(column.null_count for column in table.columns):
            raise ValueError(f"{len(table)} samples, or missing values")
        # Copies: the columns of the table lie in the bytes of the file, and would keep all of them in memory.
        files = {
            extension: _Columns(*(table.column(f"{extension}/{field}").to_numpy().copy() for field in _FIELDS))
            for extension in sorted(extensions)
        }
        _require_inside(files, len(table), shard_bytes)
        keys = table.column("key")
        if pc.count_distinct(keys).as_py() != len(keys):
            raise ValueError("two samples of one key")
        return cls(_copied(keys), files, _copied(table.column(FACTS)) if has_facts else None)

    def differences(self, written: ShardIndex) -> Iterator[str]:
        """Yield where a shard of this index is not the one that another was written with: one line each."""
        if len(self) != len(written):
            yield f"{len(self)} samples, but its index has {len(written)}"
            return
        for row in range(len(self)):
            if (key := self.key(row)) != written.key(row):
                yield f"sample {key} in the place of {written.key(row)}"
                continue
            mine, theirs = self.spans(row), written.spans(row)
            for extension in sorted(mine.keys() | theirs):
                if mine.get(extension) != theirs.get(extension):
                    yield f"{key}.{extension} is not what its index says"


class IndexBuilder:
    """Gathers a shard's index, sample by sample."""

    def __init__(self) -> None:
        self._keys: list[bytes] = []
        self._files: dict[str, tuple[array[int], array[int], array[int]]] = {}
        self._checked = True

    def add(self, key: str, files: Mapping[str, Span]) -> None:
        """Add a sample, and its files by extension."""
        rows = len(self._keys)
        for extension, span in files.items():
            if extension not in self._files:
                self._files[extension] = (array("q", [_ABSENT]) * rows, array("i", [0]) * rows, array("I", [0]) * rows)
            self._append(extension, span)
        for extension, (offset, *_) in self._files.items():
            if len(offset) == rows:
                self._append(extension, Span(_ABSENT, 0, 0))
        self._keys.append(key.encode("utf-8", "surrogateescape"))

    def _append(self, extension: str, span: Span) -> None:
        offset, size, crc32 = self._files[extension]
        offset.append(span.offset)
        size.append(span.size)
        self._checked = self._checked and span.crc32 is not None
        crc32.append(span.crc32 or 0)

    def index(self) -> ShardIndex:
        """Return the index of the samples added so far."""
        files = {
            extension: _Columns(
                np.array(offset, np.int64),
                np.array(size, np.int32),
                np.array(crc32, np.uint32) if self._checked else None,
            )
            for extension, (offset, size, crc32) in self._files.items()
        }
        return ShardIndex(pa.array(self._keys, pa.binary()), files)


def scan_shard(file: BinaryIO, *, checksums: bool) -> ShardIndex:
    """Make the index of a shard that was written without one.

    Args:
        file: the shard, seekable.
        checksums: read every byte for its checksum; without, headers alone are read.

    Raises:
        TarError: truncated, damaged or not a tar.
    """
    tar, builder = FileBytes(file), IndexBuilder()
    for sample in shard_samples(tar, partial(_span, tar, checksums)):
        builder.add(sample.key, sample.files)
    return builder.index()


def _span(tar: FileBytes, checksums: bool, member: Member) -> Span:
    assert member.size is not None, "shard_samples gives regular files alone"
    return Span(member.offset, member.size, zlib.crc32(contents(tar, member)) if checksums else None)


def _copied(column: pa.ChunkedArray) -> pa.BinaryArray:
    return column.chunk(0).take(pa.array(np.arange(len(column)))) if len(column) else pa.array([], pa.binary())


def _schema(extensions: Iterable[str], has_facts: bool) -> pa.Schema:
    columns = [(_KEY, pa.binary()), *([(FACTS, pa.binary())] if has_facts else [])]
    columns += [(f"{each}/{field}", kind) for each in sorted(extensions) for field, kind in _FIELDS.items()]
    return pa.schema(columns)


def _require_inside(files: Mapping[str, _Columns], rows: int, shard_bytes: int) -> None:
    """Refuse files that do not lie in the shard, and samples that are larger than memory."""
    total = np.zeros(rows, np.int64)
    for extension, (offset, size, _) in files.items():
        size = size.astype(np.int64)
        # Not by where a file ends: that sum could overflow.
        if ((offset < _ABSENT) | (size < 0) | (offset > shard_bytes - size)).any():
            raise ValueError(f"a {extension} outside of the shard's {shard_bytes} bytes")
        total += size
    if (total > MOST_SAMPLE_BYTES).any():
        raise ValueError(f"a sample of more than {MOST_SAMPLE_BYTES} bytes")
