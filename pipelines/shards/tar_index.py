"""The samples of a WebDataset tar: how many there are, and where their files begin."""

from __future__ import annotations

import contextlib
import os
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import overload

import numpy as np

from pipelines.errors import UserError
from pipelines.shards.samples import Sample, Span, samples, span
from pipelines.shards.tar_headers import ENDS_EARLY, TarError, members, require_bytes
from pipelines.store.failures import readable
from pipelines.store.location import Location
from pipelines.store.remembered import remember_by_stamp

_STEP_ROWS = 1000
_REMEMBERED = 1024


@dataclass(frozen=True)
class TarIndex:
    """Number of samples in a tar, and the offset of every thousandth: places that reading can begin at.

    Attributes:
        rows: number of samples.
        marks: offset of the first header of sample 0, 1000, 2000…
    """

    rows: int
    marks: array[int] = field(repr=False)


class TarIndexes(Sequence[TarIndex]):
    """The indexes of many tars in a few arrays, which the workers of a node share."""

    def __init__(self, indexes: Iterable[TarIndex]) -> None:
        rows, ends, marks = array("q"), array("q"), array("q")
        for index in indexes:
            rows.append(index.rows)
            marks += index.marks
            ends.append(len(marks))
        self._rows, self._ends, self._marks = (np.array(each, np.int64) for each in (rows, ends, marks))

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, tar: int) -> TarIndex: ...
    @overload
    def __getitem__(self, tar: slice) -> list[TarIndex]: ...
    def __getitem__(self, tar: int | slice) -> TarIndex | list[TarIndex]:
        if isinstance(tar, slice):
            return [self[each] for each in range(*tar.indices(len(self)))]
        rows, end = int(self._rows[tar]), self._ends[tar]
        number = tar % len(self)
        marks = self._marks[self._ends[number - 1] if number else 0 : end]
        return TarIndex(rows, array("q", marks.tolist()))


def index_tar(url: str) -> TarIndex:
    """Count the samples of a tar; of a remote one with large members, little more than the headers is fetched.

    Raises:
        UserError: missing, truncated or not a tar.
    """
    with _whole(url):
        return _scan(Location.of(url))


@remember_by_stamp(_REMEMBERED)
def _scan(location: Location) -> TarIndex:
    rows, marks = 0, array("q")
    for sample in samples(members(_SparseReads(location)), span):
        if rows % _STEP_ROWS == 0:
            marks.append(sample.header)
        rows += 1
    return TarIndex(rows, marks)


def samples_of(url: str, index: TarIndex, start: int, stop: int) -> list[Sample[Span]]:
    """Return samples start to stop - 1, each file as its offset and size.

    Raises:
        UserError: the tar is not the one that was indexed.
    """
    if start >= stop:
        return []
    mark, skipped = divmod(start, _STEP_ROWS)
    with _whole(url):
        found = samples(members(_SparseReads(Location.of(url)), index.marks[mark]), span)
        wanted = list(islice(found, skipped, skipped + stop - start))
    if len(wanted) != stop - start:
        raise UserError(f"{url} has changed since it was first read: run again")
    return wanted


@contextlib.contextmanager
def _whole(url: str) -> Iterator[None]:
    with readable(url):
        try:
            yield
        except TarError as error:
            raise UserError(f"{url} is truncated or not a tar ({error}): get or write it again") from None


class _SparseReads:
    """Bytes of a tar for small reads at ascending offsets.

    One request serves reads that are near each other; what lies between distant ones is not fetched.
    """

    def __init__(self, location: Location) -> None:
        self.size = location.size()
        self._fetch = _local_reads(location.path) if location.is_local else location.read_range
        # Members may be small: the further the reads go on without a gap, the more is fetched at once.
        self._least, self._most = (2**13, 2**13) if location.is_local else (2**16, 2**22)
        self._ahead = self._least
        self._begin, self._data = 0, b""

    def read(self, offset: int, count: int) -> bytes:
        if offset + count > self.size:
            raise TarError(ENDS_EARLY)
        end = self._begin + len(self._data)
        if not self._begin <= offset <= offset + count <= end:
            near = self._begin <= offset <= end
            self._ahead = min(2 * self._ahead, self._most) if near else self._least
            self._data = self._fetch(offset, min(offset + max(count, self._ahead), self.size))
            self._begin = offset
        return require_bytes(self._data[offset - self._begin : offset - self._begin + count], count)


def _local_reads(path: str) -> Callable[[int, int], bytes]:
    file = open(path, "rb", buffering=0)  # noqa: SIM115 - closed with the reader
    return lambda start, stop: os.pread(file.fileno(), stop - start, start)
