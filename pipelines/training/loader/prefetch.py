"""Results made by a background thread, a few steps ahead.

Why not torch's DataLoader: the position in the data is one integer, the step, and any step can be asked for at once.
A DataLoader that resumes in the middle of an epoch draws again what came before, or needs a sampler with a state of its
own.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Prefetcher(Generic[T]):
    """Yield `make(first), make(first + 1), …, make(last - 1)`, each made before it is asked for.

    Args:
        make: returns the result for an index; an exception in it is raised by the `next` that would have returned it.
        first: the first index.
        last: the index after the last one.
        depth: how many results are held at most.

    Attributes:
        waited_s: seconds that `next` has spent waiting; its owner may reset it.
    """

    def __init__(self, make: Callable[[int], T], first: int, last: int, *, depth: int = 3) -> None:
        self.waited_s = 0.0
        self._results: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(depth)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(make, first, last), name="prefetch", daemon=True)
        self._thread.start()

    def next(self) -> T:
        """Return the next result; wait for it if it is not ready."""
        started = time.perf_counter()
        result, error = self._results.get()
        self.waited_s += time.perf_counter() - started
        if error is not None:
            raise error
        assert result is not None
        return result

    def close(self) -> None:
        """Stop making results; the one that is being made is finished first."""
        self._stopped.set()
        # The thread may be waiting for room in a full queue: take results until it has ended.
        while self._thread.is_alive():
            try:
                self._results.get(timeout=0.05)
            except queue.Empty:
                continue

    def _run(self, make: Callable[[int], T], first: int, last: int) -> None:
        for index in range(first, last):
            if self._stopped.is_set():
                return
            try:
                self._results.put((make(index), None))
            except BaseException as error:
                self._results.put((None, error))
                return
