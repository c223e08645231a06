"""A folder of pictures with a text file of the same name beside each."""

from __future__ import annotations

import functools
import posixpath
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import fsspec

from pipelines.errors import UserError
from pipelines.pairs.fingerprint import digest_files
from pipelines.pairs.rows import RejectedError, Row, captions_of, read_file

if TYPE_CHECKING:
    import pyarrow as pa

PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".jp2", ".ppm")
MAX_CAPTION_BYTES = 2**20


@dataclass(frozen=True)
class FolderSource:
    """`a/dog.jpg` with its caption in `a/dog.txt`, for all pictures at any depth, in the order of their paths.

    The text file is one caption, whole and unchanged but for a byte order mark.

    Args:
        url: of the folder.
        names: paths of the pictures, relative to it, sorted.
    """

    url: str
    names: tuple[str, ...]

    @property
    def total(self) -> int:
        return len(self.names)

    @property
    def downloads(self) -> bool:
        return False

    @property
    def extra_types(self) -> Mapping[str, pa.DataType]:
        import pyarrow as pa

        return {"file": pa.string()}

    def digest(self) -> str:
        filesystem, base = fsspec.core.url_to_fs(self.url)
        names = [n for name in self.names for n in (name, _caption_name(name))]
        return digest_files(filesystem, [(name, posixpath.join(base, name)) for name in names])

    def read(self, start: int, stop: int) -> list[Row]:
        return [self._row(index) for index in range(start, min(stop, self.total))]

    def _row(self, index: int) -> Row:
        name = self.names[index]
        filesystem, base = fsspec.core.url_to_fs(self.url)
        status: str | None = None
        caption = ""
        try:
            path = posixpath.join(base, _caption_name(name))
            caption = read_file(filesystem, path, MAX_CAPTION_BYTES).decode("utf-8-sig")
        except RejectedError as error:
            status = None if error.status == "missing_file" else "unreadable_caption"
        except UnicodeDecodeError:
            status = "unreadable_caption"
        load = functools.partial(read_file, filesystem, posixpath.join(base, name))
        return Row(index=index, captions=captions_of(caption), load=load, extra={"file": name}, status=status)


def open_folder(url: str, paths: list[str]) -> FolderSource:
    """The pictures among the files of a folder.

    Raises:
        UserError: no picture, or none with a text file beside it.
    """
    base = fsspec.core.url_to_fs(url)[1].rstrip("/") + "/"
    names = sorted(path.removeprefix(base) for path in paths)
    pictures = tuple(name for name in names if name.lower().endswith(PICTURE_SUFFIXES))
    if not pictures:
        raise UserError(f"{url} holds no pictures ({', '.join(PICTURE_SUFFIXES)}), no tars and no table")
    if not {_caption_name(name) for name in pictures} & set(names):
        raise UserError(
            f"{url} holds {len(pictures)} pictures but no captions: put a .txt beside each or a metadata.jsonl "
            "(file_name, text) in the folder, or point `pairs.source` at a table"
        )
    return FolderSource(url=url, names=pictures)


def _caption_name(name: str) -> str:
    return posixpath.splitext(name)[0] + ".txt"
