"""The members of a tar by its headers alone, whoever wrote it.

Python's tarfile takes several times as long, keeps every member, and believes a hostile header about its size.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from pipelines.store.ranges import filesystem_of, is_local, read_range

_BLOCK = 512
_END = bytes(_BLOCK)
# A longer name or pax header is not read; the short name in the member's own header then counts.
_MAX_NAME_BYTES = 2**16
_WITHOUT_DATA = b"123456"
_REGULAR = b"0\x007S"


class TarError(Exception):
    """The bytes are not those of a whole tar."""


@dataclass(frozen=True)
class Member:
    """A regular file in a tar.

    Attributes:
        header: where its first header begins.
        offset, size: of its bytes; size is None where they do not stand there as they are (sparse files).
    """

    name: str
    header: int
    offset: int
    size: int | None


class HeaderReader:
    """Small reads at ascending offsets of a file: one request for those that are near, none for what is between."""

    def __init__(self, url: str) -> None:
        filesystem, path = filesystem_of(url)
        self.size = int(filesystem.size(path) or 0)
        self._fetch = _local(path) if is_local(filesystem) else functools.partial(read_range, url)
        # Members may be small: the further the reads go on without a gap, the more is fetched at once.
        self._least, self._most = (2**13, 2**13) if is_local(filesystem) else (2**16, 2**22)
        self._ahead = self._least
        self._begin, self._data = 0, b""

    def read(self, offset: int, count: int) -> bytes:
        """Exactly so many bytes.

        Raises:
            TarError: the file ends before.
        """
        if offset + count > self.size:
            raise TarError("it ends in the middle of a member or without an end-of-archive mark")
        end = self._begin + len(self._data)
        if not self._begin <= offset <= offset + count <= end:
            near = self._begin <= offset <= end
            self._ahead = min(2 * self._ahead, self._most) if near else self._least
            self._data = self._fetch(offset, min(offset + max(count, self._ahead), self.size))
            self._begin = offset
        return self._data[offset - self._begin : offset - self._begin + count]


def _local(path: str) -> Callable[[int, int], bytes]:
    file = open(path, "rb", buffering=0)  # noqa: SIM115 - closed with the reader
    return lambda start, stop: os.pread(file.fileno(), stop - start, start)


def members(reader: HeaderReader, offset: int = 0) -> Iterator[Member]:
    """The regular files from an offset on, in order.

    Raises:
        TarError: truncated, damaged or not a tar.
    """
    begin, facts = offset, _Extended()
    while (block := reader.read(offset, _BLOCK)) != _END:
        if _number(block[148:156]) != sum(block) - sum(block[148:156]) + 8 * ord(" "):
            raise TarError(f"no header at byte {offset}")
        kind, size, data = block[156:157], _number(block[124:136]), offset + _BLOCK
        if kind in b"xLKg":
            if size <= _MAX_NAME_BYTES:
                facts.take(kind, reader.read(data, size))
            offset = data + _padded(size)
            continue
        size = size if facts.size is None else facts.size
        sparse = facts.sparse or kind == b"S"
        if kind == b"S":
            data = _behind_sparse_map(reader, block, data)
        offset = data if kind in _WITHOUT_DATA else data + _padded(size)
        if offset > reader.size:
            raise TarError("it ends in the middle of a member")
        name = _name(block) if facts.name is None else facts.name
        if kind in _REGULAR and not name.endswith(b"/"):
            yield Member(name.decode("utf-8", "surrogateescape"), begin, data, None if sparse else size)
        begin, facts = offset, _Extended()


class _Extended:
    """What headers in front of a member's own say of it."""

    def __init__(self) -> None:
        self.name: bytes | None = None
        self.size: int | None = None
        self.sparse = False

    def take(self, kind: bytes, data: bytes) -> None:
        if kind == b"L":
            self.name = data.split(b"\0", 1)[0]
        elif kind == b"x":
            for key, value in _pax_records(data):
                if key == b"path":
                    self.name = value
                elif key == b"size":
                    self.size = _decimal(value)
                elif key.startswith(b"GNU.sparse."):
                    self.sparse = True
                    self.name = value if key == b"GNU.sparse.name" else self.name


def _pax_records(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    position = 0
    while position < len(data):
        space = data.find(b" ", position, position + 20)
        length = _decimal(data[position:space]) if space > position else 0
        # A record that does not move the position on would be read for ever.
        if not 0 < space - position < length <= len(data) - position:
            raise TarError("damaged pax header")
        key, _, value = data[space + 1 : position + length - 1].partition(b"=")
        yield key, value
        position += length


def _behind_sparse_map(reader: HeaderReader, block: bytes, offset: int) -> int:
    more = block[482]
    while more:
        more = reader.read(offset, _BLOCK)[504]
        offset += _BLOCK
    return offset


def _name(block: bytes) -> bytes:
    name = block[:100].split(b"\0", 1)[0]
    prefix = block[345:500].split(b"\0", 1)[0] if block[257:263] == b"ustar\0" else b""
    return prefix + b"/" + name if prefix else name


def _number(field: bytes) -> int:
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    try:
        number = int(field.split(b"\0", 1)[0].strip() or b"0", 8)
    except ValueError:
        number = -1
    if number < 0:
        raise TarError(f"no number: {field!r}")
    return number


def _decimal(text: bytes) -> int:
    if not (text.isdigit() and len(text) < 20):
        raise TarError(f"damaged pax header: {text[:20]!r}")
    return int(text)


def _padded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK
