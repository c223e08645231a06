"""A few samples out of many large tars, read by range: no tar is read as a whole, and none needs an index."""

from __future__ import annotations

import hashlib
import io
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

from pipelines.store import object_store
from pipelines.store.ranges import map_in_threads
from pipelines.store.storage import Storage

# Bytes read at one place; more only where a sample is larger.
WINDOW_BYTES = (1 << 18, 1 << 21, 1 << 24)
_BLOCK = tarfile.BLOCKSIZE
# Of a tar with something in it: a header, a block, and two blocks of zeros at the end.
_LEAST_BYTES = 3 * _BLOCK
_MAGIC = re.compile(rb"ustar[\0 ]")
_MAGIC_OFFSET = 257

Sample = dict[str, bytes]


@dataclass(frozen=True)
class Tar:
    """A tar in storage, and its size in bytes."""

    storage: Storage
    name: str
    bytes: int


def random_samples(tars: Sequence[Tar], count: int) -> list[tuple[str, Sample]]:
    """At most so many samples, spread over the tars and over each of them: always the same of the same tars.

    Returns:
        (key, files by extension), sorted by key. Fewer than asked for where there are no more, and none of what is not
        a tar.

    Raises:
        UserError: a store does not answer.
    """
    filled = sorted((tar for tar in tars if tar.bytes > _LEAST_BYTES), key=lambda tar: _hash(tar.name))
    if not filled:
        return []
    places = [(filled[number % len(filled)], number) for number in range(count)]
    windows = list(map_in_threads(lambda place: _samples_near(*place), places))
    chosen: dict[str, Sample] = {}
    # One of each window first; what is missing then comes from all of them.
    for window in windows:
        key = min(window.keys() - chosen.keys(), key=_hash, default=None)
        if key is not None:
            chosen[key] = window[key]
    found = {key: sample for window in windows for key, sample in window.items()}
    for key in sorted(found, key=_hash):
        if len(chosen) >= count:
            break
        chosen.setdefault(key, found[key])
    return sorted(chosen.items())


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def _samples_near(tar: Tar, number: int) -> dict[str, Sample]:
    """The whole samples in a window at a place that follows from the tar's name and the number."""
    place = int(_hash(f"{tar.name} {number}")[:15], 16) / 16**15
    for size in WINDOW_BYTES:
        for start in (int(place * max(tar.bytes - size, 0)) // _BLOCK * _BLOCK, 0):
            if found := _whole_samples(_read(tar, start, size), at_start=start == 0):
                return found
    return {}


def _read(tar: Tar, start: int, size: int) -> bytes:
    store, path = tar.storage.filesystem, tar.storage.path(tar.name)
    try:
        return object_store.attempt(
            f"{tar.storage.url}/{tar.name}",
            lambda: bytes(store.cat_file(path, start=start, end=min(start + size, tar.bytes))),
        )
    except FileNotFoundError:
        return b""


def _whole_samples(data: bytes, *, at_start: bool) -> dict[str, Sample]:
    """Samples all of whose members are in the data; the data begins at a block."""
    begin = 0 if at_start else _first_header(data)
    if begin is None:
        return {}
    groups: list[tuple[str, Sample]] = []
    whole = False
    for name, content in _members(data[begin:]):
        if not name:
            whole = True
            break
        folder, _, base = name.rpartition("/")
        stem, _, extension = base.partition(".")
        key = f"{folder}/{stem}" if folder else stem
        if not groups or groups[-1][0] != key:
            groups.append((key, {}))
        groups[-1][1][extension.lower()] = content
    # The first one may have begun before the window, the last one may go on behind it.
    return dict(groups[0 if at_start else 1 : None if whole else -1])


def _first_header(data: bytes) -> int | None:
    for match in _MAGIC.finditer(data):
        begin = match.start() - _MAGIC_OFFSET
        if begin >= 0 and begin % _BLOCK == 0:
            try:
                tarfile.TarInfo.frombuf(data[begin : begin + _BLOCK], "utf-8", "surrogateescape")
            except tarfile.HeaderError:
                continue
            return begin
    return None


def _members(data: bytes) -> Iterator[tuple[str, bytes]]:
    """Names and contents of the regular files; an empty name at the end-of-archive mark."""
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            for member in tar:
                if member.isreg() and not member.issparse():
                    content = cast(io.BufferedReader, tar.extractfile(member)).read()
                    if len(content) < member.size:
                        return
                    yield member.name, content
            if data[tar.offset : tar.offset + _BLOCK] == tarfile.NUL * _BLOCK:
                yield "", b""
    # Cut off in the middle, or no tar at all.
    except (tarfile.TarError, OSError, ValueError, RecursionError):
        return
