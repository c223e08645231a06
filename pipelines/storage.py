"""Files under any fsspec URL, written so that a reader sees a whole file or none.

Local paths: a temporary file beside the target, fsync, rename. Object stores: a local temporary file, then one upload,
which the store makes visible atomically (multipart uploads included).
"""

import contextlib
import fnmatch
import hashlib
import json
import os
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import fsspec

from pipelines.errors import UserError

CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Storage:
    """A folder at an fsspec URL (`runs/demo`, `s3://bucket/prefix`); cheap to build, safe to pickle.

    Args:
        url: the folder. Local paths are made absolute, so that workers with another working directory agree on it.
    """

    url: str

    def __post_init__(self) -> None:
        url = self.url.removeprefix("file://")
        object.__setattr__(self, "url", url if "://" in url else os.path.abspath(os.path.expanduser(url)))

    def __truediv__(self, name: str) -> "Storage":
        return Storage(f"{self.url.rstrip('/')}/{name}")

    @property
    def filesystem(self) -> fsspec.AbstractFileSystem:
        # s3fs would otherwise remember listings for ever, and not see what other processes write.
        options = {} if self.is_local else {"use_listings_cache": False}
        try:
            return fsspec.core.url_to_fs(self.url, **options)[0]
        except (ValueError, ImportError) as error:
            raise UserError(f"no file system for {self.url}: {error}") from error

    @property
    def is_local(self) -> bool:
        return "://" not in self.url

    @property
    def name(self) -> str:
        return self.url.rstrip("/").rsplit("/", 1)[-1]

    def path(self, name: str = "") -> str:
        """The path of `name` in this folder, as `filesystem` takes it."""
        path = fsspec.core.url_to_fs(self.url)[1]
        return f"{path.rstrip('/')}/{name}" if name else path

    def exists(self, name: str = "") -> bool:
        return bool(self.filesystem.exists(self.path(name)))

    def size(self, name: str) -> int:
        """Bytes of a file; -1 where there is none."""
        try:
            return int(self.filesystem.size(self.path(name)) or 0)
        except FileNotFoundError:
            return -1

    def names(self, pattern: str = "*") -> list[str]:
        """Sorted names of this folder's entries that match a glob pattern; none where the folder does not exist."""
        # Not `glob`: the folder's own path may hold characters that mean something in a pattern.
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            names = (str(p).rstrip("/").rsplit("/", 1)[-1] for p in self.filesystem.ls(self.path(), detail=False))
            # Files that are being written have hidden names.
            return sorted(name for name in names if not name.startswith(".") and fnmatch.fnmatchcase(name, pattern))
        return []

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[BinaryIO]:
        """Open a file for reading; UserError where it is missing."""
        try:
            handle = self.filesystem.open(self.path(name), "rb")
        except FileNotFoundError:
            raise UserError(f"{self.url}/{name} is missing") from None
        with handle:
            yield cast(BinaryIO, handle)

    def read_bytes(self, name: str) -> bytes:
        with self.open(name) as file:
            return file.read()

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
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = target.parent / f".{target.name}.{uuid.uuid4().hex}.tmp"
            try:
                yield temporary
                with open(temporary, "rb") as file:
                    os.fsync(file.fileno())
                os.replace(temporary, target)
                _sync_folder(target.parent)
            finally:
                temporary.unlink(missing_ok=True)
            return
        with tempfile.TemporaryDirectory(prefix="ldm-") as folder:
            temporary = Path(folder) / Path(name).name
            yield temporary
            self.filesystem.put_file(str(temporary), self.path(name))

    def remove_leftovers(self) -> None:
        """Remove what writers left behind that were killed before they finished a file; nobody may be writing here."""
        if self.is_local:
            for leftover in Path(self.path()).rglob(".*.tmp"):
                leftover.unlink(missing_ok=True)

    def write_bytes(self, name: str, data: bytes) -> None:
        with self.writer(name) as path:
            path.write_bytes(data)

    def write_json(self, name: str, value: Any) -> None:
        self.write_bytes(name, (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode())

    def remove(self, name: str = "") -> None:
        """Remove a file or folder, if it is there."""
        with contextlib.suppress(FileNotFoundError):
            self.filesystem.rm(self.path(name), recursive=True)

    @contextlib.contextmanager
    def local_copy(self, name: str) -> Iterator[Path]:
        """A local path with a file's contents: the file itself where storage is local, else a temporary download."""
        if self.is_local:
            yield Path(self.path(name))
            return
        with tempfile.TemporaryDirectory(prefix="ldm-") as folder:
            path = Path(folder) / Path(name).name
            self.filesystem.get_file(self.path(name), str(path))
            yield path


def _sync_folder(folder: Path) -> None:
    # A rename survives a power cut only once its folder is on disk too.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_file(file: BinaryIO | Path | str) -> str:
    """Hexadecimal sha256 of an open binary file, or of a file at a path or fsspec URL."""
    if isinstance(file, str | Path):
        try:
            with fsspec.open(str(file), "rb") as opened:
                return sha256_file(cast(BinaryIO, opened))
        except FileNotFoundError:
            raise UserError(f"file {file} is missing") from None
    digest = hashlib.sha256()
    while chunk := file.read(CHUNK_BYTES):
        digest.update(chunk)
    return digest.hexdigest()
