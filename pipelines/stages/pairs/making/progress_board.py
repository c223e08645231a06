"""Counts of all workers in one place: each worker posts those of its shards, the driver reads the sum.

Counts are kept by shard: one that is made again, by an actor that took the place of a dead one, counts once.
"""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Iterator, Mapping

from pipelines.compute.mailbox import Mailbox

POST_EVERY_S = 1.0


class ProgressBoard:
    """Counts by name, summed over all shards; picklable. The driver makes it, after `ray.init`, and reads it."""

    def __init__(self) -> None:
        self._mailbox: Mailbox[tuple[str, dict[int, Counter[str]]]] = Mailbox()
        # Of shards under way: which worker is at them, and how far. Finished ones are only part of the total.
        self._under_way: dict[int, tuple[str, Counter[str]]] = {}
        self._finished: set[int] = set()
        self._total: Counter[str] = Counter()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[object, ...]:
        # Workers post; what has arrived is the driver's.
        return Poster, (self._mailbox,)

    def finish(self, shard: int, statuses: Mapping[str, int], size: int) -> None:
        """Take the rows of a finished shard by status and the bytes fetched for them; what arrives later is old."""
        counts = Counter({f"status:{status}": count for status, count in statuses.items()})
        counts["rows"], counts["bytes"] = sum(statuses.values()), size
        with self._lock:
            self._replace(shard, "", counts)
            del self._under_way[shard]
            self._finished.add(shard)

    def read(self) -> Counter[str]:
        """Return the sum over all shards of what has arrived by now."""
        posts = self._mailbox.receive(timeout_s=0)
        with self._lock:
            for worker, shards in posts:
                for shard, counts in shards.items():
                    known, before = self._under_way.get(shard, (worker, Counter()))
                    # A worker's counts only grow, and may arrive in another order than they were posted.
                    is_old = known == worker and counts["rows"] < before["rows"]
                    if shard not in self._finished and not is_old:
                        self._replace(shard, worker, counts)
            # Without what counts zero again.
            return +self._total

    def close(self) -> None:
        self._mailbox.close()

    def _replace(self, shard: int, worker: str, counts: Counter[str]) -> None:
        if shard in self._under_way:
            self._total.subtract(self._under_way[shard][1])
        self._total.update(counts)
        self._under_way[shard] = worker, counts


class Poster:
    """A board as workers have it."""

    def __init__(self, mailbox: Mailbox[tuple[str, dict[int, Counter[str]]]]) -> None:
        self._mailbox = mailbox

    def post(self, worker: str, counts: dict[int, Counter[str]]) -> None:
        """Replace the counts of shards, without waiting."""
        self._mailbox.send((worker, counts))


class ShardCounts:
    """The counts of one shard that is being made: `rows`, `bytes` and one for each status."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()

    def add(self, status: str, size: int = 0) -> None:
        """Count a finished row, and the bytes that were fetched for it."""
        with self._lock:
            self._counts["rows"] += 1
            self._counts["bytes"] += size
            self._counts[f"status:{status}"] += 1

    def now(self) -> Counter[str]:
        with self._lock:
            return Counter(self._counts)


class WorkerCounts:
    """The counts of the shards that one worker is at; posted once a second.

    Args:
        board: where to post them; None for nowhere.
        worker: a name that no other worker uses.
    """

    def __init__(self, board: Poster | None, worker: str) -> None:
        self._board, self._worker = board, worker
        self._shards: dict[int, ShardCounts] = {}
        if board is not None:
            threading.Thread(target=self._post, daemon=True, name="counts").start()

    @contextlib.contextmanager
    def of(self, shard: int) -> Iterator[ShardCounts]:
        """Post the counts of a shard while the block makes it."""
        self._shards[shard] = counts = ShardCounts()
        try:
            yield counts
        finally:
            del self._shards[shard]

    def _post(self) -> None:
        assert self._board is not None
        pause = threading.Event()
        last: dict[int, Counter[str]] = {}
        while not pause.wait(POST_EVERY_S):
            # `dict` in one step: other threads begin and end shards meanwhile.
            now = {shard: counts.now() for shard, counts in dict(self._shards).items()}
            if now and now != last:
                self._board.post(self._worker, now)
            last = now
