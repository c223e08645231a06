"""The line from the training workers to the driver: metrics, previews and progress, over any number of nodes.

Workers send and go on at once; the driver, which alone may talk to the tracker and the terminal, collects. What is
under way is lost when the relay's process dies; training never depends on it.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from pipelines.stage import StageContext


@dataclass(frozen=True)
class Message:
    """What happened at one step.

    Attributes:
        step: optimiser steps done.
        metrics: values for the tracker, by name.
        facts: short texts for the progress display.
        preview: a picture, uint8 (H, W, 3).
    """

    step: int
    metrics: dict[str, float] = field(default_factory=dict)
    facts: dict[str, str] = field(default_factory=dict)
    preview: np.ndarray | None = None

    def forward(self, context: StageContext, total_steps: int) -> None:
        """Hand everything to the tracker and the progress display."""
        if self.metrics:
            context.tracker.metrics(self.metrics, step=self.step)
        if self.preview is not None:
            context.tracker.image("preview", self.preview, step=self.step)
        context.progress(self.step, total_steps, **self.facts)


class _Mailbox:
    """The relay's process: keeps messages until the driver takes them."""

    def __init__(self) -> None:
        self._messages: list[Message] = []
        self._arrived = asyncio.Event()

    async def put(self, message: Message) -> None:
        self._messages.append(message)
        self._arrived.set()

    async def take(self, timeout_s: float) -> list[Message]:
        if not self._messages:
            try:
                await asyncio.wait_for(self._arrived.wait(), timeout_s)
            except TimeoutError:
                return []
        taken, self._messages = self._messages, []
        self._arrived.clear()
        return taken


class Relay:
    """Both ends of the line; picklable. Made by the driver, after `ray.init`."""

    def __init__(self) -> None:
        import ray

        self._actor: Any = ray.remote(num_cpus=0, max_restarts=-1)(_Mailbox).remote()

    def send(self, message: Message) -> None:
        """Send from a worker, without waiting."""
        self._actor.put.remote(message)

    def receive(self, timeout_s: float) -> list[Message]:
        """What has arrived since the last call; waits up to a time for the first."""
        import ray

        try:
            taken: list[Message] = ray.get(self._actor.take.remote(timeout_s))
        except ray.exceptions.RayActorError:
            # Died, and is being started again.
            time.sleep(timeout_s)
            return []
        return taken

    def close(self) -> None:
        import ray

        ray.kill(self._actor)
