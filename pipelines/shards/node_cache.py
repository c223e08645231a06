"""Fetched shards on a node's disk: one cache for all processes of a user there, gone with the last one.

Its size bounds what is kept and what is fetched ahead; what processes have in use is kept whatever its size. Processes
that were killed leave their whole shards to whoever comes next: a restarted training finds them.

It lies in `ldm-cache-UID` below `$LDM_CACHE`, or below the folder for temporary files:

    lock                    held while somebody looks through the cache, or changes what is in it
    told                    there if somebody has told that the cache is too small
    NAME.user               one for each user, held as long as it lives: digests and bytes of what it has in use
    SHA256.file             a whole file, checked; its time is that of its last use
    SHA256.BYTES.partial    a file on its way, held by whoever fetches it

To hold a file is to have it locked (flock): the kernel lets go of it when its process dies, however it dies, so that
what was killed neither blocks the others nor is counted. A shard is known by its digest, since one that was taken over
from another artifact is the same file.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import math
import os
import shutil
import socket
import stat
import tempfile
import threading
import time
import uuid
import weakref
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, BinaryIO

from pipelines.errors import MisuseError, UserError
from pipelines.notices import tell
from pipelines.patience import give_up_at
from pipelines.store.file_table import FileRecord
from pipelines.store.storage import Storage, sha256_file

FOLDER_VARIABLE, SIZE_VARIABLE = "LDM_CACHE", "LDM_CACHE_GIB"
DEFAULT_GIB = 32.0
FETCH_THREADS = 4
# Fetches of one shard that is gone from the disk each time it is to be opened.
MOST_FETCHES = 5
# How often whoever waits for another process's fetch looks whether it has ended.
POLL_S = 0.05
# How often it is tried again to fetch ahead what had no room, or could not be fetched.
RETRY_S = 1.0
# To look through a full cache takes long, and everybody else waits: room for several files is made at once where there
# are many, and whoever finds room takes a part of it for what comes next.
MANY_FILES = 1024
ROOM_AT_ONCE, PART_OF_ROOM = 1 / 16, 1 / 64
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)

_thread = threading.local()


class NotAsCommittedError(Exception):
    """A remote shard is not what was committed; the message says how, as the end of a sentence about it."""


class NodeCache:
    """The shards of a remote folder, as files on this node. Safe to use from several threads.

    Args:
        storage: the folder of the shards.
        most_bytes: size of the cache, whoever's shards are in it. What is in use is kept whatever its size, and only
            what is needed at once is fetched beyond. None takes LDM_CACHE_GIB, or 32 GiB.

    Raises:
        UserError: there is no place for the cache.
        MisuseError: LDM_CACHE_GIB is no size.
    """

    def __init__(self, storage: Storage, most_bytes: int | None = None) -> None:
        self._storage = storage
        self._most_bytes = _size_of_cache() if most_bytes is None else most_bytes
        self._folder = cache_folder()
        self._user = _enter(self._folder)
        # For whoever forgets to close it.
        self._leave = weakref.finalize(self, _leave, self._folder, self._user)
        self._lock = threading.Lock()
        # What is needed now or soon, in the order of need, and of it what is to be tried again.
        self._wanted: dict[str, FileRecord] = {}
        self._missed: set[str] = set()
        self._try_again_at = 0.0
        self._told_of_size = False
        # Bytes that may be fetched before it is looked again what is in the cache.
        self._granted = 0
        # Those that wait for a thread, and those under way.
        self._fetches: dict[str, Future[None]] = {}
        self._end = threading.Event()
        self._fetcher = ThreadPoolExecutor(
            FETCH_THREADS, thread_name_prefix="fetch", initializer=give_up_at, initargs=(self._end,)
        )

    def open(self, record: FileRecord) -> BinaryIO:
        """Open a shard, fetched if it is not there.

        Raises:
            NotAsCommittedError: it is missing, or its bytes are not those that were committed.
            OSError: the disk is full. No UserError: the same work may have room on another node.
            UserError: the store refuses, or cannot be reached; somebody else removes the files.
        """
        path = self._path(record)
        for _ in range(MOST_FETCHES):
            with contextlib.suppress(FileNotFoundError):
                file = open(path, "rb")  # noqa: SIM115 - closed by the caller
                if os.fstat(file.fileno()).st_size == record.bytes:
                    _touch(path)
                    return file
                # It was whole when it came: a node that lost its power may not have kept it so.
                file.close()
                path.unlink()
            # The folder itself may go while we fetch.
            with contextlib.suppress(FileNotFoundError):
                self._fetch_now(record)
        raise UserError(
            f"{self._folder} on {socket.gethostname()}: fetched shards are removed from it while they are needed: keep "
            f"whatever tidies up temporary files away, or set {FOLDER_VARIABLE} to another folder"
        )

    def fetch_ahead(self, records: Sequence[FileRecord]) -> None:
        """Begin to fetch shards in the background. They are kept until others are named.

        Args:
            records: the shards that are needed now or soon, in the order of need.

        Raises:
            OSError: the disk is full.
        """
        self._note_use(records)
        with self._lock:
            self._wanted = {record.sha256: record for record in records}
            self._missed.clear()
            for digest, under_way in list(self._fetches.items()):
                if digest not in self._wanted:
                    under_way.cancel()
            self._start_ahead(self._wanted)

    def keep_fetching(self) -> None:
        """Try again to fetch ahead what had no room, or could not be fetched, once a second; to be called often."""
        if not self._missed or time.monotonic() < self._try_again_at:
            return
        self._try_again_at = time.monotonic() + RETRY_S
        with self._lock:
            missed = [digest for digest in self._wanted if digest in self._missed]
            self._missed.clear()
            self._start_ahead(missed)

    def close(self) -> None:
        """Let go of the shards; whoever is the last user removes them."""
        self._end.set()
        self._fetcher.shutdown(wait=True, cancel_futures=True)
        self._leave()

    def _path(self, record: FileRecord) -> Path:
        return self._folder / f"{record.sha256}.file"

    def _note_use(self, records: Sequence[FileRecord]) -> None:
        """Let the other processes know what is in use here."""
        data = "".join(f"{record.sha256} {record.bytes}\n" for record in records).encode("ascii")
        for may_fail in (True, False):
            try:
                with _alone(self._folder):
                    # Room first: on a full disk the list would end where the room did.
                    if data:
                        os.posix_fallocate(self._user.fileno(), 0, len(data))
                    os.pwrite(self._user.fileno(), data, 0)
                    os.ftruncate(self._user.fileno(), len(data))
                return
            except OSError as error:
                if error.errno not in _DISK_FULL or not may_fail:
                    raise self._explained(error) from error
            self._make_room(0)

    def _explained(self, error: OSError) -> OSError:
        """Return an error to raise for one of this node's disk, with the place and what to do about it."""
        if error.errno not in _DISK_FULL:
            return error
        place = f"{self._folder} on {socket.gethostname()} (shards are fetched to it; {FOLDER_VARIABLE} names another)"
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), place)

    def _start_ahead(self, digests: Iterable[str]) -> None:
        """Begin to fetch shards that are not here; called with the lock held."""
        for digest in digests:
            record = self._wanted[digest]
            under_way = self._fetches.get(digest)
            if (under_way is None or under_way.done()) and not self._path(record).exists():
                self._start(digest, self._fetcher.submit(self._fetch_early, record))

    def _fetch_early(self, record: FileRecord) -> None:
        fetched = False
        try:
            fetched = self._fetch(record, ahead=True)
        finally:
            if not fetched:
                with self._lock:
                    self._missed.add(record.sha256)

    def _start(self, digest: str, future: Future[None]) -> None:
        self._fetches[digest] = future
        future.add_done_callback(lambda done: self._forget(digest, done))

    def _forget(self, digest: str, future: Future[None]) -> None:
        # Not under the lock, which whoever cancels it has.
        if self._fetches.get(digest) is future:
            self._fetches.pop(digest, None)

    def _fetch_now(self, record: FileRecord) -> None:
        """Fetch a shard in this thread, unless a thread is at it."""
        with self._lock:
            under_way = self._fetches.get(record.sha256)
            if under_way is not None and under_way.done():
                # One that is over, for want of room perhaps, and is about to be forgotten.
                under_way = None
            # One that waits for a thread waits behind others, which are needed later.
            mine = under_way is None or under_way.cancel()
            if mine:
                under_way = Future()
                under_way.set_running_or_notify_cancel()
                self._start(record.sha256, under_way)
        assert under_way is not None
        if mine:
            try:
                self._fetch(record, ahead=False)
                under_way.set_result(None)
            except BaseException as error:
                under_way.set_exception(error)
        under_way.result()

    def _fetch(self, record: FileRecord, *, ahead: bool) -> bool:
        """Fetch a shard, or wait until another process has; not if it is there, or is early and there is no room.

        Returns:
            Whether it is there.
        """
        whole = self._path(record)
        partial = self._folder / f"{record.sha256}.{record.bytes}.partial"
        while not whole.exists() and not (ahead and self._end.is_set()):
            _make_private(self._folder)
            with _held(partial) as is_ours:
                if is_ours:
                    # It may have come since we looked.
                    is_there = whole.exists()
                    if is_there or (not self._has_room(record) and ahead):
                        partial.unlink(missing_ok=True)
                        return is_there
                    try:
                        self._download(record, partial)
                    except BaseException:
                        partial.unlink(missing_ok=True)
                        raise
                    partial.rename(whole)
                    return True
            time.sleep(POLL_S)
        return whole.exists()

    def _download(self, record: FileRecord, partial: Path) -> None:
        # Before it is fetched: a shard that is missing or cut is not worth its way over the network.
        size = self._storage.size(record.name)
        if size < 0:
            raise NotAsCommittedError("is missing")
        if size != record.bytes:
            raise NotAsCommittedError(f"has {size} bytes, but {record.bytes} were committed")
        try:
            self._storage.download(record.name, partial, size)
        except OSError as error:
            if error.errno not in _DISK_FULL:
                raise
            # Not ours alone: others may have left less than the cache may take.
            self._make_room(0)
            try:
                self._storage.download(record.name, partial, size)
            except OSError as again:
                raise self._explained(again) from again
        if (found := sha256_file(partial)) != record.sha256:
            raise NotAsCommittedError(f"has the sha256 {found[:12]}… instead of {record.sha256[:12]}…")

    def _has_room(self, record: FileRecord) -> bool:
        """Tell whether there is room for a file, whose fetch has begun; remove others if there was none."""
        with self._lock:
            if record.bytes <= self._granted:
                self._granted -= record.bytes
                return True
        return self._make_room(self._most_bytes)

    def _make_room(self, most_bytes: int) -> bool:
        """Remove the shards used longest ago that nobody has in use, until the rest fits; tell whether it does."""
        with _alone(self._folder):
            in_use = _used_shards(self._folder)
            self._tell_of_size(sum(in_use.values()))
            shards = {path: path.stat() for path in self._folder.glob("*.file")}
            kept = sum(status.st_size for status in shards.values())
            # Each counts as what it will be.
            kept += sum(int(path.suffixes[0][1:]) for path in _fetched(self._folder))
            enough = most_bytes
            if kept > most_bytes and len(shards) >= MANY_FILES:
                enough -= int(ROOM_AT_ONCE * most_bytes)
            for path in sorted(shards, key=lambda path: shards[path].st_mtime_ns):
                if kept <= enough:
                    break
                if path.stem not in in_use:
                    # It takes nothing from whoever reads it: an open file outlives its name.
                    path.unlink(missing_ok=True)
                    kept -= shards[path].st_size
            with self._lock:
                self._granted = int(PART_OF_ROOM * max(0, most_bytes - kept))
            return kept <= most_bytes

    def _tell_of_size(self, needed_bytes: int) -> None:
        if needed_bytes > self._most_bytes and not self._told_of_size:
            self._told_of_size = True
            try:
                (self._folder / "told").touch(exist_ok=False)
            except OSError:
                # Another process of this node has.
                return
            needed, most = needed_bytes / 2**30, self._most_bytes / 2**30
            tell(
                f"{self._folder} on {socket.gethostname()}: what is read at a time, and next, has {needed:.1f} GiB, "
                f"but {SIZE_VARIABLE} is {most:.1f}: training waits for shards until it is {math.ceil(needed)}"
            )


def cache_folder() -> Path:
    """Return the folder of this node's cache; it need not exist."""
    base = os.environ.get(FOLDER_VARIABLE)
    return Path(base or tempfile.gettempdir()).expanduser().absolute() / f"ldm-cache-{os.getuid()}"


def remove_unused(folder: Path) -> None:
    """Remove a cache that no living process uses."""
    with _alone(folder):
        _remove_unless_used(folder)


def remove_unused_here() -> None:
    """Remove this node's cache if there is one that no living process uses."""
    if (folder := cache_folder()).exists():
        remove_unused(folder)


def is_used(folder: Path) -> bool:
    """Tell whether a living process uses a cache; changes nothing."""
    return any(_is_held(path) for path in folder.glob("*.user"))


def _size_of_cache() -> int:
    text = os.environ.get(SIZE_VARIABLE, "")
    try:
        gib = float(text or DEFAULT_GIB)
    except ValueError:
        gib = -1.0
    if not 0 <= gib < float("inf"):
        raise MisuseError(f"{SIZE_VARIABLE} must be a number of GiB, got {text!r}: set it to one such as 32")
    return int(gib * 2**30)


def _enter(folder: Path) -> IO[str]:
    """Become a user of a cache; return the file that says so, which is held until it is closed."""
    with _alone(folder):
        if not _living_users(folder):
            # Of users that were killed, at whatever they were doing; but what they fetched was checked, and is kept.
            _clear(folder, keep=".file")
        file = open(folder / f"{uuid.uuid4().hex}.user", "w", encoding="ascii")  # noqa: SIM115 - open until it leaves
        # Waited for: `is_used` looks at it for a moment, without the cache's lock.
        fcntl.flock(file, fcntl.LOCK_EX)
        return file


def _leave(folder: Path, user: IO[str]) -> None:
    if getattr(_thread, "is_alone", False):
        # Called by the garbage collector, in the middle of another's work: a user that is not held counts no more.
        user.close()
        return
    with contextlib.suppress(UserError), _alone(folder):
        Path(user.name).unlink(missing_ok=True)
        user.close()
        _remove_unless_used(folder)


def _remove_unless_used(folder: Path) -> None:
    """Remove a cache that has no living users; called with its lock held."""
    if not _living_users(folder):
        _clear(folder)
        # The lock goes last: whoever waits for it finds that it is nobody's, and begins anew.
        (folder / "lock").unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            folder.rmdir()


def _clear(folder: Path, keep: str | None = None) -> None:
    """Remove everything from a cache but its lock, and files with the suffix `keep`; called with the lock held."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name != "lock" and path.suffix != keep:
            path.unlink(missing_ok=True)


def _living_users(folder: Path) -> list[Path]:
    """Return the files of users that live; removes those of others. Called with the lock held."""
    users = list(folder.glob("*.user"))
    living = [path for path in users if _is_held(path)]
    for path in set(users) - set(living):
        path.unlink(missing_ok=True)
    return living


def _used_shards(folder: Path) -> dict[str, int]:
    """Return the bytes of the shards that somebody has in use, by their digests; called with the lock held."""
    lines = [line.split() for path in _living_users(folder) for line in path.read_text("ascii").splitlines()]
    return {digest: int(size) for digest, size in lines}


def _fetched(folder: Path) -> list[Path]:
    """Return what is being fetched; removes what killed processes have left. Called with the lock held."""
    partials = list(folder.glob("*.partial"))
    for path in partials:
        with _held(path) as is_ours:
            if is_ours:
                path.unlink(missing_ok=True)
    return [path for path in partials if path.exists()]


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold a cache's lock while the block runs; make the folder if there is none.

    Raises:
        UserError: the folder is another user's, or cannot be made.
    """
    lock = folder / "lock"
    while True:
        _make_private(folder)
        try:
            file = open(lock, "ab")  # noqa: SIM115 - closed below; what the block raises is not to be caught here
        except FileNotFoundError:
            continue
        with file:
            fcntl.flock(file, fcntl.LOCK_EX)
            # The last user may have removed it while we waited.
            if _is_at(file, lock):
                _thread.is_alone = True
                try:
                    yield
                finally:
                    _thread.is_alone = False
                return


@contextlib.contextmanager
def _held(path: Path) -> Iterator[bool]:
    """Hold a file while the block runs, and make it if there is none; yield False if somebody else holds it."""
    while True:
        with open(path, "ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            # Whoever held it may have renamed or removed it since it was opened.
            if _is_at(file, path):
                yield True
                return


def _is_held(path: Path) -> bool:
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
        try:
            # Shared, so that those who look do not see each other.
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _is_at(file: IO[bytes], path: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    return False


def _make_private(folder: Path) -> None:
    """Make a folder that nobody else can enter; one that is there must be this user's."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        status = folder.lstat()
        # In a folder that all can write to, somebody else may have been first.
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
            raise UserError(
                f"{folder} must be a folder of your own, since fetched shards are kept in it: remove it, or set "
                f"{FOLDER_VARIABLE} to a folder of yours"
            )
        if stat.S_IMODE(status.st_mode) != 0o700:
            folder.chmod(0o700)
    except FileNotFoundError:
        # Removed by the last user just now: the next try makes it.
        return
    except OSError as error:
        raise UserError(
            f"{folder}, where fetched shards are kept, cannot be made ({error.strerror}): set {FOLDER_VARIABLE} to a "
            "folder that you can write to"
        ) from error


def _touch(path: Path) -> None:
    """Note that a shard was used now."""
    with contextlib.suppress(FileNotFoundError):
        os.utime(path)
