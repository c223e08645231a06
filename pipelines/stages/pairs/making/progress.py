"""Progress of the pairs stage while its workers run."""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from typing import TYPE_CHECKING

from pipelines.stage import StageContext
from pipelines.stages.pairs.shard.outcome import OK
from pipelines.stages.pairs.shard.staged import WORK

if TYPE_CHECKING:
    from pipelines.stages.pairs.making.board import Board


_SHOW_EVERY_S = 1.0


class _Showing:
    """Tells the display and the tracker how far the workers are, while they work."""

    def __init__(self, context: StageContext, board: Board, before: int, total: int) -> None:

        self._context, self._board, self._before, self._total = context, board, before, total
        self._rates = {"rows": RecentRate(), "bytes": RecentRate()}
        self._now = {"rows": 0.0, "bytes": 0.0}
        self._rows = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="progress")

    def __enter__(self) -> _Showing:
        from pipelines.stages.pairs.summary.unfinished import write_plan

        write_plan(self._context.writer.storage / WORK, self._total, self._context.config.rows_per_shard)
        self._show()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        self._show()
        self.track()

    def track(self) -> None:
        """Log the rates of this moment."""
        step = self._before + self._rows
        self._context.tracker.metric("throughput/rows_per_s", self._now["rows"], step=step)
        self._context.tracker.metric("throughput/mb_per_s", self._now["bytes"] / 1e6, step=step)

    def _watch(self) -> None:
        while not self._stop.wait(_SHOW_EVERY_S):
            self._show()

    def _show(self) -> None:
        # Of this run alone: what an earlier one has done took none of this one's time.
        counts = self._board.read()
        if counts["rows"] < self._rows:
            return
        self._rows = counts["rows"]
        self._now = {name: rate.update(counts[name]) for name, rate in self._rates.items()}
        facts = {}
        if self._rows:
            facts = {
                "rows/s": f"{self._now['rows']:,.0f}",
                "MB/s": f"{self._now['bytes'] / 1e6:.1f}",
                OK: f"{100 * counts[f'status:{OK}'] / self._rows:.1f} %",
                **_most_frequent_failures(counts, self._rows),
            }
        self._context.progress(min(self._before + self._rows, self._total), self._total, **facts)


def _most_frequent_failures(counts: Counter[str], rows: int, most: int = 3) -> dict[str, str]:
    failures = Counter({name.removeprefix("status:"): n for name, n in counts.items() if name.startswith("status:")})
    failures.pop(OK, None)
    return {name: f"{100 * count / rows:.1f} %" for name, count in failures.most_common(most)}


WINDOW_S = 10.0


class RecentRate:
    """Items per second over the last seconds. The time before the first item, while workers start, does not count.

    Args:
        window_s: how far back it looks.
    """

    def __init__(self, window_s: float = WINDOW_S) -> None:
        self._window_s = window_s
        self._seen: deque[tuple[float, int]] = deque()

    def update(self, count: int) -> float:
        """The rate, now that so many items are done in all; call it about once a second, from the start on."""
        now = time.monotonic()
        self._seen.append((now, count))
        while len(self._seen) > 2 and (now - self._seen[1][0] >= self._window_s or not self._seen[1][1]):
            self._seen.popleft()
        since, before = self._seen[0]
        return (count - before) / (now - since) if now > since else 0.0
