"""Reading files of any store: what is there, ranges of bytes, many at once."""

from __future__ import annotations

import contextlib
import os
import stat
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import fsspec

from pipelines.errors import UserError
from pipelines.stages.pairs.rows import RejectedError

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


def read_file(filesystem: fsspec.AbstractFileSystem, path: str, max_bytes: int) -> bytes:
    """The bytes of a file of one row, at most `max_bytes`.

    Raises:
        RejectedError: `missing_file`, `unreadable_file` or `too_large`.
    """
    try:
        if is_local(filesystem):
            # A pipe or a device named as a picture would block the shard for ever.
            if not stat.S_ISREG(os.stat(path).st_mode):
                raise RejectedError("missing_file")
            with open(path, "rb") as file:
                data = file.read(max_bytes + 1)
        else:
            data = bytes(filesystem.cat_file(path, start=0, end=max_bytes + 1))
    except RejectedError:
        raise
    except (FileNotFoundError, NotADirectoryError, ValueError):
        raise RejectedError("missing_file") from None
    # One row's name may be anything, and each store's client has its own classes for refusing it.
    except Exception:
        raise RejectedError("unreadable_file") from None
    if len(data) > max_bytes:
        raise RejectedError("too_large")
    return data


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
