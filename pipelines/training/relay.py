"""What the training workers tell the driver, which alone may talk to the tracker and to the progress display."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pipelines.compute.mailbox import Mailbox
from pipelines.notices import tell

if TYPE_CHECKING:
    import numpy as np

    from pipelines.stage import StageContext


@dataclass(frozen=True)
class Message:
    """The report of one step.

    Attributes:
        step: optimiser steps done.
        metrics: values for the tracker, by name.
        facts: short texts for the progress display.
        preview: a picture, (H, W, 3) uint8.
        notice: a line for whoever watches; a message that has one has nothing else.
    """

    step: int
    metrics: dict[str, float] = field(default_factory=dict)
    facts: dict[str, str] = field(default_factory=dict)
    preview: np.ndarray | None = None
    notice: str = ""

    def forward(self, context: StageContext, total_steps: int) -> None:
        """Hand everything to the tracker and the progress display."""
        if self.notice:
            tell(self.notice)
            return
        if self.metrics:
            context.tracker.metrics(self.metrics, step=self.step)
        if self.preview is not None:
            context.tracker.image("preview", self.preview, step=self.step)
        context.progress(self.step, total_steps, **self.facts)


Relay = Mailbox[Message]
