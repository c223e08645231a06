"""Files and folders that are not ours: the tables, tars and pictures of a source, wherever they are.

Remote reads are repeated and explained as those of our own storage are. A missing file stays FileNotFoundError: for a
picture it is the status of a row, for a table the end of the run.
"""

from __future__ import annotations

import io
import os
import posixpath
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

from pipelines.store.failures import READING, is_transient
from pipelines.store.filesystems import FileSystem, filesystem_of, is_local
from pipelines.store.object_store import attempt, read

T = TypeVar("T")

_LOCAL_BUFFER_BYTES = 2**20
_REMOTE_BUFFER_BYTES = 2**24
# Names under which stores keep a digest of a file's contents.
_DIGESTS = ("ETag", "etag", "md5", "content_md5", "checksum", "sha256")


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

    def stamp(self) -> tuple[int, int, int] | None:
        """Return what changes when a local file is written again (size, time, inode); None for any other file."""
        if not self.is_local:
            return None
        try:
            status = os.stat(self.path)
        except (OSError, ValueError):
            return None
        return status.st_size, status.st_mtime_ns, status.st_ino

    def exists(self) -> bool:
        return self._attempt(lambda: bool(self.filesystem.exists(self.path)))

    def is_folder(self) -> bool:
        return self._attempt(lambda: bool(self.filesystem.isdir(self.path)))

    def files_below(self) -> dict[str, dict[str, Any]]:
        """Return the facts of all files of a folder, at any depth, by their path in the file system."""
        return self._attempt(lambda: dict(self.filesystem.find(self.path, detail=True)))

    def matches(self) -> dict[str, dict[str, Any]]:
        """Return the facts of the files that match this path as a glob pattern, by their path in the file system."""
        return self._attempt(lambda: dict(self.filesystem.glob(self.path, detail=True)))

    def facts(self, *, forbidden_is_missing: bool = False) -> dict[str, Any] | None:
        """Return what the store says of a file without reading it; None if there is no such file.

        Args:
            forbidden_is_missing: also None if the store refuses the request for good. Tables may name anything as a
                picture's file, and stores refuse impossible names in many ways.
        """

        def ask() -> dict[str, Any] | None:
            try:
                return dict(self.filesystem.info(self.path))
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


def digest_in(facts: dict[str, Any]) -> str | None:
    """Return the digest that a store keeps of a file's contents, if it keeps one."""
    return next((str(facts[key]) for key in _DIGESTS if facts.get(key)), None)
