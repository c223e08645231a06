"""The memory bound of one worker process, over all of its shards.

There are three budgets, because whoever finds one exhausted has something else to do: downloads must not block their
event loop, readers of a remote store may block, and encoded pictures can go to disk. Whatever the budgets do not
count is small (one picture being decoded at a time, the rows of the shards under way).
"""

from __future__ import annotations

import asyncio
import threading
from dataclasses import dataclass


@dataclass(frozen=True)
class WorkerMemory:
    """The bound of a worker: `downloaded_bytes` or `remote_bodies * max_image_bytes`, plus `encoded_bytes`.

    Attributes:
        downloaded_bytes: HTTP bodies that wait to be decoded, and large ones still arriving. No new request starts
            while they use it up (`Room`).
        remote_bodies: files read from a remote store and not decoded yet; readers block until one is (a semaphore).
        encoded_bytes: encoded pictures that wait for the rest of their shards; more of them go to a file
            (`Allowance`).
    """

    downloaded_bytes: int = 64 * 2**20
    remote_bodies: int = 32
    encoded_bytes: int = 128 * 2**20


WORKER_MEMORY = WorkerMemory()


class Allowance:
    """A number of bytes that several threads draw from; whoever gets none has another place for its data."""

    def __init__(self, limit_bytes: int) -> None:
        self._left = limit_bytes
        self._lock = threading.Lock()

    def take(self, size: int) -> bool:
        """Take `size` bytes if as many are left."""
        with self._lock:
            if size > self._left:
                return False
            self._left -= size
            return True

    def give_back(self, size: int) -> None:
        with self._lock:
            self._left += size


class Room:
    """Memory for bodies, shared by all downloads of a process; used from one event loop."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self.held = 0
        self._waiting: list[asyncio.Future[None]] = []

    @property
    def free(self) -> float:
        """The free share, from 0 to 1; 0 while a large body waits, which small ones would starve."""
        if self._waiting:
            return 0.0
        return max(1 - self.held / self._limit, 0.0)

    def take(self, size: int) -> None:
        """Count bytes that are held already."""
        self.held += size

    def take_if_free(self, size: int) -> bool:
        """Count `size` bytes if there is room for them now."""
        if self.held and self.held + size > self._limit:
            return False
        self.held += size
        return True

    async def wait_for(self, size: int) -> None:
        """Count `size` bytes once there is room for them; a body alone always has room, however large it is."""
        while self.held and self.held + size > self._limit:
            freed = asyncio.get_running_loop().create_future()
            self._waiting.append(freed)
            await freed
        self.held += size

    def give_back(self, size: int) -> None:
        self.held -= size
        waiting, self._waiting = self._waiting, []
        for future in waiting:
            if not future.done():
                future.set_result(None)
