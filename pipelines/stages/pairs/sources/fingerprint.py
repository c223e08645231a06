"""What a source holds, as one digest that does not change when the source is moved."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipelines.store.ranges import is_local, map_in_threads
from pipelines.store.storage import sha256_file

if TYPE_CHECKING:
    import fsspec

# Above this, files of a folder are known by name and size: reading them for every `ldm plan` would take minutes.
READ_AT_MOST_BYTES = 512 * 2**20
_DIGESTS = ("ETag", "etag", "md5", "content_md5", "checksum", "sha256")
_HASHING_THREADS = 4


@dataclass(frozen=True)
class _Facts:
    """What a store says of a file without reading it; -1 bytes where it is missing."""

    name: str
    path: str
    size: int
    digest: str | None


def digest_files(
    filesystem: fsspec.AbstractFileSystem,
    files: Callable[[], Iterable[tuple[str, str]]],
    *,
    always_read: bool = False,
) -> str:
    """A digest of files by name and content, in memory that does not grow with their number.

    Content is the store's own digest (etag) where it has one, else the sha256 of the bytes; for files without a digest
    that are more than READ_AT_MOST_BYTES together it is the size alone.

    Args:
        files: gives pairs of a name that moves with the data set, and the path; called up to twice.
        always_read: take the sha256 of files of any size.
    """
    summary, unknown_bytes = hashlib.sha256(), 0
    for facts in _facts_of_all(filesystem, files()):
        unknown_bytes += facts.size if facts.size > 0 and facts.digest is None else 0
        _add(summary, facts.name, facts.size, facts.digest)
    if not unknown_bytes or (unknown_bytes > READ_AT_MOST_BYTES and not always_read):
        return summary.hexdigest()

    def content(facts: _Facts) -> tuple[str, int, str | None]:
        if facts.digest is not None or facts.size < 0:
            return facts.name, facts.size, facts.digest
        with filesystem.open(facts.path, "rb") as file:
            return facts.name, facts.size, sha256_file(file)

    summary = hashlib.sha256()
    # Hashing leaves the GIL, and one file's reading overlaps with another's hashing.
    for name, size, digest in map_in_threads(content, _facts_of_all(filesystem, files()), _HASHING_THREADS):
        _add(summary, name, size, digest)
    return summary.hexdigest()


def _add(summary: hashlib._Hash, name: str, size: int, digest: str | None) -> None:
    summary.update(json.dumps([name, size, digest]).encode() + b"\n")


def _facts_of_all(filesystem: fsspec.AbstractFileSystem, files: Iterable[tuple[str, str]]) -> Iterator[_Facts]:
    def facts(file: tuple[str, str]) -> _Facts:
        return _facts(filesystem, *file)

    # Asking a local disk takes less time than handing the question to a thread.
    return map(facts, files) if is_local(filesystem) else map_in_threads(facts, files)


def _facts(filesystem: fsspec.AbstractFileSystem, name: str, path: str) -> _Facts:
    try:
        if is_local(filesystem):
            return _Facts(name, path, os.stat(path).st_size if os.path.isfile(path) else -1, None)
        info = filesystem.info(path)
    except (OSError, ValueError):
        return _Facts(name, path, -1, None)
    digest = next((str(info[key]) for key in _DIGESTS if info.get(key)), None)
    return _Facts(name, path, int(info.get("size") or 0), digest)
