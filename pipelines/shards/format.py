"""The shard format: plain WebDataset tars whose bytes depend on nothing but their contents.

A sample is a key and its files by extension: `000070042` and `{"jpg": …, "txt": …, "json": …}` are stored as
the members `000070042.jpg`, `000070042.json`, `000070042.txt`, next to each other: plain WebDataset.
"""

import functools
import hashlib
import io
import json
import math
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np

from pipelines.errors import UserError
from pipelines.shards.index import FACTS, IndexBuilder, ShardIndex, Span, index_name
from pipelines.shards.samples import MOST_TEXT_BYTES, contents, shard_samples
from pipelines.shards.tar_headers import FileBytes, TarError
from pipelines.store.storage import Storage


class ShardWriter:
    """Write a tar of samples, one after the other; the same samples give the same bytes on any machine.

    Use it as a context manager. Afterwards `rows`, `bytes` and `sha256` say what was written, and `content` is a digest
    of the samples in order without their keys: shards of equal content hold the same samples, wherever they stand.

    Args:
        path: a local file, written in place (put it under `Storage.writer` to make it appear whole).
        index: told of each sample, where the shard is to have an index.
    """

    def __init__(self, path: Path | str, index: IndexBuilder | None = None) -> None:
        self.rows = self.bytes = 0
        self._index = index
        self._keys: set[str] = set()
        self._digest, self._content = hashlib.sha256(), hashlib.sha256()
        self._file = open(path, "wb")  # noqa: SIM115 (closed by __exit__)

    def __enter__(self) -> "ShardWriter":
        return self

    def add(self, key: str, files: Mapping[str, bytes]) -> None:
        """Add a sample: its key (unique, without dots or slashes) and its files by extension."""
        # The key ends at the first dot of the file's name, and a slash would make a folder of it.
        assert not set("./") & set(key), f"bad sample key {key!r}"
        assert key not in self._keys, f"sample key {key} written twice"
        self._keys.add(key)
        self.rows += 1
        # With lengths, so that no two lists of samples are the same bytes.
        self._content.update(b"%d\n" % len(files))
        spans = {}
        for extension in sorted(files):
            data = files[extension]
            self._content.update(f"{extension} {len(data)}\n".encode())
            self._content.update(data)
            self._write(_header(f"{key}.{extension}", len(data)))
            if self._index is not None:
                spans[extension] = Span(self.bytes, len(data), zlib.crc32(data))
            self._write(data)
            if rest := len(data) % tarfile.BLOCKSIZE:
                self._write(bytes(tarfile.BLOCKSIZE - rest))
        if self._index is not None:
            self._index.add(key, spans)

    def __exit__(self, *error: object) -> None:
        try:
            # The end of an archive: two empty blocks, filled up to whole records, as tar itself does it.
            end = self.bytes + 2 * tarfile.BLOCKSIZE
            self._write(bytes(2 * tarfile.BLOCKSIZE + -end % tarfile.RECORDSIZE))
        finally:
            self._file.close()

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    @property
    def content(self) -> str:
        return self._content.hexdigest()

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self.bytes += len(data)


def write_shard(path: Path | str, samples: Iterable[tuple[str, Mapping[str, bytes]]]) -> int:
    """Write a whole tar of (key, files by extension), in the order given; return the number of samples."""
    with ShardWriter(path) as shard:
        for key, files in samples:
            shard.add(key, files)
    return shard.rows


_NAME_BYTES = 100
_SIZE, _CHECKSUM = slice(124, 136), slice(148, 156)


@functools.cache
def _blank_header() -> bytes:
    member = tarfile.TarInfo("")
    member.mode = 0o644
    return member.tobuf(tarfile.USTAR_FORMAT)


def _header(name: str, size: int) -> bytes:
    """Return a member's header as tarfile writes it, in half the time: only name, size and checksum differ."""
    encoded = name.encode()
    # What a plain header cannot say goes into a pax header in front of it, which is tarfile's work.
    if len(encoded) > _NAME_BYTES or not name.isascii() or size >= 8**11:
        member = tarfile.TarInfo(name)
        member.size, member.mode = size, 0o644
        return member.tobuf(tarfile.PAX_FORMAT)
    header = bytearray(_blank_header())
    header[: len(encoded)] = encoded
    header[_SIZE] = b"%011o\0" % size
    header[_CHECKSUM] = b" " * 8
    header[_CHECKSUM] = b"%06o\0 " % sum(header)
    return bytes(header)


def read_shard(file: BinaryIO | Path | str) -> Iterator[dict[str, Any]]:
    """Yield samples one after the other: `{"__key__": str, extension: bytes, …}`.

    Args:
        file: a local path or an open, seekable binary file.

    Raises:
        UserError: the tar is truncated or damaged; names the shard. Raised when the damage is met.
    """
    if isinstance(file, str | Path):
        try:
            with open(file, "rb") as opened:
                yield from read_shard(opened)
        except FileNotFoundError:
            raise UserError(f"shard {file} is missing") from None
        return
    name = getattr(file, "name", None) or getattr(file, "path", "shard")
    try:
        tar = FileBytes(file)
        for sample in shard_samples(tar, functools.partial(contents, tar)):
            yield {"__key__": sample.key, **sample.files}
    except TarError as error:
        raise UserError(f"shard {name} is truncated or damaged ({error}): remove it and make it again") from error


def read_with_facts(storage: Storage, shard: str) -> Iterator[dict[str, Any]]:
    """Yield the samples of a shard with an index as `read_shard` does, each with the `json` that the index has of it.

    Raises:
        UserError: the shard or its index is damaged, or the index is another shard's.
    """
    written = f"{storage.url}/{index_name(shard)}"
    data = storage.read_bytes(index_name(shard))
    with storage.open(shard) as file:
        try:
            index = ShardIndex.decode(data, shard_bytes=file.seek(0, io.SEEK_END), facts=True)
        except ValueError as error:
            raise UserError(f"{written} is damaged ({error}): remove the folder and make it again") from error
        rows = 0
        for rows, sample in enumerate(read_shard(file), 1):
            if rows > len(index) or index.key(rows - 1) != sample["__key__"]:
                break
            for extension, span in index.spans(rows - 1).items():
                if span.crc32 is not None and zlib.crc32(sample.get(extension, b"")) != span.crc32:
                    raise UserError(
                        f"{storage.url}/{shard} is damaged: {extension} of sample {index.key(rows - 1)} does not have "
                        f"the CRC-32 that its index says; `ldm verify {storage.url}` tells what is whole"
                    )
            yield {**sample, **({FACTS: index.facts(rows - 1)} if index.has_facts else {})}
        else:
            if rows == len(index):
                return
        raise UserError(f"{written} is not the index of {shard}: `ldm verify {storage.url}` tells what is whole")


_READ_HEADER = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
_MAGIC_1_0 = np.lib.format.magic(1, 0)
# Longer ones than any array here has are parsed anew each time, so that they do not fill the memory.
_KNOWN_HEADER_BYTES = 256
_MOST_VALUES = 2**20


def encode_npy(array: np.ndarray) -> bytes:
    """Encode an array as the bytes of an .npy file."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def decode_npy(data: bytes) -> np.ndarray:
    """Decode the array of an .npy file; never unpickle.

    Raises:
        ValueError: not an .npy file, truncated, or an array of Python objects.
    """
    start = npy_header_bytes(data)
    parse = parse_npy_header if start <= _KNOWN_HEADER_BYTES else parse_npy_header.__wrapped__
    shape, dtype, order = parse(data[:start])
    claimed, stored = math.prod(shape) * dtype.itemsize, len(data) - start
    if claimed != stored:
        raise ValueError(f"its header says {claimed} bytes of values, but it holds {stored}")
    return np.ndarray(shape, dtype, data, start, order=order).copy(order="K")


def npy_header_bytes(data: bytes) -> int:
    """Return how many bytes stand before the values of an .npy file, of whose first bytes `data` has 12 at least.

    Raises:
        ValueError: not an .npy file, or of a version that has no values we would read.
    """
    if data.startswith(_MAGIC_1_0):
        return 10 + int.from_bytes(data[8:10], "little")
    version = np.lib.format.read_magic(io.BytesIO(data))
    if version not in _READ_HEADER:
        raise ValueError(f"an .npy file of version {version[0]}.{version[1]}")
    return 12 + int.from_bytes(data[8:12], "little")


@functools.lru_cache(1024)
def parse_npy_header(header: bytes) -> tuple[tuple[int, ...], np.dtype, Literal["C", "F"]]:
    """Return shape, dtype and order of an .npy file's array. To be asked once for all files of one header.

    Raises:
        ValueError: damaged, or of an array of Python objects.
    """
    file = io.BytesIO(header)
    shape, fortran, dtype = _READ_HEADER[np.lib.format.read_magic(file)](file)
    if dtype.hasobject:
        raise ValueError("Object arrays are not read")
    return shape, dtype, "F" if fortran else "C"


def decode_json(data: bytes) -> Any:
    """Decode the json file of a sample, in memory that its size bounds.

    Raises:
        ValueError: not JSON, or more of it than any sample has.
        RecursionError: nested too deeply.
    """
    # Three bytes can become a hundred in memory.
    if len(data) > MOST_TEXT_BYTES:
        raise ValueError(f"{len(data)} bytes are more than {MOST_TEXT_BYTES}")
    if (values := sum(map(data.count, (b"[", b"{", b",")))) > _MOST_VALUES:
        raise ValueError(f"about {values} values are more than {_MOST_VALUES}")
    return json.loads(data)
