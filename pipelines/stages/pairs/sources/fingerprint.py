"""The content of a source as one digest, which does not change when the source is moved."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from pipelines.store.location import Location, digest_in
from pipelines.store.remembered import remember_by_stamp
from pipelines.store.storage import sha256_file
from pipelines.store.threads import map_in_threads

# Above this, files of a folder are known by name and size: reading them for every `ldm plan` would take minutes.
READ_AT_MOST_BYTES = 512 * 2**20
_HASHING_THREADS = 4
# About half a kilobyte each.
_REMEMBERED = 2**15


@dataclass(frozen=True)
class _Facts:
    """Facts of a file that are known without reading it; -1 bytes if it is missing."""

    name: str
    file: Location
    size: int
    digest: str | None


def digest_files(files: Callable[[], Iterable[tuple[str, Location]]], *, always_read: bool = False) -> str:
    """Return a digest of files by name and content, in memory that does not grow with their number.

    Content is the store's own digest (etag) if it has one, else the sha256 of the bytes; for files without a digest
    that are more than READ_AT_MOST_BYTES together it is the size alone.

    Args:
        files: gives pairs of a name that moves with the data set, and the file; called up to twice.
        always_read: take the sha256 of files of any size.
    """
    summary, unknown_bytes = hashlib.sha256(), 0
    for facts in _facts_of_all(files()):
        unknown_bytes += facts.size if facts.size > 0 and facts.digest is None else 0
        _add(summary, facts.name, facts.size, facts.digest)
    if not unknown_bytes or (unknown_bytes > READ_AT_MOST_BYTES and not always_read):
        return summary.hexdigest()
    summary = hashlib.sha256()
    # Hashing leaves the GIL, and one file's reading overlaps with another's hashing.
    for facts, digest in map_in_threads(_with_digest, _facts_of_all(files()), _HASHING_THREADS):
        _add(summary, facts.name, facts.size, digest)
    return summary.hexdigest()


def _add(summary: hashlib._Hash, name: str, size: int, digest: str | None) -> None:
    summary.update(json.dumps([name, size, digest]).encode() + b"\n")


def _with_digest(facts: _Facts) -> tuple[_Facts, str | None]:
    known = facts.digest is not None or facts.size < 0
    return facts, facts.digest if known else _sha256(facts.file)


# A plan, an estimate and the run itself all ask, and a table may be hundreds of gigabytes.
@remember_by_stamp(_REMEMBERED)
def _sha256(file: Location) -> str:
    with file.open() as opened:
        return sha256_file(opened)


def _facts_of_all(files: Iterable[tuple[str, Location]]) -> Iterator[_Facts]:
    files = iter(files)
    first = next(files, None)
    if first is None:
        return iter(())
    rest = itertools.chain([first], files)
    # Asking a local disk takes less time than handing the question to a thread.
    return map(_facts, rest) if first[1].is_local else map_in_threads(_facts, rest)


def _facts(named: tuple[str, Location]) -> _Facts:
    name, file = named
    if file.is_local:
        try:
            return _Facts(name, file, os.stat(file.path).st_size if os.path.isfile(file.path) else -1, None)
        except (OSError, ValueError):
            return _Facts(name, file, -1, None)
    facts = file.facts(forbidden_is_missing=True)
    if facts is None:
        return _Facts(name, file, -1, None)
    return _Facts(name, file, int(facts.get("size") or 0), digest_in(facts))
