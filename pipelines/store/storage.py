"""Files under any fsspec URL, written so that a reader sees a whole file or none.

Local paths: a temporary file beside the target, fsync, rename. Object stores: a local temporary file, then one upload,
which the store makes visible atomically (multipart uploads included). What fails there and may pass is retried.
"""

import contextlib
import errno
import fnmatch
import hashlib
import json
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

import fsspec

from pipelines.errors import MisuseError, UserError
from pipelines.store import object_store
from pipelines.store.failures import explain_failure

T = TypeVar("T")

CHUNK_BYTES = 1 << 20
NO_HARD_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EXDEV, errno.EMLINK)


@dataclass(frozen=True)
class Storage:
    """A folder at an fsspec URL (`runs/demo`, `s3://bucket/prefix`); cheap to build, safe to pickle.

    Every method raises UserError where an object store refuses or cannot be reached, naming the URL and what to do.

    Args:
        url: the folder. Local paths are made absolute, so that workers with another working directory agree on it.

    Raises:
        MisuseError: the URL holds a password, which would end up in logs and manifests.
    """

    url: str

    def __post_init__(self) -> None:
        url = self.url.removeprefix("file://")
        if holds_password(url):
            raise MisuseError("a storage URL must not hold a password: set it in the environment (AWS_PROFILE)")
        object.__setattr__(self, "url", url if "://" in url else os.path.abspath(os.path.expanduser(url)))

    def __truediv__(self, name: str) -> "Storage":
        return Storage(f"{self.url.rstrip('/')}/{name}")

    @property
    def filesystem(self) -> fsspec.AbstractFileSystem:
        return fsspec.filesystem("file") if self.is_local else object_store.filesystem(self.url)

    @property
    def is_local(self) -> bool:
        return "://" not in self.url

    @property
    def name(self) -> str:
        return self.url.rstrip("/").rsplit("/", 1)[-1]

    def path(self, name: str = "") -> str:
        """The path of `name` in this folder, as `filesystem` takes it."""
        path = self.url if self.is_local else str(self.filesystem._strip_protocol(self.url))
        return f"{path.rstrip('/')}/{name}" if name else path

    def _attempt(self, name: str, operation: Callable[[fsspec.AbstractFileSystem, str], T]) -> T:
        url = f"{self.url}/{name}" if name else self.url
        return object_store.attempt(url, lambda: operation(self.filesystem, self.path(name)))

    def exists(self, name: str = "") -> bool:
        return self._attempt(name, lambda store, path: bool(store.exists(path)))

    def size(self, name: str) -> int:
        """Bytes of a file; -1 where there is none."""
        try:
            return self._attempt(name, lambda store, path: int(store.size(path) or 0))
        except FileNotFoundError:
            return -1

    def sizes(self) -> dict[str, int]:
        """Bytes of every file of this folder, by name: one listing instead of a request a file."""
        return {name: int(each["size"] or 0) for name, each in self._entries().items() if each["type"] == "file"}

    def names(self, pattern: str = "*") -> list[str]:
        """Sorted names of this folder's entries that match a glob pattern; none where the folder does not exist."""
        # Not `glob`: the folder's own path may hold characters that mean something in a pattern.
        # Files that are being written have hidden names.
        return sorted(n for n in self._entries() if not n.startswith(".") and fnmatch.fnmatchcase(n, pattern))

    def _entries(self) -> dict[str, dict[str, Any]]:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            entries = self._attempt("", lambda store, path: store.ls(path, detail=True))
            return {str(each["name"]).rstrip("/").rsplit("/", 1)[-1]: each for each in entries}
        return {}

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[BinaryIO]:
        """Open a file for reading; UserError where it is missing."""
        try:
            handle = self._attempt(name, lambda store, path: store.open(path, "rb"))
        except FileNotFoundError:
            raise UserError(f"{self.url}/{name} is missing") from None
        with handle:
            try:
                yield cast(BinaryIO, handle)
            except Exception as error:
                # What was read is asked for while the block runs.
                if self.is_local or (failure := explain_failure(f"{self.url}/{name}", error)) is None:
                    raise
                raise failure from None

    def read_bytes(self, name: str) -> bytes:
        try:
            return self._attempt(name, object_store.read)
        except FileNotFoundError:
            raise UserError(f"{self.url}/{name} is missing") from None

    def read_json(self, name: str) -> Any:
        try:
            return json.loads(self.read_bytes(name))
        except ValueError as error:
            raise UserError(f"{self.url}/{name} is not valid JSON ({error}); the file is damaged") from error

    @contextlib.contextmanager
    def writer(self, name: str) -> Iterator[Path]:
        """A local path to write to; what it holds appears under `name`, whole, when the block ends without an error."""
        if self.is_local:
            target = Path(self.path(name))
            with _beside(target) as temporary:
                yield temporary
                _sync(temporary)
                os.replace(temporary, target)
            return
        with tempfile.TemporaryDirectory(prefix="ldm-") as folder:
            temporary = Path(folder) / Path(name).name
            yield temporary
            self._upload(temporary, name)

    def _upload(self, local: Path, name: str) -> None:
        try:
            self._attempt(name, lambda store, path: object_store.upload(store, local, path))
        finally:
            # Where the answer to "begin an upload" was lost, nobody but the store knows of it.
            if local.stat().st_size >= 2 * object_store.PART_BYTES:
                self._abort_uploads(name)

    def _abort_uploads(self, name: str, *, below: bool = False) -> None:
        # Not worth failing for: stores without this request, or credentials that may not make it.
        with contextlib.suppress(UserError):
            self._attempt(name, lambda store, path: object_store.abort_uploads(store, path, below=below))

    def remove_leftovers(self) -> None:
        """Remove what writers left behind that were killed before they finished a file; nobody may be writing here."""
        if not self.is_local:
            self._abort_uploads("", below=True)
            return
        for leftover in Path(self.path()).rglob(".*.tmp"):
            leftover.unlink(missing_ok=True)

    def write_bytes(self, name: str, data: bytes) -> None:
        with self.writer(name) as path:
            path.write_bytes(data)

    def write_json(self, name: str, value: Any) -> None:
        self.write_bytes(name, encode_json(value))

    def create(self, name: str, data: bytes) -> bool:
        """Write a small file unless it exists. Of several that create one file, exactly one is told True.

        (Where the store has no conditional writes, two that do so at the same moment may both be.)
        """
        if self.is_local:
            return self._create_local(Path(self.path(name)), data)
        return self.replace(name, data, None) is not None

    @staticmethod
    def _create_local(target: Path, data: bytes) -> bool:
        with _beside(target) as temporary:
            temporary.write_bytes(data)
            _sync(temporary)
            try:
                os.link(temporary, target)
            except FileExistsError:
                return False
            except OSError as error:
                if error.errno not in NO_HARD_LINKS:
                    raise
                if target.exists():
                    return False
                os.replace(temporary, target)
        return True

    def version(self, name: str) -> str | None:
        """What names the present contents of an object (its ETag), or None where there is none."""
        return self._attempt(name, object_store.version)

    def replace(self, name: str, data: bytes, version: str | None) -> str | None:
        """Write a small object if the store still holds that version (None: nothing) there.

        Returns:
            The new version, or None where somebody else wrote in between.
        """
        writer = uuid.uuid4().hex
        return self._attempt(
            name, lambda store, path: object_store.put_if(store, path, data, expected=version, writer=writer)
        )

    def copy(self, name: str, target: "Storage", target_name: str | None = None) -> None:
        """Give another folder a file of this one, whole or not at all, without moving its bytes where that can be.

        Locally a hard link, within one object store a copy made by the store, else through a local file.

        Raises:
            UserError: the file is missing.
        """
        target_name = target_name or name
        try:
            if self.is_local and target.is_local:
                _link(Path(self.path(name)), Path(target.path(target_name)))
            elif not self.is_local and type(self.filesystem) is type(target.filesystem):
                self._copy_inside_store(name, target, target_name)
            elif target.is_local:
                with target.writer(target_name) as path:
                    self._download(name, path)
            else:
                with self.local_copy(name) as path:
                    target._upload(path, target_name)
        except FileNotFoundError:
            raise UserError(f"{self.url}/{name} is missing") from None

    def _copy_inside_store(self, name: str, target: "Storage", target_name: str) -> None:
        source = self.path(name)
        try:
            target._attempt(target_name, lambda store, path: store.cp_file(source, path))
        finally:
            target._abort_uploads(target_name)

    def remove(self, name: str = "") -> None:
        """Remove a file or folder, if it is there."""
        with contextlib.suppress(FileNotFoundError):
            self._attempt(name, _remove)

    @contextlib.contextmanager
    def local_copy(self, name: str) -> Iterator[Path]:
        """A local path with a file's contents: the file itself where storage is local, else a temporary download."""
        if self.is_local:
            yield Path(self.path(name))
            return
        with tempfile.TemporaryDirectory(prefix="ldm-") as folder:
            path = Path(folder) / Path(name).name
            self._download(name, path)
            yield path

    def _download(self, name: str, local: Path) -> None:
        object_store.download(f"{self.url}/{name}", self.filesystem, self.path(name), local)


def encode_json(value: Any) -> bytes:
    """JSON for people and diffs: indented, keys sorted, one line feed at the end."""
    return (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


@contextlib.contextmanager
def _beside(target: Path) -> Iterator[Path]:
    """A temporary path in the target's folder, for what is then renamed or linked; gone afterwards."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f".{target.name}.{uuid.uuid4().hex}.tmp"
    try:
        yield temporary
        _sync_folder(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _link(source: Path, target: Path) -> None:
    with _beside(target) as temporary:
        try:
            os.link(source, temporary)
        except OSError as error:
            if error.errno not in NO_HARD_LINKS:
                raise
            shutil.copyfile(source, temporary)
            _sync(temporary)
        os.replace(temporary, target)


def _remove(store: fsspec.AbstractFileSystem, path: str) -> None:
    store.rm(path, recursive=True)
    # s3fs does not tell of objects that the store failed to delete.
    if object_store.is_s3(store) and store.exists(path):
        raise OSError(errno.EBUSY, "still there after it was removed")


def _sync(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    # A rename survives a power cut only once its folder is on disk too.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def holds_password(url: str) -> bool:
    """Whether a URL is of the form `s3://KEY:SECRET@…`; a secret may hold slashes, a port is none."""
    return bool(re.match(r"[a-z0-9+.-]+://[^/@]*:(?!\d+(/|$)).*@", url, re.IGNORECASE))


def sha256_file(file: BinaryIO | Path | str) -> str:
    """Hexadecimal sha256 of an open binary file, or of a file at a path or fsspec URL."""
    if isinstance(file, str | Path):
        folder, _, name = str(file if "://" in str(file) else os.path.abspath(file)).rpartition("/")
        with Storage(folder or "/").open(name) as opened:
            return sha256_file(opened)
    digest = hashlib.sha256()
    while chunk := file.read(CHUNK_BYTES):
        digest.update(chunk)
    return digest.hexdigest()
