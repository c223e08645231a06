"""The interface of a network that `pipelines.training.fit` can train.

A `Task` is a small picklable description, made by the driver. In each worker it builds a `Learner`, which knows its
network, its data and its loss, and nothing about steps, ranks, optimisers or checkpoints.

Shapes: B is the worker's share of the global batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor, nn

    from pipelines.shards.order import Order, SamplePosition
    from pipelines.store.commits import ArtifactWriter
    from pipelines.training.loader.source import Source


class Learner(Protocol):
    """A network being trained, inside one worker.

    Attributes:
        network: the module that is optimised and averaged; its initial weights depend on the seed alone.
        order: the order of the training samples.
        source: makes the same batches as `load` in another process.
    """

    network: nn.Module

    @property
    def order(self) -> Order: ...

    @property
    def source(self) -> Source: ...

    def load(self, samples: Sequence[SamplePosition]) -> dict[str, Tensor]:
        """Return the CPU tensors of a batch, first dimension B. Runs in a background thread."""
        ...

    def losses(self, network: Any, batch: dict[str, Tensor]) -> Tensor:
        """Return the (B,) losses of a batch.

        Args:
            network: `self.network` as it is wrapped for this run. It must be called exactly once: DDP prepares its
                reduction of the gradient in the forward pass.
            batch: the tensors of `load`, on the device. Whatever else is random about a sample is drawn from (seed,
                position) too.
        """
        ...

    def key(self, sample: SamplePosition) -> str:
        """Return the sample's key, for messages to people."""
        ...

    def fetch_ahead(self, shards: list[int]) -> None:
        """Start to fetch shards that training is about to read, in the order of need; called before every batch."""
        ...

    def preview(self) -> np.ndarray | None:
        """Return a picture of what the network does now, (H, W, 3) uint8, or None if there is nothing to see.

        Called on rank 0, with EMA weights.
        """
        ...

    def save(self, writer: ArtifactWriter) -> dict[str, Any]:
        """Write and commit the final files, and return facts for the manifest.

        Called on rank 0, with EMA weights.
        """
        ...

    def close(self) -> None:
        """Let go of the data; called on every rank at the end of training, whatever that is."""
        ...


class Task(Protocol):
    """A description of what to train, sent to the workers."""

    def build(self, device: torch.device) -> Learner:
        """Build the learner in a worker; torch's global generator is seeded when this is called."""
        ...
