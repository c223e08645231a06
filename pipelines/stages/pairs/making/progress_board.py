"""Counts of all workers in one place: each worker posts its own, the driver reads the sum."""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from typing import Any

import ray

POST_EVERY_S = 1.0


class _Board:
    """The Ray actor behind `ProgressBoard`."""

    def __init__(self) -> None:
        self._counts: dict[str, Counter[str]] = {}

    def post(self, worker: str, counts: Counter[str]) -> None:
        self._counts[worker] = counts

    def read(self) -> Counter[str]:
        return sum(self._counts.values(), Counter())


class ProgressBoard:
    """Counts by name, summed over all workers; picklable. The driver makes it, after `ray.init`."""

    def __init__(self) -> None:
        # Restarted wherever it dies: progress is worth a process, but never the run.
        self._actor: Any = ray.remote(num_cpus=0, max_restarts=-1)(_Board).remote()

    def post(self, worker: str, counts: Counter[str]) -> None:
        """Replace the counts of a worker, without waiting."""
        self._actor.post.remote(worker, counts)

    def read(self, timeout_s: float = 5.0) -> Counter[str]:
        """Return the sum over all workers; empty while the board's process cannot be reached."""
        with contextlib.suppress(ray.exceptions.RayError):
            counts: Counter[str] = ray.get(self._actor.read.remote(), timeout=timeout_s)
            return counts
        return Counter()

    def close(self) -> None:
        ray.kill(self._actor)


class WorkerCounts:
    """The counts of one worker: `rows`, `bytes` and one for each status; posted once a second.

    Args:
        board: where to post them; None for nowhere.
        worker: a name that no other worker uses.
    """

    def __init__(self, board: ProgressBoard | None, worker: str) -> None:
        self._board, self._worker = board, worker
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()
        if board is not None:
            threading.Thread(target=self._post, daemon=True, name="counts").start()

    def add(self, status: str, size: int = 0) -> None:
        """Count a finished row, and the bytes that were fetched for it."""
        with self._lock:
            self._counts["rows"] += 1
            self._counts["bytes"] += size
            self._counts[f"status:{status}"] += 1

    def _post(self) -> None:
        assert self._board is not None
        pause = threading.Event()
        last: Counter[str] = Counter()
        while not pause.wait(POST_EVERY_S):
            with self._lock:
                counts = Counter(self._counts)
            if counts != last:
                self._board.post(self._worker, counts)
                last = counts
