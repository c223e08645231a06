"""Finding out what `pairs.source` points at."""

from __future__ import annotations

import functools
import posixpath
import re
from typing import TYPE_CHECKING

from pipelines.errors import UserError
from pipelines.stages.pairs.config import PairsConfig
from pipelines.stages.pairs.rows import Source
from pipelines.stages.pairs.sources.folders import PICTURE_SUFFIXES, open_folder
from pipelines.stages.pairs.sources.tables import TABLE_SUFFIXES, TableSource
from pipelines.stages.pairs.sources.tars import TarSource
from pipelines.store.ranges import filesystem_of, is_local, readable

if TYPE_CHECKING:
    import fsspec

METADATA_NAMES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
_CHANGE = "say `--set pairs.source=PATH`"


def open_source(config: PairsConfig) -> Source:
    """The source that a recipe names; nothing but listings and the head of a table is read.

    Raises:
        UserError: nothing is there, or nothing that this stage reads.
    """
    try:
        filesystem, path = filesystem_of(config.source)
    except (ValueError, ImportError) as error:
        raise UserError(f"no file system for {config.source}: {error}; {_CHANGE}") from None
    full = functools.partial(_with_protocol, filesystem)
    with readable(config.source):
        if filesystem.isdir(path):
            return _open_folder(filesystem, path, config)
        if filesystem.exists(path):
            paths = [path]
        else:
            found = filesystem.glob(path) if set("*?[") & set(path) else []
            paths = sorted(p for p in found if not _is_leftover(p[len(_fixed_part(path)) :]))
    if not paths:
        raise UserError(f"no file, folder or match at {config.source}: {_CHANGE}")
    tars, tables = _ending(paths, (".tar",)), _ending(paths, TABLE_SUFFIXES)
    if tars and config.format in ("auto", "webdataset"):
        return TarSource(tuple(map(full, tars)), config.columns.text)
    if tables and config.format in ("auto", "table"):
        return _table(list(map(full, tables)), config)
    raise UserError(
        f"{config.source} is no source of format {config.format}: a table ({' '.join(TABLE_SUFFIXES)}), "
        f".tar files or a folder is needed; {_CHANGE}"
    )


def _open_folder(filesystem: fsspec.AbstractFileSystem, path: str, config: PairsConfig) -> Source:
    paths = sorted(p for p in filesystem.find(path) if not _is_leftover(p[len(path.rstrip("/")) :]))
    full = functools.partial(_with_protocol, filesystem)
    direct = [p for p in paths if posixpath.dirname(p) == path.rstrip("/")]
    metadata = [p for name in METADATA_NAMES for p in direct if posixpath.basename(p) == name]
    tars, tables = _ending(paths, (".tar",)), _ending(paths, TABLE_SUFFIXES)
    wanted = config.format
    if metadata and wanted in ("auto", "table"):
        return _table([full(metadata[0])], config)
    # Before tables: img2dataset leaves a .parquet beside each tar.
    if tars and wanted in ("auto", "webdataset"):
        return TarSource(tuple(map(full, tars)), config.columns.text)
    pictures = _ending(paths, PICTURE_SUFFIXES)
    if tables and (wanted == "table" or (wanted == "auto" and not pictures)):
        return _table(list(map(full, tables)), config)
    if wanted in ("auto", "folder"):
        return open_folder(full(path), paths)
    raise UserError(f"{config.source} holds nothing of format {wanted}: {_CHANGE} or pairs.format=auto")


def _table(urls: list[str], config: PairsConfig) -> TableSource:
    suffixes = {posixpath.splitext(url)[1].lower() for url in urls}
    if len(suffixes) > 1:
        raise UserError(f"{config.source} holds tables of several kinds ({', '.join(sorted(suffixes))}): name one")
    return TableSource(urls=tuple(urls), wanted=config.columns, pictures=urls[0].rsplit("/", 1)[0])


def _fixed_part(pattern: str) -> str:
    """The folders of a glob pattern that are written out."""
    return re.split(r"[*?\[]", pattern, maxsplit=1)[0].rpartition("/")[0]


def _is_leftover(path: str) -> bool:
    """What file managers, unfinished copies and unfinished jobs of Spark leave behind in a data set's folder."""
    return "/." in path or "/_temporary/" in path


def _ending(paths: list[str], suffixes: tuple[str, ...]) -> list[str]:
    return [path for path in paths if path.lower().endswith(suffixes)]


def _with_protocol(filesystem: fsspec.AbstractFileSystem, path: str) -> str:
    return path if is_local(filesystem) else str(filesystem.unstrip_protocol(path))
