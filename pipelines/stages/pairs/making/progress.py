"""Progress of the pairs stage while its workers run."""

from __future__ import annotations

import threading
import time
from collections import Counter, deque

from pipelines.stage import StageContext
from pipelines.stages.pairs.making.progress_board import ProgressBoard
from pipelines.stages.pairs.shard.outcome import OK

_SHOW_EVERY_S = 1.0
WINDOW_S = 10.0


class ProgressDisplay:
    """Shows the user and the tracker how far the workers are; a context manager around their work.

    Args:
        context: the stage's; its `progress` and `tracker` are told.
        board: the counts of the workers.
        before: rows that earlier runs have finished.
        total: rows in all.
    """

    def __init__(self, context: StageContext, board: ProgressBoard, before: int, total: int) -> None:
        self._context, self._board, self._before, self._total = context, board, before, total
        self._rates = {"rows": RecentRate(), "bytes": RecentRate()}
        self._now = {"rows": 0.0, "bytes": 0.0}
        self._rows = 0
        self._facts: dict[str, str] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="progress")

    def __enter__(self) -> ProgressDisplay:
        self._show()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        self._show()
        self.track()
        if kind is None:
            # Workers post once a second: the rows of the last one may not have been counted.
            self._context.progress(self._total, self._total, **self._facts)

    def track(self) -> None:
        """Log the present rates to the tracker."""
        step = self._before + self._rows
        self._context.tracker.metric("throughput/rows_per_s", self._now["rows"], step=step)
        self._context.tracker.metric("throughput/mb_per_s", self._now["bytes"] / 1e6, step=step)

    def _watch(self) -> None:
        while not self._stop.wait(_SHOW_EVERY_S):
            self._show()

    def _show(self) -> None:
        # The board counts this run alone: rates must not include rows that an earlier run finished.
        counts = self._board.read()
        # Fewer rows than before: an actor has died, and what it had not finished is made again.
        if counts["rows"] < self._rows:
            return
        self._rows = counts["rows"]
        self._now = {name: rate.update(counts[name]) for name, rate in self._rates.items()}
        if self._rows:
            self._facts = {
                "rows/s": f"{self._now['rows']:,.0f}",
                "MB/s": f"{self._now['bytes'] / 1e6:.1f}",
                OK: f"{100 * counts[f'status:{OK}'] / self._rows:.1f} %",
                **_most_frequent_failures(counts, self._rows),
            }
        self._context.progress(min(self._before + self._rows, self._total), self._total, **self._facts)


def _most_frequent_failures(counts: Counter[str], rows: int, most: int = 3) -> dict[str, str]:
    failures = Counter({name.removeprefix("status:"): n for name, n in counts.items() if name.startswith("status:")})
    failures.pop(OK, None)
    return {name: f"{100 * count / rows:.1f} %" for name, count in failures.most_common(most)}


class RecentRate:
    """Items per second over the last seconds. The time before the first item, while workers start, does not count.

    Args:
        window_s: the length of the window.
    """

    def __init__(self, window_s: float = WINDOW_S) -> None:
        self._window_s = window_s
        self._seen: deque[tuple[float, int]] = deque()

    def update(self, count: int) -> float:
        """Return the rate, given the number of items done in all; to be called about once a second from the start."""
        now = time.monotonic()
        self._seen.append((now, count))
        # The oldest entry is the last one before the window, or the last one without any item.
        while len(self._seen) > 2 and (now - self._seen[1][0] >= self._window_s or not self._seen[1][1]):
            self._seen.popleft()
        since, before = self._seen[0]
        return (count - before) / (now - since) if now > since else 0.0
