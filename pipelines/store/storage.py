"""Files under any fsspec URL, written so that a reader sees a whole file or none.

Local paths: a temporary file beside the target, fsync, rename. Object stores: a local temporary file, then one upload,
which the store makes visible atomically (multipart uploads included). Transient failures there are retried.
"""

import contextlib
import errno
import fnmatch
import hashlib
import io
import json
import os
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

from pipelines.errors import MisuseError, UserError
from pipelines.secrets import holds_secret, refusal
from pipelines.store import local_disk, object_store
from pipelines.store.failures import MissingFileError
from pipelines.store.filesystems import RANGE_BYTES, FileSystem, filesystem_of, is_s3
from pipelines.store.listing import FOLDER, list_folder, list_s3
from pipelines.store.location import FileFacts, Location
from pipelines.store.object_store import Upload

T = TypeVar("T")

CHUNK_BYTES = 1 << 20
# How often a folder is removed of which something is still there.
_REMOVALS = 3


@dataclass(frozen=True)
class Storage:
    """A folder at an fsspec URL (`runs/demo`, `s3://bucket/prefix`); cheap to build, safe to pickle.

    Every method raises UserError if an object store refuses or cannot be reached, naming the URL and what to do.

    Args:
        url: the folder. Local paths are made absolute, so that workers with another working directory agree on it.

    Raises:
        MisuseError: the URL holds a password or token, which would end up in logs and manifests.
    """

    url: str
    # Requests fail within seconds and are not repeated: for leases, whose holder tries again soon anyway.
    hasty: bool = False

    def __post_init__(self) -> None:
        url = self.url.removeprefix("file://")
        if holds_secret(url):
            raise MisuseError(refusal("a storage URL"))
        object.__setattr__(self, "url", url if "://" in url else os.path.abspath(os.path.expanduser(url)))

    def __truediv__(self, name: str) -> "Storage":
        return Storage(f"{self.url.rstrip('/')}/{name}")

    @property
    def filesystem(self) -> FileSystem:
        # Not kept: its connections and threads would not survive the way to another process.
        return filesystem_of(self.url, hasty=self.hasty)[0]

    @property
    def is_local(self) -> bool:
        return "://" not in self.url

    @property
    def name(self) -> str:
        return self.url.rstrip("/").rsplit("/", 1)[-1]

    def path(self, name: str = "") -> str:
        """Return the path of `name` in this folder, as `filesystem` takes it."""
        path = self.url if self.is_local else filesystem_of(self.url)[1]
        return f"{path.rstrip('/')}/{name}" if name else path

    def _attempt(self, name: str, operation: Callable[[FileSystem, str], T]) -> T:
        url = f"{self.url}/{name}" if name else self.url
        return object_store.attempt(url, lambda: operation(self.filesystem, self.path(name)))

    def exists(self, name: str = "") -> bool:
        return self._attempt(name, lambda store, path: bool(store.exists(path)))

    def size(self, name: str) -> int:
        """Return the bytes of a file; -1 if there is none."""
        try:
            return self._attempt(name, lambda store, path: int(store.size(path) or 0))
        except FileNotFoundError:
            return -1

    def sizes(self) -> dict[str, int]:
        """Return the bytes of every file of this folder, by name: one listing instead of one request per file."""
        return {name: size for name, size in self._entries().items() if size != FOLDER}

    def names(self, pattern: str = "*") -> list[str]:
        """Return the sorted names of this folder's entries that match a glob pattern; none if there is no folder."""
        # Not `glob`: the folder's own path may hold characters that mean something in a pattern.
        # Files that are being written have hidden names.
        return sorted(n for n in self._entries() if not n.startswith(".") and fnmatch.fnmatchcase(n, pattern))

    def _entries(self) -> dict[str, int]:
        """Return the bytes of every file of this folder by name, and FOLDER for each folder in it."""
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            store, path = self.filesystem, self.path()
            if is_s3(store):
                return list_s3(store, path, lambda request: object_store.attempt(self.url, request))
            return self._attempt("", list_folder)
        return {}

    def files_below(self, beginning: str = "") -> dict[str, FileFacts]:
        """Return the facts of every file of this folder, at any depth, whose path in it begins so; by that path."""
        if self.is_local:
            states = local_disk.files_below(Path(self.path()), beginning)
            return {name: FileFacts(state.st_size, written=int(state.st_mtime)) for name, state in states.items()}
        start = f"{self.path().rstrip('/')}/"
        if is_s3(self.filesystem):
            listed = object_store.files_below(self.url, self.filesystem, start + beginning)
            found = {path: FileFacts.of(info) for path, info in listed.items()}
        else:
            found = Location.of(self.url).files_below()
        inside = {path.removeprefix(start): facts for path, facts in found.items()}
        return {name: facts for name, facts in inside.items() if name.startswith(beginning)}

    def modified_at(self, name: str) -> float:
        """Return when a file was written, in seconds since 1970; 0 if the store does not say."""
        facts = self._attempt(name, lambda store, path: dict(store.info(path)))
        when = facts.get("mtime") or facts.get("LastModified") or 0
        return float(when.timestamp() if hasattr(when, "timestamp") else when)

    def seconds_since_written(self, name: str) -> float | None:
        """Return how long ago a file was written, by its store's clock alone; None if that does not tell the time."""
        with self._not_missing(name):
            return self._attempt(name, object_store.seconds_since_written)

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[BinaryIO]:
        """Open a file for reading. Raises UserError if it is missing."""
        with self._not_missing(name):
            handle = self._open(name)
        with handle:
            yield handle

    def _open(self, name: str) -> BinaryIO:
        if self.is_local:
            return cast(BinaryIO, self.filesystem.open(self.path(name), "rb"))
        # Not the store's own file: a read of that which fails is lost, and bytes are asked for long after it is opened.
        location = Location(self.filesystem, self.path(name))
        return cast(BinaryIO, io.BufferedReader(location.open_by_ranges(), RANGE_BYTES))

    def read_bytes(self, name: str) -> bytes:
        with self._not_missing(name):
            return self._attempt(name, object_store.read)

    def read_range(self, name: str, start: int, stop: int) -> bytes:
        """Read bytes start to stop - 1 of a file, in one request."""
        with self._not_missing(name):
            return self._attempt(name, lambda store, path: bytes(store.cat_file(path, start=start, end=stop)))

    def read_json(self, name: str) -> Any:
        try:
            return json.loads(self.read_bytes(name))
        except ValueError as error:
            raise UserError(f"{self.url}/{name} is not valid JSON ({error}); the file is damaged") from error

    def download(self, name: str, local: Path, size: int | None = None) -> None:
        """Copy a file's bytes to a local path. Who knows the size spares a request."""
        with self._not_missing(name):
            object_store.download(f"{self.url}/{name}", self.filesystem, self.path(name), local, size)

    @contextlib.contextmanager
    def local_copy(self, name: str) -> Iterator[Path]:
        """Yield a local path with a file's contents: the file itself if storage is local, else a temporary download."""
        if self.is_local:
            yield Path(self.path(name))
            return
        with tempfile.TemporaryDirectory(prefix="ldm-") as folder:
            path = Path(folder) / Path(name).name
            self.download(name, path)
            yield path

    @contextlib.contextmanager
    def _not_missing(self, name: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise MissingFileError(f"{self.url}/{name} is missing") from None

    @contextlib.contextmanager
    def writer(self, name: str) -> Iterator[Path]:
        """Yield a local path to write to; what it holds appears under `name`, whole, unless the block fails."""
        if self.is_local:
            with local_disk.replacing(Path(self.path(name))) as temporary:
                yield temporary
            return
        with tempfile.TemporaryDirectory(prefix="ldm-") as folder:
            temporary = Path(folder) / Path(name).name
            yield temporary
            object_store.upload(f"{self.url}/{name}", self.filesystem, temporary, self.path(name))

    def write_once(self, name: str, write: Callable[[Path], T]) -> T | None:
        """Write a file unless it exists.

        Args:
            name: the file.
            write: writes the contents to the local path that it is given; what it raises leaves no file.

        Returns:
            What `write` returned; None if a file of another writer stands (or our own, if the store's answer was lost).
        """
        if self.is_local:
            with local_disk.creating(Path(self.path(name))) as created:
                result = write(created.temporary)
            return result if created.ours else None
        with tempfile.TemporaryDirectory(prefix="ldm-") as folder:
            temporary = Path(folder) / Path(name).name
            result = write(temporary)
            url, path = f"{self.url}/{name}", self.path(name)
            return result if object_store.upload(url, self.filesystem, temporary, path, replace=False) else None

    def write_bytes(self, name: str, data: bytes) -> None:
        with self.writer(name) as path:
            path.write_bytes(data)

    def write_json(self, name: str, value: Any) -> None:
        self.write_bytes(name, encode_json(value))

    def copy(self, name: str, target: "Storage", target_name: str | None = None) -> None:
        """Give another folder a file of this one, whole or not at all, without moving its bytes if that can be.

        Locally a hard link, within one object store a copy made by the store, else through a local file.

        Raises:
            UserError: the file is missing.
        """
        target_name = target_name or name
        url, path = f"{target.url}/{target_name}", target.path(target_name)
        with self._not_missing(name):
            if self.is_local and target.is_local:
                local_disk.link(Path(self.path(name)), Path(path))
            elif not self.is_local and type(self.filesystem) is type(target.filesystem):
                object_store.copy(url, target.filesystem, self.path(name), path)
            elif target.is_local:
                with target.writer(target_name) as temporary:
                    self.download(name, temporary)
            else:
                with self.local_copy(name) as local:
                    object_store.upload(url, target.filesystem, local, path)

    def remove(self, name: str = "") -> None:
        """Remove a file or folder, if it is there."""
        with contextlib.suppress(FileNotFoundError):
            self._attempt(name, _remove)

    def remove_object(self, name: str) -> None:
        """Remove one file by one request, whether it is there or not."""
        with contextlib.suppress(FileNotFoundError):
            self._attempt(name, lambda store, path: store.rm_file(path))

    def remove_all_but(self, *kept: str) -> None:
        """Remove everything in this folder except some of its files."""
        if self.is_local:
            for name in set(os.listdir(self.path())) - set(kept):
                self.remove(name)
            return
        for _ in range(_REMOVALS):
            if not (names := [name for name in self.files_below() if name not in kept]):
                return
            # s3fs does not tell of objects that the store failed to delete.
            self.remove_files(names)
        raise UserError(f"{self.url}: {len(names)} files are still there after they were removed, {names[0]} first")

    def remove_files(self, names: Sequence[str]) -> None:
        """Remove several files, if they are there; in an object store a thousand with one request."""
        if not names:
            return
        if self.is_local:
            for name in names:
                Path(self.path(name)).unlink(missing_ok=True)
            return
        with contextlib.suppress(FileNotFoundError):
            self._attempt("", lambda store, path: store.rm([f"{path.rstrip('/')}/{name}" for name in names]))

    def remove_leftovers(self) -> None:
        """Remove what killed writers left of unfinished files; nobody may be writing below this folder."""
        if self.is_local:
            local_disk.remove_leftovers(Path(self.path()))
        else:
            object_store.abort_uploads(self.url, self.filesystem, self.path(), below=True)

    def unfinished_uploads(self) -> list[Upload]:
        """Return the uploads to places below this folder that are neither completed nor aborted, if the store tells."""
        if not self.is_local and is_s3(self.filesystem):
            # Stores without this request, or credentials that may not make it.
            with contextlib.suppress(UserError):
                return self._attempt("", lambda store, path: list(object_store.uploads(store, path, below=True)))
        return []

    def uploaded_bytes(self, upload: Upload) -> int:
        """Return the bytes of the parts of an unfinished upload."""
        return self._attempt("", lambda store, path: object_store.uploaded_bytes(store, upload))

    def abort_upload(self, upload: Upload) -> None:
        """Abort an upload, if it has not ended."""
        self._attempt("", lambda store, path: object_store.abort_upload(store, upload))

    def create(self, name: str, data: bytes) -> bool:
        """Write a small file unless it exists. Of several that create one file, exactly one is told True.

        (If the store has no conditional writes, two that do so at the same moment may both be.)
        """
        if self.is_local:
            return local_disk.create(Path(self.path(name)), data)
        return self.replace(name, data, None) is not None

    def version(self, name: str) -> str | None:
        """Return what names the present contents of an object (its ETag), or None if there is none."""
        return self._attempt(name, object_store.version)

    def replace(self, name: str, data: bytes, version: str | None) -> str | None:
        """Write a small object if the store still holds that version (None: nothing) there.

        Returns:
            The new version, or None if somebody else wrote in between.
        """
        # The same for all attempts: one of them may have succeeded without our hearing of it.
        writer = uuid.uuid4().hex
        return self._attempt(
            name, lambda store, path: object_store.put_if(store, path, data, expected=version, writer=writer)
        )


def encode_json(value: Any) -> bytes:
    """Encode JSON for people and diffs: indented, keys sorted, one line feed at the end."""
    return (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


def _remove(store: FileSystem, path: str) -> None:
    store.rm(path, recursive=True)
    # s3fs does not tell of objects that the store failed to delete; a "busy" error has the removal repeated.
    if is_s3(store) and store.exists(path):
        raise OSError(errno.EBUSY, "still there after it was removed")


def sha256_file(file: BinaryIO | Path | str) -> str:
    """Return the hexadecimal sha256 of an open binary file, or of a file at a path or fsspec URL."""
    if isinstance(file, str | Path):
        folder, _, name = str(file if "://" in str(file) else os.path.abspath(file)).rpartition("/")
        with Storage(folder or "/").open(name) as opened:
            return sha256_file(opened)
    digest = hashlib.sha256()
    while chunk := file.read(CHUNK_BYTES):
        digest.update(chunk)
    return digest.hexdigest()
