"""Folders of pictures with a text file of the same name beside each."""

from __future__ import annotations

import functools
import posixpath
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
import pyarrow as pa

from pipelines.errors import UserError
from pipelines.stages.pairs.config import IdentifyBy
from pipelines.stages.pairs.pictures.formats import IN_FOLDERS
from pipelines.stages.pairs.rows import RejectedError, Row, captions_of, plain
from pipelines.stages.pairs.sources.files import read_file
from pipelines.stages.pairs.sources.fingerprint import digest_files
from pipelines.stages.pairs.sources.listing import UNLISTED, Listing
from pipelines.store.location import Location
from pipelines.store.threads import map_in_threads

PICTURE_SUFFIXES = tuple(f".{extension}" for extension in IN_FOLDERS)
MAX_CAPTION_BYTES = 2**24
# Status of a row by what is wrong with its caption's file; a picture without one just has an empty caption.
_CAPTION_STATUS = {"missing_file": None, "too_large": "caption_too_long"}


class Names(Sequence[str]):
    """Millions of names in the memory of their bytes; cheap to pickle.

    A tuple of strings would take a hundred bytes more for each, in every worker; arrays the workers of a node share.
    """

    def __init__(self, names: Iterable[str]) -> None:
        encoded = [name.encode("utf-8", "surrogateescape") for name in names]
        self._bytes = np.frombuffer(b"".join(encoded), np.uint8)
        self._ends = np.cumsum([len(name) for name in encoded], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        end = self._ends[index]
        number = index % len(self)
        name = self._bytes[self._ends[number - 1] if number else 0 : end].tobytes()
        return name.decode("utf-8", "surrogateescape")


@dataclass(frozen=True)
class FolderSource:
    """`a/dog.jpg` with its caption in `a/dog.txt`, for all pictures at any depth, in the order of their paths.

    The text file is one caption, whole and unchanged but for a byte order mark.

    Args:
        url: the folder.
        names: paths of the pictures relative to it, sorted.
    """

    url: str
    names: Sequence[str]

    @property
    def total(self) -> int:
        return len(self.names)

    @property
    def parts(self) -> Sequence[int]:
        return [self.total]

    @property
    def downloads(self) -> bool:
        return False

    @property
    def extra_types(self) -> Mapping[str, pa.DataType]:
        return {"file": pa.string()}

    def digest(self, listing: Listing = UNLISTED, identify_by: IdentifyBy = "contents") -> str:
        folder = Location.of(self.url)
        names = (n for name in self.names for n in (name, _caption_name(name)))
        return digest_files(self.url, ((name, folder / name) for name in names), listing, identify_by)

    def read(self, start: int, stop: int) -> list[Row]:
        folder = Location.of(self.url)
        read = functools.partial(self._row, folder)
        indexes = range(start, min(stop, self.total))
        return list(map(read, indexes) if folder.is_local else map_in_threads(read, indexes))

    def _row(self, folder: Location, index: int) -> Row:
        name = self.names[index]
        status: str | None = None
        caption = ""
        try:
            caption = read_file(folder / _caption_name(name), MAX_CAPTION_BYTES).decode("utf-8-sig")
        except RejectedError as error:
            status = _CAPTION_STATUS.get(error.status, "unreadable_caption")
        except UnicodeDecodeError:
            status = "unreadable_caption"
        load = functools.partial(read_file, folder / name)
        return Row(index=index, captions=captions_of(caption), load=load, extra={"file": plain(name)}, status=status)


def open_folder(url: str, paths: list[str], *, needs_text: bool = True) -> FolderSource:
    """Find the pictures among the files of a folder.

    Args:
        url: the folder.
        paths: its files.
        needs_text: whether a folder without captions is refused.

    Raises:
        UserError: there is no picture, or none with a text file beside it although they are needed.
    """
    base = Location.of(url).path.rstrip("/") + "/"
    names = sorted(path.removeprefix(base) for path in paths)
    pictures = tuple(name for name in names if name.lower().endswith(PICTURE_SUFFIXES))
    if not pictures:
        raise UserError(f"{url} holds no pictures ({', '.join(PICTURE_SUFFIXES)}), no tars and no table")
    if needs_text and not {_caption_name(name) for name in pictures} & set(names):
        raise UserError(
            f"{url} holds {len(pictures)} pictures but no captions: put a .txt beside each or a metadata.jsonl "
            "(file_name, text) in the folder, point `pairs.source` at a table, or set pairs.captions=optional if none "
            "are needed"
        )
    return FolderSource(url=url, names=Names(pictures))


def _caption_name(name: str) -> str:
    return posixpath.splitext(name)[0] + ".txt"
