"""Counts of all workers in one place: each worker posts its own, the driver reads the sum."""

from __future__ import annotations

import threading
from collections import Counter

from pipelines.compute.mailbox import Mailbox

POST_EVERY_S = 1.0


class ProgressBoard:
    """Counts by name, summed over all workers; picklable. The driver makes it, after `ray.init`, and reads it."""

    def __init__(self) -> None:
        self._mailbox: Mailbox[tuple[str, Counter[str]]] = Mailbox()
        self._latest: dict[str, Counter[str]] = {}

    def post(self, worker: str, counts: Counter[str]) -> None:
        """Replace the counts of a worker, without waiting."""
        self._mailbox.send((worker, counts))

    def read(self) -> Counter[str]:
        """Return the sum over all workers of what has arrived by now."""
        for worker, counts in self._mailbox.receive(timeout_s=0):
            # Counts only grow, and may arrive in another order than they were posted.
            if counts["rows"] >= self._latest.get(worker, Counter())["rows"]:
                self._latest[worker] = counts
        return sum(self._latest.values(), Counter())

    def close(self) -> None:
        self._mailbox.close()


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
