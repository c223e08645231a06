"""Files and folders that are not ours: the tables, tars and pictures of a source, wherever they are.

Remote reads are repeated and explained as those of our own storage are. A missing file stays FileNotFoundError: for a
picture it is the status of a row, for a table the end of the run.
"""

from __future__ import annotations

import io
import os
import posixpath
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar, cast

from pipelines.store.failures import READING, is_transient
from pipelines.store.filesystems import FileSystem, filesystem_of, is_local, is_s3
from pipelines.store.object_store import attempt, read, whole_sha256

T = TypeVar("T")

_LOCAL_BUFFER_BYTES = 2**20
_REMOTE_BUFFER_BYTES = 2**24


class FileFacts(NamedTuple):
    """What a store says of a file without reading it.

    Attributes:
        size: its bytes.
        version: names its present contents: it is another one after every change (ETag). None if the store has none.
            Equal contents may well have different versions: those of uploads in parts depend on the parts.
        written: when, in whole seconds since 1970; 0 if the store does not say.
    """

    size: int
    version: str | None = None
    written: int = 0

    @classmethod
    def of(cls, info: Mapping[str, Any]) -> FileFacts:
        """Read them from what fsspec says of a file, in a listing or alone."""
        version = str(info.get("ETag") or info.get("etag") or "").strip('"')
        when = info.get("LastModified") or info.get("last_modified") or info.get("mtime") or 0
        seconds = when.timestamp() if isinstance(when, datetime) else when
        written = int(seconds) if isinstance(seconds, int | float) else 0
        # A weak ETag (RFC 9110, Sec. 8.8.1) may stay although bytes change.
        return cls(int(info.get("size") or 0), None if version.startswith("W/") else version or None, written)


@dataclass(frozen=True)
class Location:
    """A file or folder in a file system. Build it where it is used: handles of stores do not travel to other processes.

    Methods that read raise FileNotFoundError for a missing file, and UserError if a store refuses or does not answer.
    """

    filesystem: FileSystem
    path: str

    @classmethod
    def of(cls, url: str) -> Location:
        """Locate a local path or URL. Raises UserError for an unknown protocol."""
        return cls(*filesystem_of(url))

    def __truediv__(self, name: str) -> Location:
        return Location(self.filesystem, posixpath.join(self.path, name))

    @property
    def is_local(self) -> bool:
        return is_local(self.filesystem)

    @property
    def url(self) -> str:
        """The path if it is local, else with its protocol."""
        return self.path if self.is_local else str(self.filesystem.unstrip_protocol(self.path))

    def stamp(self) -> tuple[int, int, int, int] | None:
        """Return what changes when a local file is written again; None for any other file.

        Returns:
            Its size, when it was modified and when its inode was changed (ns since 1970), and its inode. The first
            time can be set, and is by programs that copy; the second cannot.
        """
        if not self.is_local:
            return None
        try:
            status = os.stat(self.path)
        except (OSError, ValueError):
            return None
        return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino

    def exists(self) -> bool:
        return self._attempt(lambda: bool(self.filesystem.exists(self.path)))

    def is_folder(self) -> bool:
        return self._attempt(lambda: bool(self.filesystem.isdir(self.path)))

    def files_below(self) -> dict[str, FileFacts]:
        """Return the facts of all files of a folder, at any depth, by their path in the file system."""
        return _facts_of(self._attempt(lambda: self.filesystem.find(self.path, detail=True)))

    def matches(self) -> dict[str, FileFacts]:
        """Return the facts of what matches this path as a glob pattern, by path in the file system."""
        return _facts_of(self._attempt(lambda: self.filesystem.glob(self.path, detail=True)))

    def facts(self, *, forbidden_is_missing: bool = False) -> FileFacts | None:
        """Return what the store says of a file without reading it; None if there is nothing, or a folder.

        Args:
            forbidden_is_missing: also None if the store refuses the request for good. Tables may name anything as a
                picture's file, and stores refuse impossible names in many ways.
        """

        def ask() -> FileFacts | None:
            try:
                info = self.filesystem.info(self.path)
                return None if info.get("type") == "directory" else FileFacts.of(info)
            except (FileNotFoundError, NotADirectoryError) as error:
                # fsspec calls a web server's file missing that could not be asked for.
                if is_transient(error):
                    raise
                return None
            except (OSError, ValueError) as error:
                if is_transient(error) or not forbidden_is_missing:
                    raise
                return None

        return self._attempt(ask)

    def stored_sha256(self) -> str | None:
        """Return the hexadecimal sha256 of a whole file as its store has computed or checked it; None if it has not."""
        store, path = self.filesystem, self.path
        return self._attempt(lambda: whole_sha256(store, path)) if is_s3(store) else None

    def size(self) -> int:
        return self._attempt(lambda: int(self.filesystem.size(self.path) or 0))

    def read(self) -> bytes:
        """Read a whole file at once."""
        if self.is_local:
            return Path(self.path).read_bytes()
        return self._attempt(lambda: read(self.filesystem, self.path))

    def read_range(self, start: int, stop: int) -> bytes:
        """Read bytes start to stop - 1, in one request if the store is remote; fewer at the file's end."""
        if self.is_local:
            with open(self.path, "rb", buffering=0) as file:
                file.seek(start)
                return file.read(stop - start)
        if start >= stop:
            return b""
        return self._attempt(lambda: bytes(self.filesystem.cat_file(self.path, start=start, end=stop)))

    def read_ranges(self, ranges: Sequence[tuple[int, int]]) -> list[bytes | None]:
        """Read several ranges (start, stop), at once if the store is remote; None for each that cannot be read."""
        if not ranges:
            return []
        if self.is_local:
            return list(self._read_local_ranges(ranges))
        starts, stops = map(list, zip(*ranges))

        def read_all() -> list[bytes | None]:
            found = self.filesystem.cat_ranges([self.path] * len(starts), starts, stops, on_error="return")
            if failure := next((each for each in found if isinstance(each, Exception) and is_transient(each)), None):
                raise failure
            return [bytes(each) if isinstance(each, bytes | bytearray) else None for each in found]

        return self._attempt(read_all)

    def _read_local_ranges(self, ranges: Sequence[tuple[int, int]]) -> list[bytes | None]:
        with open(self.path, "rb", buffering=0) as file:
            return [os.pread(file.fileno(), stop - start, start) for start, stop in ranges]

    def read_tail(self, count: int) -> bytes:
        """Read at most the last `count` bytes."""
        return self._attempt(lambda: bytes(self.filesystem.cat_file(self.path, start=-count)))

    def open(self) -> BinaryIO:
        """Open the file to be read from beginning to end, in large steps."""
        if self.is_local:
            return open(self.path, "rb", buffering=_LOCAL_BUFFER_BYTES)
        return cast(BinaryIO, io.BufferedReader(self.open_by_ranges(), _REMOTE_BUFFER_BYTES))

    def open_by_ranges(self) -> io.RawIOBase:
        """Open the file for a reader that buffers by itself: every read is one request for just those bytes."""
        return _RangedFile(self)

    def _attempt(self, operation: Callable[[], T]) -> T:
        return operation() if self.is_local else attempt(self.url, operation, rights=READING)


class _RangedFile(io.RawIOBase):
    """A file of which nothing is held; unlike the files of fsspec, a read that fails is repeated."""

    def __init__(self, location: Location) -> None:
        self._location, self._size, self._position = location, location.size(), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        data = self._location.read_range(self._position, min(self._position + len(buffer), self._size))
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def readall(self) -> bytes:
        """Read to the end, in as large steps as elsewhere: Python's own would take 8 KiB at a time."""
        parts = []
        while self._position < self._size:
            parts.append(self.read(_REMOTE_BUFFER_BYTES) or b"")
            if not parts[-1]:
                break
        return b"".join(parts)


def _facts_of(listing: Mapping[str, Mapping[str, Any]]) -> dict[str, FileFacts]:
    return {path: FileFacts.of(info) for path, info in listing.items()}
