"""WebDataset tars as a source: our own pairs shards, img2dataset's output, or anybody's."""

from __future__ import annotations

import functools
import itertools
import json
from array import array
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipelines.shards.samples import Sample, Span
from pipelines.shards.tar_index import TarIndex, TarIndexes, index_tar, samples_of
from pipelines.stages.pairs.pictures.formats import IN_TARS
from pipelines.stages.pairs.rows import RejectedError, Row, captions_of, extra_names, kind_of, plain, type_of, url_of
from pipelines.stages.pairs.sources.columns import TEXT_NAMES, URL_NAMES, first_of
from pipelines.stages.pairs.sources.fingerprint import digest_files
from pipelines.store.location import Location
from pipelines.store.threads import map_in_threads

if TYPE_CHECKING:
    import pyarrow as pa

_PICTURES = (*IN_TARS, "image")
_CAPTIONS = ("txt", "text", "caption")
MAX_TEXT_BYTES = 2**24
_SAMPLE_ROWS = 100


@dataclass(frozen=True)
class TarSource:
    """The samples of tars, in the order of the tars' names and of the samples in each.

    A caption is the json's `captions` list, else the .txt, else a text field of the json.

    Args:
        urls: the tars, sorted.
        text: the json field that holds the caption, if the recipe names one.
    """

    urls: Sequence[str]
    text: str | None

    @functools.cached_property
    def _indexes(self) -> TarIndexes:
        return TarIndexes(map_in_threads(index_tar, self.urls))

    @functools.cached_property
    def _ends(self) -> array[int]:
        return array("q", itertools.accumulate(index.rows for index in self._indexes))

    @property
    def total(self) -> int:
        return self._ends[-1]

    @property
    def parts(self) -> Sequence[int]:
        return [index.rows for index in self._indexes]

    @property
    def downloads(self) -> bool:
        return False

    @functools.cached_property
    def extra_types(self) -> Mapping[str, pa.DataType]:
        """By the first samples; a later value that does not fit stays in the sample's json alone."""
        rows = self.read(0, min(_SAMPLE_ROWS, self.total))
        names = dict.fromkeys(name for row in rows for name in row.extra)
        types = {name: type_of(kind_of(row.extra.get(name)) for row in rows) for name in names}
        return {name: kind for name, kind in types.items() if kind is not None}

    def digest(self) -> str:
        tars = [Location.of(url) for url in self.urls]
        return digest_files(lambda: ((tar.path.rsplit("/", 1)[-1], tar) for tar in tars))

    def __getstate__(self) -> dict[str, Any]:
        # Found out once, here, instead of once in every worker.
        _ = self.extra_types
        return dict(self.__dict__)

    def read(self, start: int, stop: int) -> list[Row]:
        rows: list[Row] = []
        stop = min(stop, self.total)
        tar = bisect_right(self._ends, start)
        while start < stop:
            begin, end = self._ends[tar - 1] if tar else 0, min(stop, self._ends[tar])
            rows += self._read_tar(self.urls[tar], self._indexes[tar], start - begin, end - begin, start)
            start, tar = end, tar + 1
        return rows

    def _read_tar(self, url: str, index: TarIndex, start: int, stop: int, row: int) -> list[Row]:
        samples = samples_of(url, index, start, stop)
        # The small files of all samples at once: one request a file would be one after the other for a remote tar.
        spans = [sample.first(kind) for sample in samples for kind in (("json",), _CAPTIONS)]
        texts = _read_spans(url, spans)
        pairs = zip(texts[::2], texts[1::2])
        return [self._row(row + i, url, sample, *pair) for i, (sample, pair) in enumerate(zip(samples, pairs))]

    def _row(self, index: int, url: str, sample: Sample[Span], facts: _Text, caption: _Text) -> Row:
        key = plain(sample.key)
        try:
            loaded = None if facts is None else json.loads(_bytes(facts))
            fields = loaded if isinstance(loaded, dict) else {}
            captions = self._captions(fields, caption)
        except RejectedError as error:
            return Row(index=index, captions=(), extra={"tar_key": key}, status=error.status)
        except (ValueError, RecursionError):
            return Row(index=index, captions=(), extra={"tar_key": key}, status="unreadable_caption")
        where = first_of(fields, URL_NAMES)
        link = fields.get(where) if where else None
        # `caption` and `captions` are the text that has just been read.
        carried = extra_names([n for n in fields if n not in (where, "caption", "captions")])
        return Row(
            index=index,
            captions=captions,
            url=url_of(link) if isinstance(link, str) else None,
            load=functools.partial(_load, url, sample.first(_PICTURES)),
            extra={"tar_key": key, **{plain(new): plain(fields[old]) for old, new in carried.items()}},
        )

    def _captions(self, fields: dict[str, Any], caption: _Text) -> tuple[str, ...]:
        if self.text is not None:
            return captions_of(fields.get(self.text))
        if captions := captions_of(fields.get("captions")):
            return captions
        if caption is not None:
            return captions_of(_bytes(caption).decode("utf-8-sig"))
        name = first_of(fields, TEXT_NAMES)
        return captions_of(fields.get(name)) if name else ()


# A file's bytes, why there are none, or None if there is no such file.
_Text = bytes | RejectedError | None


def _bytes(text: bytes | RejectedError) -> bytes:
    if isinstance(text, RejectedError):
        raise text
    return text


def _load(url: str, span: Span | None, max_bytes: int) -> bytes:
    if span is None:
        raise RejectedError("missing_file")
    offset, size = span
    if size is None:
        raise RejectedError("unreadable_file")
    if size > max_bytes:
        raise RejectedError("too_large")
    try:
        data = Location.of(url).read_range(offset, offset + size)
    # Client libraries of stores raise classes of their own.
    except Exception:
        raise RejectedError("unreadable_file") from None
    if len(data) != size:
        raise RejectedError("unreadable_file")
    return data


def _read_spans(url: str, spans: Sequence[Span | None]) -> list[_Text]:
    """Read the small files at these places of a tar; for each that cannot be had, why."""
    wanted = [span for span in spans if span is not None and _refused(span) is None]
    found = iter(Location.of(url).read_ranges([(offset, offset + (size or 0)) for offset, size in wanted]))
    return [None if span is None else _refused(span) or _found(span, next(found)) for span in spans]


def _refused(span: Span) -> RejectedError | None:
    size = span[1]
    if size is None:
        return RejectedError("unreadable_caption")
    return RejectedError("caption_too_long") if size > MAX_TEXT_BYTES else None


def _found(span: Span, data: bytes | None) -> bytes | RejectedError:
    return data if data is not None and len(data) == span[1] else RejectedError("unreadable_file")
