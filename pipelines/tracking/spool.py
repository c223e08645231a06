"""A queue of events on disk: the work appends, the sender reads, and a kill -9 of both leaves it usable.

Every process writes a session of its own, a folder that it keeps locked. The kernel drops the lock when the process
ends, however it ends: a session without a holder was left behind, and whoever opens the spool next takes it over.

    session-TIME-ID/lock
                    events.jsonl         one event per line
                    sent                 the number of bytes of events.jsonl that MLflow has received
                    files/NUMBER/NAME    files that events refer to
"""

import contextlib
import fcntl
import json
import os
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

Event = dict[str, Any]


class Session:
    """The events of one process, in order. Appending is thread-safe and costs one write; a single thread reads.

    Args:
        folder: the session's folder.
        lock: its open and locked lock file; closing it, or the end of the process, unlocks it.
    """

    def __init__(self, folder: Path, lock: BinaryIO) -> None:
        self.folder = folder
        self._lock = lock
        self._events = open(folder / "events.jsonl", "ab")  # noqa: SIM115 (open for as long as the session)
        self._writing = threading.Lock()
        self._files = 0
        self.changed = threading.Event()

    @classmethod
    def create(cls, spool: Path) -> "Session":
        """Start a session in a spool folder, which is created if it is missing."""
        name = f"session-{time.time_ns():020d}-{uuid.uuid4().hex[:8]}"
        # Locked before it has the name by which other processes find sessions to take over.
        unnamed = spool / f".{name}"
        unnamed.mkdir(parents=True)
        lock = _try_lock(unnamed)
        assert lock is not None
        unnamed.rename(spool / name)
        return cls(spool / name, lock)

    @classmethod
    def abandoned(cls, spool: Path) -> Iterator["Session"]:
        """Yield the sessions that nobody holds, oldest first, locked for the caller."""
        for folder in sorted(spool.glob("session-*")):
            if lock := _try_lock(folder):
                yield cls(folder, lock)

    def append(self, event: Event) -> None:
        """Add an event and wake the sender. It survives the end of the process, though not a power cut."""
        line = json.dumps(event, ensure_ascii=False).encode() + b"\n"
        # To the kernel, but without fsync: the work must not wait for a disk.
        with self._writing:
            self._events.write(line)
            self._events.flush()
        self.changed.set()

    def add_file(self, name: str, write: Callable[[Path], object]) -> str:
        """Keep a file until its event is sent.

        Args:
            name: the file's name, as MLflow will show it.
            write: writes the file to a local path.

        Returns:
            Its path relative to the session's folder, for the event.
        """
        with self._writing:
            self._files += 1
            place = f"files/{self._files:06d}/{name}"
        path = self.folder / place
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path)
        return place

    def remove_file(self, place: str) -> None:
        shutil.rmtree((self.folder / place).parent, ignore_errors=True)

    def pending(self, limit: int = 500) -> list[tuple[Event, int]]:
        """Return up to `limit` events that are not acknowledged yet, each with the position to acknowledge it by."""
        position = self._sent()
        events: list[tuple[Event, int]] = []
        with open(self.folder / "events.jsonl", "rb") as file:
            file.seek(position)
            for line in file:
                # A line without an end was cut off by a kill, or is still being written.
                if not line.endswith(b"\n") or len(events) == limit:
                    break
                position += len(line)
                # A full disk leaves part of an event, with the next one behind it: both are passed over.
                with contextlib.suppress(ValueError):
                    events.append((json.loads(line), position))
        return events

    def everything(self) -> Iterator[Event]:
        """Yield all events of the session, sent or not."""
        with open(self.folder / "events.jsonl", "rb") as file:
            for line in file:
                with contextlib.suppress(ValueError):
                    yield json.loads(line)

    def acknowledge(self, position: int) -> None:
        """Record that everything before `position` has arrived."""
        # One write of fixed length in place: a kill leaves the old number or the new one, never a mixture.
        descriptor = os.open(self.folder / "sent", os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            os.pwrite(descriptor, f"{position:020d}".encode(), 0)
        finally:
            os.close(descriptor)

    def release(self, *, remove: bool) -> None:
        """Unlock the session; `remove` it if everything in it has arrived."""
        if remove:
            shutil.rmtree(self.folder, ignore_errors=True)
        # It tries once more to write what a full disk did not take; `append` has said that such events are lost.
        with contextlib.suppress(OSError):
            self._events.close()
        self._lock.close()

    def _sent(self) -> int:
        try:
            return int((self.folder / "sent").read_bytes() or 0)
        except FileNotFoundError:
            return 0


def _try_lock(folder: Path) -> BinaryIO | None:
    try:
        file = open(folder / "lock", "ab")  # noqa: SIM115 (held open: closing it would unlock)
    except FileNotFoundError:
        # Its holder has just finished and removed it.
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    # Removed between open and lock: what is locked then is a file without a name.
    if not (folder / "lock").exists():
        file.close()
        return None
    return file
