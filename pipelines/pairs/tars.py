"""WebDataset tars as a source: our own pairs shards, img2dataset's output, or anybody's."""

from __future__ import annotations

import functools
import itertools
import json
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import fsspec

from pipelines.errors import UserError
from pipelines.pairs.columns import TEXT_NAMES, URL_NAMES
from pipelines.pairs.fingerprint import digest_files, stamp
from pipelines.pairs.rows import RejectedError, Row, captions_of, extra_names, infer_type, plain
from pipelines.records import require_end_of_archive

if TYPE_CHECKING:
    import pyarrow as pa

_PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "image")
_CAPTIONS = ("txt", "text", "caption")
MAX_TEXT_BYTES = 2**20
_SAMPLE_ROWS = 100


@dataclass(frozen=True)
class _Sample:
    """Where the files of one sample are in a tar: (offset, bytes) by extension."""

    key: str
    spans: dict[str, tuple[int, int]] = field(default_factory=dict)

    def first(self, extensions: tuple[str, ...]) -> tuple[int, int] | None:
        return next((self.spans[e] for e in extensions if e in self.spans), None)


@dataclass(frozen=True)
class TarSource:
    """The samples of tars, in the order of the tars' names and of the samples in each.

    A caption is the json's `captions` list, else the .txt, else a text field of the json.

    Args:
        urls: of the tars, sorted.
        text: the json field that holds the caption, where the recipe names one.
    """

    urls: tuple[str, ...]
    text: str | None

    @functools.cached_property
    def _row_counts(self) -> tuple[int, ...]:
        return tuple(len(_index(url)) for url in self.urls)

    @property
    def total(self) -> int:
        return sum(self._row_counts)

    @property
    def downloads(self) -> bool:
        return False

    @functools.cached_property
    def extra_types(self) -> Mapping[str, pa.DataType]:
        """By the first samples; a later value that does not fit stays in the sample's json alone."""
        rows = self.read(0, min(_SAMPLE_ROWS, self.total))
        names = dict.fromkeys(name for row in rows for name in row.extra)
        types = {name: infer_type([row.extra.get(name) for row in rows]) for name in names}
        return {name: kind for name, kind in types.items() if kind is not None}

    def digest(self) -> str:
        filesystem = fsspec.core.url_to_fs(self.urls[0])[0]
        paths = [fsspec.core.url_to_fs(url)[1] for url in self.urls]
        return digest_files(filesystem, [(path.rsplit("/", 1)[-1], path) for path in paths])

    def read(self, start: int, stop: int) -> list[Row]:
        rows: list[Row] = []
        ends = itertools.accumulate(self._row_counts)
        for url, count, end in zip(self.urls, self._row_counts, ends):
            begin = end - count
            samples = _index(url)[max(start - begin, 0) : max(min(stop - begin, count), 0)]
            rows += [self._row(index, url, sample) for index, sample in enumerate(samples, max(start, begin))]
        return rows

    def _row(self, index: int, url: str, sample: _Sample) -> Row:
        fields: dict[str, Any] = {}
        try:
            if span := sample.first(("json",)):
                loaded = json.loads(_read_span(url, *span, MAX_TEXT_BYTES))
                fields = loaded if isinstance(loaded, dict) else {}
            captions = self._captions(url, sample, fields)
        except (RejectedError, ValueError, RecursionError):
            return Row(index=index, captions=(), extra={"tar_key": sample.key}, status="unreadable_caption")
        lowered = {name.lower(): name for name in fields}
        where = next((lowered[name] for name in URL_NAMES if name in lowered), None)
        link = fields.get(where) if where else None
        # `caption` and `captions` are the text that has just been read.
        carried = extra_names([n for n in fields if n not in (where, "caption", "captions")])
        picture = sample.first(_PICTURES)

        def load(max_bytes: int) -> bytes:
            if picture is None:
                raise RejectedError("missing_file")
            return _read_span(url, *picture, max_bytes)

        return Row(
            index=index,
            captions=captions,
            url=plain(link) if isinstance(link, str) and link else None,
            load=load,
            extra={"tar_key": sample.key, **{new: plain(fields[old]) for old, new in carried.items()}},
        )

    def _captions(self, url: str, sample: _Sample, fields: dict[str, Any]) -> tuple[str, ...]:
        if self.text is not None:
            return captions_of(fields.get(self.text))
        if captions := captions_of(fields.get("captions")):
            return captions
        if span := sample.first(_CAPTIONS):
            return captions_of(_read_span(url, *span, MAX_TEXT_BYTES).decode("utf-8-sig"))
        lowered = {name.lower(): name for name in fields}
        name = next((lowered[name] for name in TEXT_NAMES if name in lowered), None)
        return captions_of(fields.get(name)) if name else ()


def _index(url: str) -> list[_Sample]:
    return _read_index(url, stamp(url))


# A tar's members are found by reading every header once; a worker makes several shards of one tar.
@functools.lru_cache(maxsize=4)
def _read_index(url: str, stamp: tuple[int, int] | None) -> list[_Sample]:
    samples: list[_Sample] = []
    try:
        with fsspec.open(url, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if not member.isreg():
                    continue
                folder, _, name = member.name.rpartition("/")
                stem, _, extension = name.partition(".")
                key = f"{folder}/{stem}" if folder else stem
                if not samples or samples[-1].key != key:
                    samples.append(_Sample(key))
                samples[-1].spans[extension.lower()] = (member.offset_data, member.size)
            require_end_of_archive(tar, file)
    except FileNotFoundError:
        raise UserError(f"{url} is missing") from None
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise UserError(f"{url} is truncated or not a tar ({error}): get or write it again") from None
    return samples


def _read_span(url: str, offset: int, size: int, max_bytes: int) -> bytes:
    if size > max_bytes:
        raise RejectedError("too_large")
    try:
        with fsspec.open(url, "rb") as file:
            file.seek(offset)
            return bytes(file.read(size))
    except OSError:
        raise RejectedError("unreadable_file") from None
