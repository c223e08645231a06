"""How fast a count grows now, rather than since the start."""

from __future__ import annotations

import time
from collections import deque

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
