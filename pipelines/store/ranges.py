"""Byte ranges of files that are not ours: tables, tars and folders of a source."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import fsspec
import contextlib
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import fsspec

from pipelines.errors import UserError

T = TypeVar("T")

R = TypeVar("R")

_THREADS = 16


def filesystem_of(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of a URL and the path in it. Listings are never remembered: other processes write too."""
    options = {} if "://" not in url or url.startswith("file://") else {"use_listings_cache": False}
    filesystem, path = fsspec.core.url_to_fs(url, **options)
    return filesystem, str(path)


def is_local(filesystem: fsspec.AbstractFileSystem) -> bool:
    return "file" in filesystem.protocol


@contextlib.contextmanager
def readable(url: str) -> Iterator[None]:
    """Turn what goes wrong while a file is read into one line.

    Raises:
        UserError: missing, or not readable; with the store's reason.
    """
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{url} is missing") from None
    # Client libraries of stores raise classes of their own.
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(f"{url} cannot be read ({reason}): check its address, access to it and the network") from None


def read_range(url: str, start: int, stop: int) -> bytes:
    """Bytes start to stop - 1 of a file, in one request where the store is remote; fewer at its end."""
    filesystem, path = filesystem_of(url)
    if not is_local(filesystem):
        return bytes(filesystem.cat_file(path, start=start, end=stop)) if start < stop else b""
    with open(path, "rb", buffering=0) as file:
        file.seek(start)
        return file.read(stop - start)


def map_in_threads(function: Callable[[T], R], items: Iterable[T], threads: int = _THREADS) -> Iterator[R]:
    """Results in the order of the items, a bounded number of calls ahead of the reader.

    Raises:
        Whatever the first call in order raises that fails; calls that have not begun are dropped.
    """
    pool = ThreadPoolExecutor(threads)
    pending: deque[Future[R]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) >= 4 * threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def open_remote(filesystem: fsspec.AbstractFileSystem, path: str) -> Any:
    """A file whose every read is one request for just those bytes: for readers that buffer by themselves."""
    return filesystem.open(path, "rb", cache_type="none")


def stamp(url: str) -> tuple[int, int] | None:
    """What changes when a local file is written again: the key of what a process remembers of it."""
    try:
        status = os.stat(url.removeprefix("file://"))
    except (OSError, ValueError):
        return None
    return status.st_size, status.st_mtime_ns
