"""How far the workers are: each pins up its counts, the driver reads them all."""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from typing import Any

PIN_EVERY_S = 1.0


class _Board:
    """The process that keeps the counts."""

    def __init__(self) -> None:
        self._counts: dict[str, Counter[str]] = {}

    def pin(self, worker: str, counts: Counter[str]) -> None:
        self._counts[worker] = counts

    def read(self) -> Counter[str]:
        return sum(self._counts.values(), Counter())


class Board:
    """Counts by name, over all workers; picklable. Made by the driver, after `ray.init`."""

    def __init__(self) -> None:
        import ray

        self._actor: Any = ray.remote(num_cpus=0, max_restarts=-1)(_Board).remote()

    def pin(self, worker: str, counts: Counter[str]) -> None:
        """Replace the counts of a worker, without waiting."""
        self._actor.pin.remote(worker, counts)

    def read(self, timeout_s: float = 5.0) -> Counter[str]:
        """The sum over all workers; empty while the board's process cannot be reached."""
        import ray

        with contextlib.suppress(ray.exceptions.RayError):
            counts: Counter[str] = ray.get(self._actor.read.remote(), timeout=timeout_s)
            return counts
        return Counter()

    def close(self) -> None:
        import ray

        ray.kill(self._actor)


class Counting:
    """The counts of one worker: `rows`, `bytes` and a count for each status, pinned up once a second."""

    def __init__(self, board: Board | None, worker: str) -> None:
        self._board, self._worker = board, worker
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()
        if board is not None:
            threading.Thread(target=self._pin, daemon=True, name="counts").start()

    def add(self, status: str, size: int = 0) -> None:
        """Count a row that is finished, and the bytes that it took to fetch."""
        with self._lock:
            self._counts["rows"] += 1
            self._counts["bytes"] += size
            self._counts[f"status:{status}"] += 1

    def _pin(self) -> None:
        assert self._board is not None
        pause = threading.Event()
        last: Counter[str] = Counter()
        while not pause.wait(PIN_EVERY_S):
            with self._lock:
                counts = Counter(self._counts)
            if counts != last:
                self._board.pin(self._worker, counts)
                last = counts
