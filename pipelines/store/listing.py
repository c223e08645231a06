"""Names and sizes of a folder's entries in an object store, page by page and many pages at once.

A store lists a thousand names a request, each page after the one before it. Shards have numbers for names, so where the
pages of a large folder begin can be worked out from the first one: the others are asked for side by side.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import count
from typing import NamedTuple

from pipelines.store.filesystems import FileSystem, is_local

# Pages that are asked for at once; a store's connections are shared with whatever else goes on.
PAGES_AT_ONCE = 32
FOLDER = -1

_NUMBER = re.compile(r"\d+")


def list_folder(store: FileSystem, path: str) -> dict[str, int]:
    """Return the bytes of every file of a folder by name, and FOLDER for each folder in it, by one call of the store.

    Raises:
        FileNotFoundError: there is no folder.
    """
    if is_local(store):
        with os.scandir(path) as entries:
            return {entry.name: size for entry in entries if (size := _local_size(entry)) is not None}
    entries = store.ls(path, detail=True)
    return {
        str(each["name"]).rstrip("/").rsplit("/", 1)[-1]: int(each["size"] or 0) if each["type"] == "file" else FOLDER
        for each in entries
    }


def _local_size(entry: os.DirEntry[str]) -> int | None:
    try:
        return FOLDER if entry.is_dir() else entry.stat().st_size
    except FileNotFoundError:
        # Removed since, as the temporary files of other writers are.
        return None


class _Page(NamedTuple):
    """A page of a listing. `sizes`: bytes by name, FOLDER for folders; `more`: whether names follow."""

    sizes: dict[str, int]
    more: bool

    @property
    def last(self) -> str:
        """The place in the order of keys after which the next page begins."""
        return max(_place(name, size) for name, size in self.sizes.items())


# Lists the names after a given place: one page.
_Ask = Callable[[str], _Page]


class _Numbers(NamedTuple):
    """Numbers that the names of a page begin with: the last one, how many digits each has, and how many fit a page."""

    last: int
    width: int
    a_page: int


def list_s3(store: FileSystem, path: str, attempt: Callable[[Callable[[], _Page]], _Page]) -> dict[str, int]:
    """Return the bytes of every file of a folder by name, and FOLDER for each folder in it; none if it is not there.

    Args:
        store: an s3fs file system.
        path: the folder.
        attempt: calls a request, again if it fails for a while.
    """

    def ask(after: str) -> _Page:
        return attempt(partial(_ask, store, path, after))

    first = ask("")
    found = dict(first.sizes)
    if first.more and (numbers := _numbers_of(first)) is not None:
        _list_numbers(ask, numbers, found)
        # What is no number comes after all numbers: a few names, or folders.
        first = _Page(found, True)
    for page in _follow(ask, first):
        found |= page.sizes
    return found


def _list_numbers(ask: _Ask, numbers: _Numbers, found: dict[str, int]) -> None:
    """Add the names from a page's last number on, as far as they are numbers, many pages at once."""
    begin = numbers.last
    with ThreadPoolExecutor(PAGES_AT_ONCE) as threads:
        # Twice as many each time: where the numbers end is not known.
        for turn in count():
            wave = min(4 << turn, PAGES_AT_ONCE)
            # `000500` comes just before `000500.tar`.
            starts = [f"{begin + index * numbers.a_page:0{numbers.width}d}" for index in range(wave + 1)]
            if len(starts[-1]) > numbers.width:
                return
            before = len(found)
            ranges = list(threads.map(partial(_list_range, ask), starts, starts[1:]))
            for sizes, _ in ranges:
                found |= sizes
            ended = ranges[-1][1]
            # Nor across a gap: numbers of another width may follow, far away.
            if ended or len(found) == before:
                return
            begin += wave * numbers.a_page


def _list_range(ask: _Ask, start: str, stop: str) -> tuple[dict[str, int], bool]:
    """List the names from `start` up to `stop`; also tell whether no number follows."""
    page = ask(start)
    sizes = dict(page.sizes)
    beyond = [name for name in sizes if name >= stop]
    if not beyond:
        for following in _follow(ask, page):
            sizes |= following.sizes
            if beyond := [name for name in following.sizes if name >= stop]:
                break
    inside = {name: size for name, size in sizes.items() if name < stop}
    return inside, not beyond or not _NUMBER.match(min(beyond))


def _follow(ask: _Ask, page: _Page) -> Iterator[_Page]:
    """Yield the pages after a page, one after the other."""
    while page.more and page.sizes:
        page = ask(page.last)
        yield page


def _numbers_of(page: _Page) -> _Numbers | None:
    """Return the numbers that the names of a page begin with; None if it does not end with numbers of one width."""
    numbers = [match[0] for name in sorted(page.sizes) if (match := _NUMBER.match(name))]
    if not numbers or not _NUMBER.match(max(page.sizes)) or len({len(number) for number in numbers}) > 1:
        return None
    a_page = int(numbers[-1]) - int(numbers[0])
    return _Numbers(int(numbers[-1]), len(numbers[-1]), a_page) if a_page else None


def _place(name: str, size: int) -> str:
    """Return the place after a name, and for a folder after everything in it."""
    return f"{name}/\U0010ffff" if size == FOLDER else name


def _ask(store: FileSystem, path: str, after: str) -> _Page:
    bucket, key, _ = store.split_path(path)
    prefix = f"{key}/" if key else ""
    options = {"StartAfter": prefix + after} if after else {}
    answer = store.call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix, Delimiter="/", **options)
    sizes = {each["Key"][len(prefix) :]: int(each["Size"]) for each in answer.get("Contents", [])}
    # An object of the folder's own name, as some consoles make.
    sizes.pop("", None)
    folders = [each["Prefix"][len(prefix) : -1] for each in answer.get("CommonPrefixes", [])]
    return _Page(sizes | dict.fromkeys(folders, FOLDER), bool(answer.get("IsTruncated")))
