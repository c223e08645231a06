"""The contents of a source as one digest, which does not change when the source is moved or copied.

Contents are known by their sha256. It is computed by reading the files once; what was read is remembered by what the
files look like from outside, and read again when that changes.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import stat
import sys
import time
import zlib
from collections.abc import Iterable, Iterator
from functools import partial
from typing import NamedTuple

from pipelines.errors import UserError
from pipelines.stages.pairs.config import IdentifyBy
from pipelines.stages.pairs.sources.listing import UNLISTED, Listing
from pipelines.stages.pairs.sources.recorded import Records
from pipelines.store.failures import readable
from pipelines.store.known_digests import KnownDigests
from pipelines.store.location import Location
from pipelines.store.remembered import is_settled
from pipelines.store.storage import sha256_file
from pipelines.store.threads import map_in_threads

# Hashing leaves the GIL, and one file's reading overlaps with another's hashing.
_LOCAL_THREADS, _REMOTE_THREADS = 4, 16
# Files are digested in groups, and a group is what is remembered and read again: small, so that one changed picture
# costs little, and large, so that a hundred million of them are remembered in a few megabytes.
_GROUP_FILES = 1024
_GROUP_BYTES = 2**26
# A remote file up to this size is read by one request; of a larger one the store is first asked for its checksum.
_SMALL_BYTES = 2**20
_SAVE_EVERY_S = 60
_SAY_AFTER_S = 10


class _File(NamedTuple):
    """A file as it looks from outside.

    Attributes:
        name: what moves with the data set.
        size: its bytes; -1 if it is missing.
        version: changes with the contents; None if nothing tells that they changed.
        written: when, in seconds since 1970; 0 if unknown.
        settled: whether a change from now on would change the version.
    """

    name: str
    place: Location
    size: int
    version: str | None = None
    written: float = 0
    settled: bool = True


class _Group(NamedTuple):
    """What was found of a group of files. `key` is None if nothing would tell that they changed."""

    key: str | None
    digest: str
    bytes_read: int = 0


def digest_files(
    place: str,
    files: Iterable[tuple[str, Location]],
    listing: Listing = UNLISTED,
    identify_by: IdentifyBy = "contents",
) -> str:
    """Return a digest of files by name and contents, in memory that does not grow with their number.

    Args:
        place: the folder that they are in, or the like: what was read of one place is remembered together.
        files: pairs of a name that moves with the data set, and the file.
        listing: what is known of the files without asking for each.
        identify_by: `contents`: the sha256 of each file, as the store keeps it or by reading; `recorded`: the same, but
            digests that lie beside the files are believed; `listing`: in place of contents the store's versions (ETag),
            on disks times.

    Raises:
        UserError: a store refuses or does not answer; or `listing`, and there are no versions.
    """
    found = _look_at_all(files, listing)
    if identify_by == "listing":
        return _digest_of_listing(found)
    known = KnownDigests(place)
    records = Records(place if identify_by == "recorded" else None)
    first = next(found, None)
    if first is None:
        return hashlib.sha256().hexdigest()
    threads = _LOCAL_THREADS if first.place.is_local else _REMOTE_THREADS
    groups = _in_groups(itertools.chain([first], found))
    summary, watch = hashlib.sha256(), _Watch(place)
    try:
        for group in map_in_threads(partial(_digest_group, known, records), groups, threads):
            summary.update(group.digest.encode())
            if group.key is not None:
                known.add(group.key, group.digest)
            if watch.saw(group.bytes_read):
                known.save()
    finally:
        # What was read before an interruption is not read again.
        known.save()
    return summary.hexdigest()


class _Watch:
    """Tells a person why a plan takes long, and when it is time to save."""

    def __init__(self, place: str) -> None:
        self._place, self._bytes, self._said = place, 0, False
        self._began = self._saved = time.monotonic()

    def saw(self, bytes_read: int) -> bool:
        self._bytes += bytes_read
        now = time.monotonic()
        if not self._said and self._bytes and now - self._began > _SAY_AFTER_S:
            self._said = True
            sys.stderr.write(
                f"reading {self._place} once, to know it by its contents wherever it lies; this is remembered. "
                "(pairs.identify_by=listing goes by names, sizes and versions instead: docs/pairs.md)\n"
            )
        due = now - self._saved > _SAVE_EVERY_S
        self._saved = now if due else self._saved
        return due


def _look_at_all(files: Iterable[tuple[str, Location]], listing: Listing) -> Iterator[_File]:
    files = iter(files)
    first = next(files, None)
    if first is None:
        return iter(())
    rest = itertools.chain([first], files)
    # Asking a local disk takes less time than handing the question to a thread, and so does looking into a listing.
    if first[1].is_local:
        return (_look_at_local(*named) for named in rest)
    if listing.folder is not None:
        return (_look_at_remote(listing, named) for named in rest)
    return map_in_threads(partial(_look_at_remote, listing), rest)


def _look_at_local(name: str, place: Location) -> _File:
    try:
        status = os.stat(place.path)
    except (OSError, ValueError):
        return _File(name, place, -1)
    if not stat.S_ISREG(status.st_mode):
        return _File(name, place, -1)
    version = f"{status.st_mtime_ns} {status.st_ctime_ns} {status.st_ino}"
    return _File(name, place, status.st_size, version, status.st_mtime, is_settled(status))


def _look_at_remote(listing: Listing, named: tuple[str, Location]) -> _File:
    name, place = named
    facts = listing.facts(place)
    if facts is None:
        return _File(name, place, -1)
    return _File(name, place, facts.size, facts.version, facts.written)


def _in_groups(files: Iterable[_File]) -> Iterator[list[_File]]:
    """Cut where a hash of a file says so, not after so many files: one that is added then changes one group."""
    group: list[_File] = []
    size = 0
    for file in files:
        group.append(file)
        size += max(file.size, 0)
        mark = zlib.crc32(f"{file.name} {file.size}".encode("utf-8", "surrogateescape"))
        if size >= _GROUP_BYTES or mark % _GROUP_FILES == 0:
            yield group
            group, size = [], 0
    if group:
        yield group


def _digest_group(known: KnownDigests, records: Records, group: list[_File]) -> _Group:
    key = _key(group)
    if key is not None and (digest := known.get(key)):
        return _Group(key, digest)
    summary, bytes_read = hashlib.sha256(), 0
    for file in group:
        if (digest := records.sha256(file.place, file.size, file.written)) is not None:
            # Believed, not known: another recipe may ask for the contents.
            key = None
        else:
            digest, count = _sha256(file)
            bytes_read += count
            # A file that changed while it was read may be half the old one.
            key = key if _is_unchanged(file) else None
        summary.update(json.dumps([file.name, file.size, digest]).encode() + b"\n")
    return _Group(key, summary.hexdigest(), bytes_read)


def _key(group: list[_File]) -> str | None:
    """Return what names a group as it looks from outside; None if its contents could change without its changing."""
    summary = hashlib.sha256()
    for file in group:
        if file.size >= 0 and (file.version is None or not file.settled):
            return None
        facts = [file.name, file.place.url, file.size, file.version, 0 if file.place.is_local else file.written]
        summary.update(json.dumps(facts).encode() + b"\n")
    return summary.hexdigest()


def _is_unchanged(file: _File) -> bool:
    return not file.place.is_local or _look_at_local(file.name, file.place) == file


def _sha256(file: _File) -> tuple[str | None, int]:
    """Return a file's sha256, None if it is missing, and how many bytes were read for it."""
    if file.size < 0:
        return None, 0
    with readable(file.place.url):
        if not file.place.is_local and file.size <= _SMALL_BYTES:
            return hashlib.sha256(file.place.read()).hexdigest(), file.size
        if (stored := file.place.stored_sha256()) is not None:
            return stored, 0
        with file.place.open() as opened:
            return sha256_file(opened), file.size


def _digest_of_listing(files: Iterable[_File]) -> str:
    summary = hashlib.sha256(b"listing\n")
    for file in files:
        if not file.settled:
            file = _settle(file)
        if file.size >= 0 and file.version is None:
            raise UserError(
                f"{file.place.url}: its store has no versions of files, so that a listing does not tell of changes: "
                "set pairs.identify_by=contents"
            )
        # Without the inode, which other machines may number otherwise.
        version = file.version.rpartition(" ")[0] if file.version and file.place.is_local else file.version
        summary.update(json.dumps([file.name, file.size, version]).encode() + b"\n")
    return summary.hexdigest()


def _settle(file: _File) -> _File:
    """Wait until the clock of a file's times has moved on: what is read later is then what these times stand for."""
    while not file.settled:
        time.sleep(0.01)
        file = _look_at_local(file.name, file.place)
    return file
