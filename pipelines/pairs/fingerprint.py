"""What a source holds, as one digest that does not change when the source is moved."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from pipelines.ledger import digest_json
from pipelines.storage import sha256_file

if TYPE_CHECKING:
    import fsspec

# Above this, files of a folder are known by name and size: reading them for every `ldm plan` would take minutes.
READ_AT_MOST_BYTES = 512 * 2**20
_DIGESTS = ("ETag", "etag", "md5", "content_md5", "checksum", "sha256")


def digest_files(
    filesystem: fsspec.AbstractFileSystem, files: Sequence[tuple[str, str]], *, always_read: bool = False
) -> str:
    """A digest of files by name and content.

    Content is the store's own digest (etag) where it has one, else the sha256 of the bytes; for local folders above
    READ_AT_MOST_BYTES it is the size alone.

    Args:
        files: pairs of a name that moves with the data set, and the path. A missing file counts as missing.
        always_read: take the sha256 of local files of any size.
    """
    facts = [_facts(filesystem, path) for _, path in files]
    total = sum(fact["size"] for fact in facts)
    read = always_read or total <= READ_AT_MOST_BYTES

    def content(index: int) -> str | None:
        fact = facts[index]
        if fact["digest"] or fact["size"] < 0 or not read:
            return fact["digest"]
        with filesystem.open(files[index][1], "rb") as file:
            return sha256_file(file)

    # Hashing leaves the GIL, and one file's reading overlaps with another's hashing.
    with ThreadPoolExecutor(4) as pool:
        contents = list(pool.map(content, range(len(files))))
    return digest_json([[name, fact["size"], digest] for (name, _), fact, digest in zip(files, facts, contents)])


def _facts(filesystem: fsspec.AbstractFileSystem, path: str) -> dict[str, Any]:
    try:
        if "file" in filesystem.protocol:
            size = os.stat(path).st_size if os.path.isfile(path) else -1
            return {"size": size, "digest": None}
        info = filesystem.info(path)
        digest = next((str(info[name]) for name in _DIGESTS if info.get(name)), None)
        return {"size": int(info.get("size") or 0), "digest": digest}
    except (OSError, ValueError):
        return {"size": -1, "digest": None}


def stamp(url: str) -> tuple[int, int] | None:
    """What changes when a local file is written again: the key of what a process remembers of it."""
    try:
        status = os.stat(url.removeprefix("file://"))
    except (OSError, ValueError):
        return None
    return status.st_size, status.st_mtime_ns
