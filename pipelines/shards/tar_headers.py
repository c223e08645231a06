"""The members of a tar by its headers alone, whoever wrote it: the one parser of everything that reads tars here.

Python's tarfile takes several times as long, keeps every member, and believes a hostile header about its size. It also
takes a cut between two members, or a damaged header, for the end of the archive.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple, Protocol

BLOCK = 512
ENDS_EARLY = "it ends in the middle of a member or without an end-of-archive mark"
_END = bytes(BLOCK)
# A longer name or pax header is refused: without it, the member could be another than it is to other readers.
_MAX_EXTENDED_BYTES = 2**20
# Their headers may say a size, but no data follows.
_WITHOUT_DATA = b"123456"
FILE, FOLDER = "file", "folder"
_KINDS = {
    **dict.fromkeys((b"0", b"\0", b"7"), FILE),
    b"5": FOLDER,
    b"S": "sparse file",
    b"1": "link",
    b"2": "link",
    b"3": "device",
    b"4": "device",
    b"6": "pipe",
}
_SHOWN_CHARACTERS = 100
_CHECKSUM = slice(148, 156)


class TarError(Exception):
    """The bytes are not those of a whole tar."""


class Member(NamedTuple):
    """A member of a tar.

    Attributes:
        name: its path in the tar.
        header: offset of its first header.
        offset: offset of its bytes.
        size: number of its bytes; None for all but regular files. A sparse file can claim any size.
        kind: `file`, `folder`, or in words what it is instead.
    """

    name: str
    header: int
    offset: int
    size: int | None
    kind: str


class Bytes(Protocol):
    """A source of a tar's bytes."""

    size: int

    def read(self, offset: int, count: int) -> bytes:
        """Return exactly `count` bytes from an offset on. Raises TarError if the tar ends before."""


class FileBytes:
    """The bytes of an open, seekable file."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.size = self._position = file.seek(0, io.SEEK_END)

    def read(self, offset: int, count: int) -> bytes:
        if offset != self._position:
            self._file.seek(offset)
        data = self._file.read(count)
        self._position = offset + len(data)
        return require_bytes(data, count)


def require_bytes(data: bytes, count: int) -> bytes:
    """Return the data. Raises TarError if it is not of that many bytes."""
    if len(data) != count:
        raise TarError(ENDS_EARLY)
    return data


def members(tar: Bytes, offset: int = 0) -> Iterator[Member]:
    """Yield the members from an offset on, in order; whoever gets to the end has read a whole archive.

    Args:
        tar: the bytes.
        offset: where a member's first header begins.

    Raises:
        TarError: truncated, damaged or not a tar; also if the mark at the end of the archive is missing.
    """
    begin, facts = offset, _Extended()
    while (block := tar.read(offset, BLOCK)) != _END:
        if not has_checksum(block):
            raise TarError(f"no header at byte {offset}")
        kind, size, data = block[156:157], _number(block[124:136]), offset + BLOCK
        if kind in b"xLKg":
            if size > _MAX_EXTENDED_BYTES:
                raise TarError(f"a name or pax header of {size} bytes")
            facts.take(kind, tar.read(data, size))
            offset = data + _padded(size)
            continue
        size = size if facts.size is None else facts.size
        sparse = facts.sparse or kind == b"S"
        if kind == b"S":
            data = _behind_sparse_map(tar, block, data)
        offset = data if kind in _WITHOUT_DATA else data + _padded(size)
        # Before anybody reads or allocates what the header promises.
        if offset > tar.size:
            raise TarError("it ends in the middle of a member")
        name = _name(block) if facts.name is None else facts.name
        what = "sparse file" if sparse else _KINDS.get(kind, "member of an unknown kind")
        if what == FILE and name.endswith(b"/"):
            what = FOLDER
        yield Member(name.decode("utf-8", "surrogateescape"), begin, data, size if what == FILE else None, what)
        begin, facts = offset, _Extended()


def shown(name: str) -> str:
    """Return a member's name as it may stand in a message: short, and without what moves the cursor."""
    short = name if len(name) <= _SHOWN_CHARACTERS else f"{name[:_SHOWN_CHARACTERS]}…"
    return "".join(character if character.isprintable() else "\ufffd" for character in short)


def has_checksum(block: bytes) -> bool:
    """Tell whether a block has the checksum that every header has: the sum of its bytes, with spaces for the sum's own.

    Raises:
        TarError: there is no number where the checksum stands.
    """
    return _number(block[_CHECKSUM]) == sum(block) - sum(block[_CHECKSUM]) + 8 * ord(" ")


class _Extended:
    """Facts from the pax and GNU headers that stand in front of a member's own."""

    def __init__(self) -> None:
        self.name: bytes | None = None
        self.size: int | None = None
        self.sparse = False

    def take(self, kind: bytes, data: bytes) -> None:
        # Long link names (K) say nothing of what is in a sample.
        if kind == b"L":
            self.name = data.split(b"\0", 1)[0]
        elif kind in b"xg":
            for key, value in _pax_records(data):
                if kind == b"g":
                    # For all members to come. Nobody writes that, and readers disagree on what it then means.
                    if key in (b"path", b"size") or key.startswith(b"GNU.sparse."):
                        raise TarError("a global header that renames or resizes every member")
                elif key == b"path":
                    self.name = value
                elif key == b"size":
                    self.size = _decimal(value)
                elif key.startswith(b"GNU.sparse."):
                    self.sparse = True
                    self.name = value if key == b"GNU.sparse.name" else self.name


def _pax_records(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    # Each is `LENGTH KEY=VALUE\n`, where LENGTH counts the whole record, itself included.
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


def _behind_sparse_map(tar: Bytes, block: bytes, offset: int) -> int:
    # GNU: the map of a sparse file goes on in blocks of its own as long as each says that another follows.
    more = block[482]
    while more:
        more = tar.read(offset, BLOCK)[504]
        offset += BLOCK
    return offset


def _name(block: bytes) -> bytes:
    # Names of more than 100 bytes are split at a slash, in ustar; GNU keeps other things in the place of the prefix.
    name = block[:100].split(b"\0", 1)[0]
    prefix = block[345:500].split(b"\0", 1)[0] if block[257:263] == b"ustar\0" else b""
    return prefix + b"/" + name if prefix else name


def _number(field: bytes) -> int:
    # GNU: sizes of 8 GiB and more do not fit into eleven octal digits and stand there in binary.
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
    # `int` would also take signs, spaces and underscores, and thousands of digits.
    if not (text.isdigit() and len(text) < 20):
        raise TarError(f"damaged pax header: {text[:20]!r}")
    return int(text)


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK
