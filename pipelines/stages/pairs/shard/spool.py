"""Where a shard's encoded pictures wait for those before them: in memory while there is room, else in a file."""

from __future__ import annotations

import os
import tempfile
import threading
from dataclasses import dataclass


class Allowance:
    """Bytes that all spools of a process may hold in memory together."""

    def __init__(self, limit_bytes: int) -> None:
        self._left = limit_bytes
        self._lock = threading.Lock()

    def take(self, size: int) -> bool:
        with self._lock:
            if size > self._left:
                return False
            self._left -= size
            return True

    def give_back(self, size: int) -> None:
        with self._lock:
            self._left += size


@dataclass(frozen=True)
class Spooled:
    """A piece that was put away: its bytes, or where they are in the spool's file."""

    data: bytes | None
    offset: int
    size: int


class Spool:
    """The pieces of one shard; `put` may be called from several threads, `get` once all are there.

    Use it as a context manager.
    """

    def __init__(self, allowance: Allowance) -> None:
        self._allowance = allowance
        self._lock = threading.Lock()
        self._held = self._end = 0
        self._file: int | None = None
        self._closed = False

    def put(self, data: bytes) -> Spooled:
        with self._lock:
            if self._closed:
                # Its shard has failed; nobody will ask for it.
                return Spooled(b"", 0, 0)
            if self._allowance.take(len(data)):
                self._held += len(data)
                return Spooled(data, 0, len(data))
            if self._file is None:
                handle, path = tempfile.mkstemp(prefix="ldm-spool-")
                # Without a name it is gone with the process, however that ends.
                os.unlink(path)
                self._file = handle
            offset, self._end = self._end, self._end + len(data)
            written = 0
            while written < len(data):
                written += os.pwrite(self._file, data[written:], offset + written)
            return Spooled(None, offset, len(data))

    def get(self, piece: Spooled) -> bytes:
        if piece.data is not None:
            return piece.data
        assert self._file is not None
        return os.pread(self._file, piece.size, piece.offset)

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._closed = True
            self._allowance.give_back(self._held)
            self._held = 0
            if self._file is not None:
                os.close(self._file)
                self._file = None
