"""The samples of a WebDataset tar: how many there are, and where their files begin."""

from __future__ import annotations

import contextlib
import functools
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice

from pipelines.errors import UserError
from pipelines.shards.tar_headers import HeaderReader, TarError, members
from pipelines.store.ranges import readable, stamp

_STEP_ROWS = 1000


@dataclass(frozen=True)
class Sample:
    """The files of one sample: (offset, bytes) by extension; bytes is None for files that are not read."""

    key: str
    header: int
    spans: dict[str, tuple[int, int | None]] = field(default_factory=dict)

    def first(self, extensions: tuple[str, ...]) -> tuple[int, int | None] | None:
        """The file with the first of these extensions; `left.jpg` counts where there is no `jpg`."""
        exact = next((self.spans[e] for e in extensions if e in self.spans), None)
        if exact is not None:
            return exact
        return next((span for e, span in self.spans.items() if e.rpartition(".")[2] in extensions), None)


@dataclass(frozen=True)
class TarIndex:
    """How many samples a tar holds, and the byte at which each of the first, the thousand-first… begins."""

    rows: int
    marks: array[int] = field(repr=False)


def index_tar(url: str) -> TarIndex:
    """Count the samples of a tar; of a remote one with large members, little more than the headers is fetched.

    Raises:
        UserError: missing, truncated or not a tar.
    """
    # What is remembered of a file is known to be of that file only by its stamp.
    return _scan(url) if stamp(url) is None else _remembered(url, stamp(url))


@functools.lru_cache(maxsize=1024)
def _remembered(url: str, stamp: tuple[int, int] | None) -> TarIndex:
    return _scan(url)


def _scan(url: str) -> TarIndex:
    rows, marks = 0, array("q")
    with _whole(url):
        for sample in _samples(url, 0):
            if rows % _STEP_ROWS == 0:
                marks.append(sample.header)
            rows += 1
    return TarIndex(rows, marks)


def samples_of(url: str, index: TarIndex, start: int, stop: int) -> list[Sample]:
    """Samples start to stop - 1.

    Raises:
        UserError: the tar is not the one that was indexed.
    """
    if start >= stop:
        return []
    mark, skipped = divmod(start, _STEP_ROWS)
    with _whole(url):
        found = list(islice(_samples(url, index.marks[mark]), skipped, skipped + stop - start))
    if len(found) != stop - start:
        raise UserError(f"{url} has changed since it was first read: run again")
    return found


def _samples(url: str, offset: int) -> Iterator[Sample]:
    sample: Sample | None = None
    for member in members(HeaderReader(url), offset):
        folder, _, name = member.name.rpartition("/")
        stem, dot, extension = name.partition(".")
        # Without a stem it is what file managers leave behind (`._0001.jpg`), without an extension no part of a sample.
        if not stem or not dot:
            continue
        key = f"{folder}/{stem}" if folder else stem
        extension = extension.lower()
        if sample is None or sample.key != key or extension in sample.spans:
            if sample is not None:
                yield sample
            sample = Sample(key, member.header)
        sample.spans[extension] = (member.offset, member.size)
    if sample is not None:
        yield sample


@contextlib.contextmanager
def _whole(url: str) -> Iterator[None]:
    with readable(url):
        try:
            yield
        except TarError as error:
            raise UserError(f"{url} is truncated or not a tar ({error}): get or write it again") from None
