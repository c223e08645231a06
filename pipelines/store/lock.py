"""One driver at a time: a second one waits for the first, is refused with its name, or takes over if it is dead.

On a local disk the kernel keeps the lock and releases it when its holder dies, however it dies. In an object store it
is a lease, `.lock.json`, whose holder renews it by raising a counter with every heartbeat. Clocks of two machines are
never compared: whoever finds a lease watches the counter for a few heartbeats on its own clock, and takes the lease
over if the counter does not move. Renewal and takeover are conditional on the contents last seen, so that of two
drivers exactly one succeeds, and a holder that was suspended finds out.

A driver that lost its lease may still finish a few files before it notices. That is harmless: the first commit of a
file stands, and if two drivers may write different bytes (what servers answer) each writes to a place of its own first.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TextIO

from pipelines.errors import TransientError, UserError
from pipelines.patience import impatient, patience_s
from pipelines.store.failures import MissingFileError
from pipelines.store.storage import Storage, encode_json

LOCK = ".lock"
LEASE = ".lock.json"
BEAT_S = 5.0
# A holder that has not renewed its lease for this many heartbeats is presumed dead.
WATCHED_BEATS = 4
# A holder that could not reach the store for this many heartbeats stops by itself. It is far more than WATCHED_BEATS:
# an outage of the store keeps everybody from taking over, too.
PATIENCE_BEATS = 120
# How often whoever waits for a local lock tries again, and how often its holder says how far it is.
POLL_S = 1.0
# For how long somebody may have a local lock who only looks whether it is held.
GLANCE_S = 0.05
_TRIES = 100
# How long a driver that lost its lease is left to notice by itself, before it is interrupted.
GRACE_BEATS = 1
# Not SIGINT: shells start what a script runs in the background with that one ignored.
INTERRUPT = signal.SIGUSR1

# What a holder says of itself: `holder` (who it is), and `progress`, whatever it told last.
Record = dict[str, Any]


class HeldError(UserError):
    """Somebody else holds what was to be held."""


class Hold(Protocol):
    """A held lock."""

    def check(self) -> None:
        """Raise UserError if it is ours no longer."""

    def tell(self, **progress: Any) -> None:
        """Let those who wait know how far we are; JSON values. Costs nothing and may be called often."""


@contextlib.contextmanager
def exclusive(
    place: Storage,
    beat_s: float = BEAT_S,
    *,
    what: str | None = None,
    wait: Callable[[Record], None] | None = None,
    interrupt: bool = False,
) -> Iterator[Hold]:
    """Hold a folder alone while the block runs.

    Args:
        place: the folder that the lock lies in; a local one is created.
        beat_s: seconds between two heartbeats, in object stores.
        what: the thing that is locked, for messages; the folder by default.
        wait: called again and again with what the present holder says of itself, until it has ended or died; whatever
            it raises ends the waiting. Without it a place that is held is refused.
        interrupt: interrupt the main thread, as Ctrl-C does, if the lease is lost and `check` is not called for a
            heartbeat: work that waits long for one result stops too.

    Raises:
        HeldError: another process holds it; named by pid, host and since when.
        UserError: the folder cannot be written.
    """
    what = what or f"root {place.url}"
    if place.is_local:
        with _flock(place, what, wait) as hold:
            yield hold
        return
    lease = _Lease(place, beat_s, what, wait, interrupt and threading.current_thread() is threading.main_thread())
    lease.take()
    try:
        yield lease
    finally:
        lease.release()


@dataclass(frozen=True)
class Holder:
    """Who holds a folder.

    Attributes:
        name: who it is.
        progress: what it told last.
        alive: whether it lives; False for a lease that was not renewed in time, which somebody may take over; None for
            a lease of a store that does not tell the time.
    """

    name: str
    progress: dict[str, Any]
    alive: bool | None


def find_holder(place: Storage) -> Holder | None:
    """Return who holds a folder; None if nobody does. Waits for nothing."""
    if not place.is_local:
        return _leaseholder(place)
    try:
        with open(Path(place.path()) / LOCK) as file:
            try:
                # Shared, so that those who look do not see each other.
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError:
                record = _read_holder(file)
                return Holder(record["holder"], record["progress"], alive=True)
    except FileNotFoundError:
        return None
    except OSError:
        return Holder("another user's process", {}, alive=None)
    return None


def _leaseholder(place: Storage) -> Holder | None:
    try:
        record = place.read_json(LEASE)
        # By the clock of the store alone.
        silent_s = place.seconds_since_written(LEASE)
    except MissingFileError:
        return None
    alive = None if silent_s is None else silent_s <= WATCHED_BEATS * record["beat_s"]
    return Holder(record["holder"], record.get("progress", {}), alive)


def discard(place: Storage) -> None:
    """Remove the lock of a folder, which the caller holds; a lease goes by itself when it is released."""
    if place.is_local:
        folder = Path(place.path())
        (folder / LOCK).unlink(missing_ok=True)
        # Whoever waits has made a new one in it.
        with contextlib.suppress(OSError):
            folder.rmdir()


def _identity() -> str:
    return f"pid {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S %z')}"


def _in_use(what: str, holder: str) -> HeldError:
    return HeldError(f"{what} is in use by {holder}: wait for it (leave out --no-wait), or choose another --root")


class _Flock:
    """A lock that the kernel takes from nobody who is alive."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._holder = _identity()
        self._told_at = 0.0
        self._write({})

    def check(self) -> None:
        return None

    def tell(self, **progress: Any) -> None:
        if time.monotonic() - self._told_at >= POLL_S:
            self._write(progress)

    def _write(self, progress: dict[str, Any]) -> None:
        self._told_at = time.monotonic()
        line = json.dumps({"holder": self._holder, "progress": progress}) + "\n"
        # A full disk must not end the work for it. One write in place: whoever reads meanwhile finds a whole first
        # line, with what is left of a longer one behind it.
        with contextlib.suppress(OSError):
            os.pwrite(self._file.fileno(), line.encode(), 0)


@contextlib.contextmanager
def _flock(place: Storage, what: str, wait: Callable[[Record], None] | None) -> Iterator[_Flock]:
    with _take(Path(place.path()), what, wait) as file:
        yield _Flock(file)
        # Nobody shall be named who has ended.
        file.seek(0)
        file.truncate()


def _take(folder: Path, what: str, wait: Callable[[Record], None] | None) -> TextIO:
    """Return the open lock file, locked."""
    while True:
        file = _open(folder, what)
        try:
            if not _try_flock(file, folder):
                # Perhaps by somebody who only looks whether it is held.
                time.sleep(GLANCE_S)
            while not _try_flock(file, folder):
                record = _read_holder(file)
                if wait is None:
                    raise _in_use(what, record["holder"])
                wait(record)
                time.sleep(POLL_S)
            if _is_in_place(file, folder):
                return file
        except BaseException:
            file.close()
            raise
        # Discarded since it was opened: nobody else would see that it is locked.
        file.close()


def _open(folder: Path, what: str) -> TextIO:
    for _ in range(_TRIES):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            return os.fdopen(os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666), "r+")
        except (FileNotFoundError, FileExistsError):
            # Discarded, and perhaps made anew, in between.
            continue
        except OSError as error:
            raise UserError(f"cannot write to {what}: {error.strerror}; choose another with --root") from error
    raise UserError(f"cannot write to {what}: its folder vanishes again and again; choose another with --root")


def _is_in_place(file: TextIO, folder: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(folder / LOCK))
    except FileNotFoundError:
        return False


def _try_flock(file: TextIO, folder: Path) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        name = errno.errorcode.get(error.errno or 0, str(error))
        raise UserError(
            f"the file system of {folder} cannot lock files ({name}): mount it with locks (Lustre: -o flock, NFS: with "
            "lockd running), or choose another --root"
        ) from error
    return True


def _read_holder(file: TextIO) -> Record:
    file.seek(0)
    try:
        record: Record = json.loads(file.readline())
    except ValueError:
        # It has only just locked it.
        return {"holder": "another process", "progress": {}}
    return record


class _Lease:
    """The lease of one driver in an object store, renewed by a thread of its own."""

    def __init__(
        self, root: Storage, beat_s: float, what: str, wait: Callable[[Record], None] | None, interrupt: bool
    ) -> None:
        # One request that hangs must not outlast the patience of who watches the lease.
        self.root = dataclasses.replace(root, hasty=True)
        self.beat_s, self.what, self.wait, self.interrupt = beat_s, what, wait, interrupt
        self.token, self.holder = uuid.uuid4().hex, _identity()
        self.beat = 0
        self.progress: dict[str, Any] = {}
        # The version of what we wrote last; None if the response was lost.
        self.version: str | None = None
        self.thief: str | None = None
        self.renewed_at = time.monotonic()
        self.turn = threading.Lock()
        self.released = threading.Event()
        self.thread = threading.Thread(target=self._renew_regularly, name="ldm-lease", daemon=True)
        self.handler_before: Any = None

    def take(self) -> None:
        """Create the lease, or take it over from a holder that is dead. Raises UserError if its holder lives."""
        while (version := self.root.replace(LEASE, self._record(), None)) is None:
            if (seen := self._watch()) is None:
                continue
            if (version := self.root.replace(LEASE, self._record(), seen)) is None:
                continue
            # In stores without conditional writes two may think that they have it; the one that wrote last is right,
            # which shows once both have written.
            time.sleep(self.beat_s)
            if (found := self._read()) is None or found["token"] != self.token:
                self._wait_or_refuse(found or {"holder": "another process"})
                continue
            break
        self.version, self.renewed_at = version, time.monotonic()
        if self.interrupt:
            self.handler_before = signal.signal(INTERRUPT, signal.default_int_handler)
        self.thread.start()

    def check(self) -> None:
        # After a suspension (a laptop's lid, a stopped container) the thread may not have had its turn yet, and the
        # lease may long be somebody else's.
        if time.monotonic() - self.renewed_at > 2 * self.beat_s:
            with contextlib.suppress(UserError), impatient(self.beat_s):
                self._renew()
        if self.thief:
            raise UserError(
                f"{self.what} was taken over by {self.thief} while this run did not answer: this run stops; "
                "what it committed is kept"
            )
        if (silent_s := self._silent_s) > self._patience_s:
            raise TransientError(
                f"{self.root.url}/{LEASE} could not be renewed for {silent_s:.0f} s: check the network and the store, "
                "then run the same command again; what is committed is kept"
            )

    def tell(self, **progress: Any) -> None:
        self.progress = progress

    def release(self) -> None:
        """Remove the lease if it is still ours."""
        self.released.set()
        self.thread.join()
        if self.interrupt:
            signal.signal(INTERRUPT, self.handler_before)
        # A lease that cannot be removed now is taken over later, as a dead holder's is.
        with contextlib.suppress(UserError), impatient(self.beat_s):
            if (found := self._read()) and found["token"] == self.token:
                self.root.remove_object(LEASE)

    @property
    def _patience_s(self) -> float:
        # As long as for any other request, if that is longer.
        return max(PATIENCE_BEATS * self.beat_s, patience_s())

    @property
    def _silent_s(self) -> float:
        return time.monotonic() - self.renewed_at

    def _record(self) -> bytes:
        return encode_json(
            {
                "holder": self.holder,
                "token": self.token,
                "beat": self.beat,
                "beat_s": self.beat_s,
                "progress": self.progress,
            }
        )

    def _read(self) -> Record | None:
        try:
            record: Record = self.root.read_json(LEASE)
        except MissingFileError:
            return None
        return record

    def _wait_or_refuse(self, record: Record) -> None:
        if self.wait is None:
            raise _in_use(self.what, record["holder"])
        self.wait({"progress": {}, **record})

    def _watch(self) -> str | None:
        """Watch a lease for a few of its holder's heartbeats, or for as long as it lives if we may wait.

        Returns:
            The version of the lease if its counter stands still; None if it is gone.

        Raises:
            UserError: the counter moves, so its holder lives.
        """
        # The version first: if it is older than the record, taking over fails, and that is safe.
        version, first = self.root.version(LEASE), self._read()
        if version is None or first is None:
            return None
        for _ in range(WATCHED_BEATS):
            time.sleep(first["beat_s"])
            if (now := self._read()) is None:
                return None
            if (now["token"], now["beat"]) != (first["token"], first["beat"]):
                self._wait_or_refuse(now)
                return None
        return version

    def _renew_regularly(self) -> None:
        while not self.released.wait(self.beat_s) and not self.thief:
            with contextlib.suppress(UserError), impatient(self.beat_s):
                self._renew()
        if self.interrupt and self.thief and not self.released.wait(GRACE_BEATS * self.beat_s):
            # What waits for one long result calls no `check`.
            signal.pthread_kill(threading.main_thread().ident or 0, INTERRUPT)

    def _renew(self) -> None:
        with self.turn:
            while not self.thief:
                # Stores without versions give "", and of an answer that was lost we know none. Then only the token
                # tells whether the lease is still ours.
                version = self.version or self.root.version(LEASE)
                if not self.version:
                    found = self._read()
                    if found is None or found["token"] != self.token:
                        self.thief = found["holder"] if found else "another process, which has ended"
                        return
                self.beat += 1
                self.version = self.root.replace(LEASE, self._record(), version)
                if self.version is not None:
                    self.renewed_at = time.monotonic()
                    return
                # The lease has changed under us. Once more, by its token: it may be our own write of which the answer
                # was lost.
