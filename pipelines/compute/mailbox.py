"""The line between the workers and the driver, over any number of nodes: a small Ray actor that keeps messages."""

from __future__ import annotations

import asyncio
import time
from typing import Any, Generic, TypeVar

import ray
import ray.exceptions

M = TypeVar("M")

# The driver has other work to do than to wait for an actor that does not answer.
ANSWER_S = 5.0


class Mailbox(Generic[M]):
    """Messages from workers to the driver, and one order from the driver to the workers.

    Made by the driver, after `ray.init`; picklable, so that workers are given it. Neither side waits for the other,
    and no work depends on it: messages under way are lost when the actor dies. Ray then starts it again, empty.
    """

    def __init__(self) -> None:
        # No CPU of its own: it only waits, and must be placed however busy the cluster is.
        self._actor: Any = ray.remote(num_cpus=0, max_restarts=-1)(_Mailbox).remote()
        self._order: ray.ObjectRef[str] | None = None

    def send(self, message: M) -> None:
        """Send a message to the driver, without waiting."""
        self._actor.put.remote(message)

    def receive(self, timeout_s: float) -> list[M]:
        """Return what has arrived since the last call; wait at most `timeout_s` for the first message.

        The order may differ from that of sending: Ray promises none for an actor whose methods are coroutines.
        """
        try:
            messages: list[M] = ray.get(self._actor.take.remote(timeout_s), timeout=timeout_s + ANSWER_S)
        except ray.exceptions.RayError:
            # The actor has died and is being started again, or its node, or the answer, is gone.
            time.sleep(timeout_s)
            return []
        return messages

    def order_stop(self, reason: str) -> None:
        """Tell all workers, also those that start later, to stop; without waiting."""
        self._actor.order_stop.remote(reason)

    def stop_ordered(self) -> str | None:
        """Return the reason why a worker must stop, or None; cheap enough to be asked at every step."""
        if self._order is None:
            self._order = self._actor.wait_for_stop.remote()
        # The request stays open until the order comes: looking whether it was answered needs no message.
        if not ray.wait([self._order], timeout=0)[0]:
            return None
        try:
            return ray.get(self._order)
        except ray.exceptions.RayActorError:
            self._order = None
            return None

    def close(self) -> None:
        """End the actor. Only the driver may: workers lose what they still send."""
        ray.kill(self._actor)


class _Mailbox:
    """The actor's side. Its methods are coroutines of one event loop, so that one that waits blocks no other."""

    def __init__(self) -> None:
        self._messages: list[Any] = []
        self._arrived = asyncio.Event()
        self._stop_reason = ""
        self._stopped = asyncio.Event()

    async def put(self, message: Any) -> None:
        self._messages.append(message)
        self._arrived.set()

    async def take(self, timeout_s: float) -> list[Any]:
        if not self._messages:
            try:
                await asyncio.wait_for(self._arrived.wait(), timeout_s)
            except TimeoutError:
                return []
        taken, self._messages = self._messages, []
        self._arrived.clear()
        return taken

    async def order_stop(self, reason: str) -> None:
        self._stop_reason = reason
        self._stopped.set()

    async def wait_for_stop(self) -> str:
        await self._stopped.wait()
        return self._stop_reason
