"""Waiting for many answers at once, in bounded memory."""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from pipelines.patience import give_up_at

T = TypeVar("T")
R = TypeVar("R")

THREADS = 16


def map_in_threads(function: Callable[[T], R], items: Iterable[T], threads: int = THREADS) -> Iterator[R]:
    """Yield results in the order of the items, with a bounded number of calls ahead of the reader.

    (`ThreadPoolExecutor.map` would take all items and hold all results at once: millions of files of a folder.)

    Raises:
        Exception: what the first failing call, in order, raises; calls that have not begun are dropped.
    """
    end = threading.Event()
    pool = ThreadPoolExecutor(threads, initializer=give_up_at, initargs=(end,))
    pending: deque[Future[R]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) >= 4 * threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        # After Ctrl-C nobody wants to wait until the calls under way lose patience with a store that is down.
        end.set()
        pool.shutdown(cancel_futures=True)
