"""A queue of events on disk: appended by the work, read by the sender, and whole after a kill -9 of both.

Every process writes a session of its own, a folder that it holds locked. A session without a holder was left
behind by a process that died or gave up; whoever opens the spool next takes it over.

    session-TIME-ID/lock
                    events.jsonl         one event a line
                    sent                 how many bytes of events.jsonl MLflow has
                    files/NUMBER/NAME    what events refer to
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
    """One process's events, in order. Appending is thread-safe and costs one write; one thread reads.

    Args:
        folder: of the session.
        lock: its open lock file; the lock lasts as long as this process, however that ends.
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
        """Start a session in a spool folder, which is made where it is missing."""
        name = f"session-{time.time_ns():020d}-{uuid.uuid4().hex[:8]}"
        # Locked before it gets the name by which other processes look for sessions to take over.
        unnamed = spool / f".{name}"
        unnamed.mkdir(parents=True)
        lock = _try_lock(unnamed)
        assert lock is not None
        unnamed.rename(spool / name)
        return cls(spool / name, lock)

    @classmethod
    def abandoned(cls, spool: Path) -> Iterator["Session"]:
        """The sessions that nobody holds, oldest first, locked for the caller."""
        for folder in sorted(spool.glob("session-*")):
            if lock := _try_lock(folder):
                yield cls(folder, lock)

    def append(self, event: Event) -> None:
        line = json.dumps(event, ensure_ascii=False).encode() + b"\n"
        with self._writing:
            self._events.write(line)
            self._events.flush()
        self.changed.set()

    def add_file(self, name: str, write: Callable[[Path], object]) -> str:
        """Keep a file until its event is sent.

        Returns:
            Its place relative to the session's folder, for the event.
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
        """Up to `limit` events that are not acknowledged yet, each with the position to acknowledge it by."""
        position = self._sent()
        events: list[tuple[Event, int]] = []
        with open(self.folder / "events.jsonl", "rb") as file:
            file.seek(position)
            for line in file:
                if not line.endswith(b"\n") or len(events) == limit:
                    break  # a line without an end was cut off by a kill, or is still being written
                position += len(line)
                with contextlib.suppress(ValueError):  # what a full disk left of an event
                    events.append((json.loads(line), position))
        return events

    def everything(self) -> Iterator[Event]:
        """All events of the session, sent or not."""
        with open(self.folder / "events.jsonl", "rb") as file:
            for line in file:
                with contextlib.suppress(ValueError):
                    yield json.loads(line)

    def acknowledge(self, position: int) -> None:
        """Note that everything before `position` has arrived: one write in place, which no kill tears."""
        descriptor = os.open(self.folder / "sent", os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            os.pwrite(descriptor, f"{position:020d}".encode(), 0)
        finally:
            os.close(descriptor)

    def release(self, *, remove: bool) -> None:
        """Let go of the session; `remove` it where everything in it has arrived."""
        if remove:
            shutil.rmtree(self.folder, ignore_errors=True)
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
    except FileNotFoundError:  # its holder has just finished and removed it
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    # Unlinked between open and lock: the session is gone.
    if not (folder / "lock").exists():
        file.close()
        return None
    return file
