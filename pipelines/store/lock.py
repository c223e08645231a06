"""One driver per root: a second one is refused with the first one's identity, or takes over if the first is dead.

On a local root the kernel keeps the lock and releases it when its holder dies, however it dies. In an object store it
is a lease, `.lock.json`, whose holder renews it by raising a counter with every heartbeat. Clocks of two machines are
never compared: whoever finds a lease watches the counter for a few heartbeats on its own clock, and takes the lease
over if the counter does not move. Renewal and takeover are conditional on the contents last seen, so that of two
drivers exactly one succeeds, and a holder that was suspended finds out.

A driver that lost its root may still finish a few files before it notices. That is harmless: the first commit of a file
stands, and if two drivers may write different bytes (what servers answer) each writes to a place of its own first.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from pipelines.errors import UserError
from pipelines.patience import impatient
from pipelines.store.failures import MissingFileError
from pipelines.store.storage import Storage, encode_json

LOCK = ".lock"
LEASE = ".lock.json"
BEAT_S = 5.0
# A holder that has not renewed its lease for this many heartbeats is presumed dead.
WATCHED_BEATS = 4
# A holder that could not reach the store for this many heartbeats stops by itself. It is far more than WATCHED_BEATS:
# an outage of the store keeps everybody from taking over, too.
PATIENCE_BEATS = 60


class Hold(Protocol):
    """A held lock on a root."""

    def check(self) -> None:
        """Raise UserError if it is ours no longer."""


@contextlib.contextmanager
def exclusive(root: Storage, beat_s: float = BEAT_S) -> Iterator[Hold]:
    """Hold a root alone while the block runs.

    Args:
        root: the folder; a local one is created.
        beat_s: seconds between two heartbeats, in object stores.

    Raises:
        UserError: another process holds it (named by pid, host and since when), or the root cannot be written.
    """
    if root.is_local:
        with _flock(root) as hold:
            yield hold
        return
    lease = _Lease(root, beat_s)
    lease.take()
    try:
        yield lease
    finally:
        lease.release()


def _identity() -> str:
    return f"pid {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S %z')}"


def _in_use(root: Storage, holder: str) -> UserError:
    return UserError(f"root {root.url} is in use by {holder}: wait for it, or choose another --root")


class _Flock:
    # The kernel takes a lock from nobody who is alive.
    def check(self) -> None:
        return None


@contextlib.contextmanager
def _flock(root: Storage) -> Iterator[_Flock]:
    folder = Path(root.path())
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(f"cannot write to root {root.url}: {error.strerror}; choose another with --root") from error
    with os.fdopen(descriptor, "r+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise _in_use(root, file.read().strip() or "another process") from None
        # For whoever is refused. The file stays: if it were removed, a driver that has just opened it would lock a
        # file that nobody else can see.
        file.truncate(0)
        file.write(_identity())
        file.flush()
        yield _Flock()
        file.truncate(0)


class _Lease:
    """The lease of one driver on a root in an object store, renewed by a thread of its own."""

    def __init__(self, root: Storage, beat_s: float) -> None:
        self.root, self.beat_s = root, beat_s
        self.token, self.holder = uuid.uuid4().hex, _identity()
        self.beat = 0
        # The version of what we wrote last; None if the response was lost.
        self.version: str | None = None
        self.thief: str | None = None
        self.renewed_at = time.monotonic()
        self.turn = threading.Lock()
        self.released = threading.Event()
        self.thread = threading.Thread(target=self._renew_regularly, name="ldm-lease", daemon=True)

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
                raise _in_use(self.root, found["holder"] if found else "another process")
            break
        self.version, self.renewed_at = version, time.monotonic()
        self.thread.start()

    def check(self) -> None:
        # After a suspension (a laptop's lid, a stopped container) the thread may not have had its turn yet, and the
        # lease may long be somebody else's.
        if time.monotonic() - self.renewed_at > 2 * self.beat_s:
            with contextlib.suppress(UserError), impatient(self.beat_s):
                self._renew()
        if self.thief:
            raise UserError(
                f"root {self.root.url} was taken over by {self.thief} while this run did not answer: this run stops; "
                "what it committed is kept"
            )
        if (silent_s := time.monotonic() - self.renewed_at) > PATIENCE_BEATS * self.beat_s:
            raise UserError(
                f"{self.root.url}/{LEASE} could not be renewed for {silent_s:.0f} s: check the network and the store, "
                "then run the same command again; what is committed is kept"
            )

    def release(self) -> None:
        """Remove the lease if it is still ours."""
        self.released.set()
        self.thread.join()
        # A lease that cannot be removed now is taken over later, as a dead holder's is.
        with contextlib.suppress(UserError), impatient(self.beat_s):
            if (found := self._read()) and found["token"] == self.token:
                self.root.remove(LEASE)

    def _record(self) -> bytes:
        return encode_json({"holder": self.holder, "token": self.token, "beat": self.beat, "beat_s": self.beat_s})

    def _read(self) -> dict[str, Any] | None:
        try:
            record: dict[str, Any] = self.root.read_json(LEASE)
        except MissingFileError:
            return None
        return record

    def _watch(self) -> str | None:
        """Watch a lease for a few of its holder's heartbeats.

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
                raise _in_use(self.root, now["holder"])
        return version

    def _renew_regularly(self) -> None:
        while not self.released.wait(self.beat_s) and not self.thief:
            with contextlib.suppress(UserError), impatient(self.beat_s):
                self._renew()

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
