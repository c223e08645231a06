"""The interface of a network that `pipelines.training.fit` can train.

A `Task` is a small picklable description, made by the driver. In each worker it builds a `Learner`, which knows its
network, its data and its loss, and nothing about steps, ranks, optimisers or checkpoints.

Shapes: B is the worker's share of the global batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor, nn

    from pipelines.store.commits import ArtifactWriter
    from pipelines.training.loader.source import Batches


class Learner(Protocol):
    """A network being trained, inside one worker.

    Attributes:
        network: the module that is optimised and averaged; its initial weights depend on the seed alone.
        batches: makes the batches, in a background thread or by its source in other processes. Its reader is closed at
            the end of training, whatever that is, on every rank.
        has_timesteps: whether each sample has a timestep, by whose quartiles the held-out loss is told.
    """

    network: nn.Module
    has_timesteps: bool

    @property
    def batches(self) -> Batches: ...

    def losses(self, network: Any, batch: dict[str, Tensor]) -> Tensor:
        """Return the (B,) losses of a batch.

        Args:
            network: `self.network` as it is wrapped for this run. It must be called exactly once: DDP prepares its
                reduction of the gradient in the forward pass.
            batch: the tensors of `batches`, on the device. Whatever else is random about a sample is drawn from (seed,
                position) too.
        """
        ...

    def held_out_losses(self, batch: dict[str, Tensor]) -> Tensor:
        """Return the (B,) losses of a batch of the held-out stream, without weights of timesteps and terms.

        Called on rank 0, with EMA weights, in evaluation mode.
        """
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


class Task(Protocol):
    """A description of what to train, sent to the workers."""

    def build(self, device: torch.device) -> Learner:
        """Build the learner in a worker; torch's global generator is seeded when this is called."""
        ...
