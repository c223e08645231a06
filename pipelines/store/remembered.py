"""Results that a process remembers of a file for as long as the file does not change."""

import functools
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from pipelines.store.location import Location

T = TypeVar("T")

# Kernels set times by a clock that ticks every 10 ms or less: of two writes within a tick the second changes no time.
_FRESH_S = 0.02
# File systems without fractions of seconds; FAT's seconds are even.
_COARSE_S = 2.5
_NS_PER_S = 10**9


def is_fresh(modified_at: float) -> bool:
    """Tell whether a file's time (seconds since 1970) is so recent that another write might not change it."""
    return abs(time.time() - modified_at) < _FRESH_S


def is_settled(status: os.stat_result) -> bool:
    """Tell whether any change of a file from now on would show in its times, one of which cannot be set."""
    times = (status.st_mtime_ns, status.st_ctime_ns)
    now = time.time_ns()
    return all(abs(now - each) > _NS_PER_S * (_FRESH_S if each % _NS_PER_S else _COARSE_S) for each in times)


def remember_by_stamp(
    most: int, *, unstamped: bool = False
) -> Callable[[Callable[[Location], T]], Callable[[Location], T]]:
    """Decorate a function of a file so that it is called once per file, until the file's stamp changes.

    Threads that ask for the same file at the same time wait for one call. What raises is not remembered.

    Args:
        most: how many files are remembered; the one asked for longest ago goes first.
        unstamped: also remember files without a stamp, those of remote stores; only for what notices by itself that
            its file has changed.
    """

    def decorate(function: Callable[[Location], T]) -> Callable[[Location], T]:
        known: OrderedDict[object, Future[T]] = OrderedDict()
        lock = threading.Lock()

        @functools.wraps(function)
        def remembered(location: Location) -> T:
            stamp = location.stamp()
            if (stamp is None and not unstamped) or (stamp is not None and is_fresh(stamp[1] / 1e9)):
                return function(location)
            # By URL: fsspec has an object of its own for each thread, and these are not equal.
            key = (location.url, stamp)
            with lock:
                future = known.get(key)
                mine = future is None
                if future is None:
                    future = known[key] = Future()
                known.move_to_end(key)
                while len(known) > most:
                    known.popitem(last=False)
            if mine:
                try:
                    future.set_result(function(location))
                except BaseException as error:
                    future.set_exception(error)
                # A file that was written while it was read may be half the old one: it is read again next time.
                if future.exception() is not None or location.stamp() != stamp:
                    with lock:
                        known.pop(key, None)
            return future.result()

        return remembered

    return decorate
