"""A few samples out of many large tars, read by range: no tar is read as a whole, and none needs an index."""

from __future__ import annotations

import contextlib
import hashlib
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from pipelines.shards.samples import contents, samples
from pipelines.shards.tar_headers import BLOCK, FileBytes, TarError, has_checksum, members
from pipelines.store.failures import MissingFileError
from pipelines.store.storage import Storage
from pipelines.store.threads import map_in_threads

# Bytes read at one place; more only if a sample is larger.
WINDOW_BYTES = (1 << 18, 1 << 21, 1 << 24)
# Of a tar with something in it: a header, a block, and two blocks of zeros at the end.
_LEAST_BYTES = 3 * BLOCK
_MAGIC = re.compile(rb"ustar[\0 ]")
_MAGIC_OFFSET = 257

Files = dict[str, bytes]


@dataclass(frozen=True)
class Tar:
    """A tar in storage, and its size in bytes."""

    storage: Storage
    name: str
    bytes: int


def random_samples(tars: Sequence[Tar], count: int) -> list[tuple[str, Files]]:
    """Draw samples, spread over the tars and over each of them: always the same of the same tars.

    Returns:
        At most `count` times (key, files by extension), sorted by key: fewer if there are no more, and none of what is
        not a tar.

    Raises:
        UserError: a store does not answer.
    """
    filled = sorted((tar for tar in tars if tar.bytes > _LEAST_BYTES), key=lambda tar: _hash(tar.name))
    if not filled:
        return []
    places = [(filled[number % len(filled)], number) for number in range(count)]
    windows = list(map_in_threads(lambda place: _samples_near(*place), places))
    chosen: dict[str, Files] = {}
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


def _samples_near(tar: Tar, number: int) -> dict[str, Files]:
    """Return the whole samples in a window at a place that follows from the tar's name and the number."""
    place = int(_hash(f"{tar.name} {number}")[:15], 16) / 16**15
    # A window that lies in the middle of one large member holds no header: then the tar's start, then larger windows.
    for size in WINDOW_BYTES:
        for start in (int(place * max(tar.bytes - size, 0)) // BLOCK * BLOCK, 0):
            if found := _whole_samples(_read(tar, start, size), at_start=start == 0):
                return found
    return {}


def _read(tar: Tar, start: int, size: int) -> bytes:
    # Work that is not published yet may be removed at any moment.
    with contextlib.suppress(MissingFileError):
        return tar.storage.read_range(tar.name, start, min(start + size, tar.bytes))
    return b""


def _whole_samples(data: bytes, *, at_start: bool) -> dict[str, Files]:
    """Return the samples all of whose members are in the data; the data begins at a block."""
    begin = 0 if at_start else _first_header(data)
    if begin is None:
        return {}
    window = FileBytes(io.BytesIO(data))
    stored = (member for member in members(window, begin) if member.size is not None)
    found = []
    # The window mostly ends in the middle of a member, and with it the last sample, which then is not given out.
    with contextlib.suppress(TarError):
        for sample in samples(stored, partial(contents, window)):
            found.append((sample.key, sample.files))
    # The first one may have begun before the window.
    return dict(found if at_start else found[1:])


def _first_header(data: bytes) -> int | None:
    """Return the offset of the first block that is a header: by its magic, and by its checksum, since a picture may
    hold the magic too.
    """
    for match in _MAGIC.finditer(data):
        begin = match.start() - _MAGIC_OFFSET
        if begin >= 0 and begin % BLOCK == 0:
            with contextlib.suppress(TarError):
                if has_checksum(data[begin : begin + BLOCK]):
                    return begin
    return None
