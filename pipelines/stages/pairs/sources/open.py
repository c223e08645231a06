"""Open whatever `pairs.source` points at: a table, a folder, tars; by path, URL, glob or brace pattern."""

from __future__ import annotations

import itertools
import posixpath
import re
from collections.abc import Mapping

from braceexpand import braceexpand

from pipelines.errors import UserError
from pipelines.stages.pairs.config import PairsConfig
from pipelines.stages.pairs.rows import Source
from pipelines.stages.pairs.sources.folders import PICTURE_SUFFIXES, Names, open_folder
from pipelines.stages.pairs.sources.listing import Listing
from pipelines.stages.pairs.sources.tables import TABLE_SUFFIXES, TableSource
from pipelines.stages.pairs.sources.tars import TarSource
from pipelines.store.failures import readable
from pipelines.store.location import FileFacts, Location
from pipelines.store.threads import map_in_threads

METADATA_NAMES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
_CHANGE = "say `--set pairs.source=PATH`"
# `{0..9999999999}` is a slip of the pen, not a data set.
_MOST_EXPANDED = 1_000_000

# Files by their path in the file system.
_Files = Mapping[str, FileFacts]


def open_source(config: PairsConfig) -> Source:
    """Open the source that a recipe names; nothing but listings and the head of a table is read.

    Raises:
        UserError: nothing is there, or nothing that this stage reads.
    """
    return open_listed(config)[0]


def open_listed(config: PairsConfig) -> tuple[Source, Listing]:
    """Open the source that a recipe names; also return what was learnt of its files.

    Raises:
        UserError: nothing is there, or nothing that this stage reads.
    """
    try:
        location = Location.of(config.source)
    except UserError as error:
        raise UserError(f"{error}; {_CHANGE}") from None
    with readable(config.source):
        is_folder = location.is_folder()
        files = location.files_below() if is_folder else _named(location, config)
    if is_folder:
        start = len(location.path.rstrip("/"))
        paths = sorted(path for path in files if not _is_leftover(path[start:]))
        return _open_folder(location, paths, config), Listing(files, location.path)
    if not files:
        raise UserError(f"no file, folder or match at {config.source}: {_CHANGE}")
    return _open_files(location, sorted(files), config), Listing(files)


def _named(location: Location, config: PairsConfig) -> _Files:
    """Find the files that a path, a glob or a brace pattern names; a file whose name looks like a pattern wins."""
    if (facts := location.facts()) is not None:
        return {location.path: facts}
    if not {"{", "}"} & set(location.path):
        return _matches(location)
    patterns = _expand(config.source)
    found = list(map_in_threads(lambda pattern: _matches(Location.of(pattern)), patterns))
    missing = [pattern for pattern, listing in zip(patterns, found, strict=True) if not listing]
    # All or nothing: {000000..000123} means 124 files, and three missing ones would go unnoticed.
    if missing:
        raise UserError(
            f"{config.source} stands for {len(patterns)} files or patterns, of which {len(missing)} match nothing, "
            f"the first being {missing[0]}: {_CHANGE}"
        )
    return {path: facts for listing in found for path, facts in listing.items()}


def _expand(pattern: str) -> list[str]:
    # With braceexpand, as webdataset does: importing webdataset itself would import torch.
    try:
        expanded = list(itertools.islice(braceexpand(pattern), _MOST_EXPANDED + 1))
    except ValueError:
        raise UserError(f"{pattern} has braces that do not match: close them, or {_CHANGE}") from None
    if len(expanded) > _MOST_EXPANDED:
        raise UserError(f"{pattern} stands for more than {_MOST_EXPANDED} files: {_CHANGE}")
    return expanded


def _matches(location: Location) -> _Files:
    path = location.path
    if not set("*?[") & set(path):
        facts = location.facts()
        return {} if facts is None else {path: facts}
    start = len(_fixed_part(path))
    return {found: facts for found, facts in location.matches().items() if not _is_leftover(found[start:])}


def _open_files(location: Location, paths: list[str], config: PairsConfig) -> Source:
    tars, tables = _ending(paths, (".tar",)), _ending(paths, TABLE_SUFFIXES)
    if tars and config.format in ("auto", "webdataset"):
        return TarSource(_urls(location, tars), config.columns.text)
    if tables and config.format in ("auto", "table"):
        return _table(_urls(location, tables), config)
    raise UserError(
        f"{config.source} is no source of format {config.format}: a table ({' '.join(TABLE_SUFFIXES)}), "
        f".tar files or a folder is needed; {_CHANGE}"
    )


def _open_folder(folder: Location, paths: list[str], config: PairsConfig) -> Source:
    direct = [path for path in paths if posixpath.dirname(path) == folder.path.rstrip("/")]
    metadata = [path for name in METADATA_NAMES for path in direct if posixpath.basename(path) == name]
    tars, tables = _ending(paths, (".tar",)), _ending(paths, TABLE_SUFFIXES)
    wanted = config.format
    if metadata and wanted in ("auto", "table"):
        return _table(_urls(folder, metadata[:1]), config)
    # Before tables: img2dataset leaves a .parquet beside each tar.
    if tars and wanted in ("auto", "webdataset"):
        return TarSource(_urls(folder, tars), config.columns.text)
    pictures = _ending(paths, PICTURE_SUFFIXES)
    if tables and (wanted == "table" or (wanted == "auto" and not pictures)):
        return _table(_urls(folder, tables), config)
    if wanted in ("auto", "folder"):
        return open_folder(folder.url, paths, needs_text=config.captions == "required")
    raise UserError(f"{config.source} holds nothing of format {wanted}: {_CHANGE} or pairs.format=auto")


def _table(urls: Names, config: PairsConfig) -> TableSource:
    suffixes = {posixpath.splitext(url)[1].lower() for url in urls}
    if len(suffixes) > 1:
        raise UserError(f"{config.source} holds tables of several kinds ({', '.join(sorted(suffixes))}): name one")
    return TableSource(
        urls=urls,
        wanted=config.columns,
        pictures=urls[0].rsplit("/", 1)[0],
        needs_text=config.captions == "required",
    )


def _urls(location: Location, paths: list[str]) -> Names:
    return Names(Location(location.filesystem, path).url for path in paths)


def _fixed_part(pattern: str) -> str:
    """Return the folders of a glob pattern that are written out."""
    return re.split(r"[*?\[]", pattern, maxsplit=1)[0].rpartition("/")[0]


def _is_leftover(path: str) -> bool:
    """Tell what file managers, unfinished copies and unfinished jobs of Spark leave behind in a data set's folder."""
    return "/." in path or "/_temporary/" in path


def _ending(paths: list[str], suffixes: tuple[str, ...]) -> list[str]:
    return [path for path in paths if path.lower().endswith(suffixes)]
