"""The shard format: plain WebDataset tars whose bytes depend on nothing but their contents.

A sample is a key and its files by extension: `000070042` and `{"jpg": …, "txt": …, "json": …}` are stored as
the members `000070042.jpg`, `000070042.json`, `000070042.txt`, next to each other: plain WebDataset.
"""

import functools
import hashlib
import io
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from pipelines.errors import UserError
from pipelines.shards.samples import contents, samples
from pipelines.shards.tar_headers import FileBytes, TarError, members


class ShardWriter:
    """Write a tar of samples, one after the other; the same samples give the same bytes on any machine.

    Use it as a context manager. Afterwards `rows`, `bytes` and `sha256` say what was written, and `content` is a digest
    of the samples in order without their keys: shards of equal content hold the same samples, wherever they stand.

    Args:
        path: a local file, written in place (put it under `Storage.writer` to make it appear whole).
    """

    def __init__(self, path: Path | str) -> None:
        self.rows = self.bytes = 0
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
        for extension in sorted(files):
            data = files[extension]
            self._content.update(f"{extension} {len(data)}\n".encode())
            self._content.update(data)
            self._write(_header(f"{key}.{extension}", len(data)))
            self._write(data)
            if rest := len(data) % tarfile.BLOCKSIZE:
                self._write(bytes(tarfile.BLOCKSIZE - rest))

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
        for sample in samples(members(tar), functools.partial(contents, tar)):
            yield {"__key__": sample.key, **sample.files}
    except TarError as error:
        raise UserError(f"shard {name} is truncated or damaged ({error}): remove it and make it again") from error


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
    try:
        return cast(np.ndarray, np.load(io.BytesIO(data), allow_pickle=False))
    except EOFError as error:
        raise ValueError(f"not a whole .npy file ({len(data)} bytes): {error}") from error
