"""What a network must offer to be trained by `pipelines.training.fit`.

A `Task` is a small picklable description, made by the driver; in each worker it builds a `Learner`, which knows its
network, its data and its loss, and nothing of steps, ranks, optimisers or checkpoints.

Shapes: B is the worker's share of the global batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor, nn

    from pipelines.shards.order import SampleOrder, SamplePosition
    from pipelines.store.ledger import ArtifactWriter


class Learner(Protocol):
    """One network being trained, inside one worker.

    Attributes:
        network: what is optimised and averaged; initialised from the seed alone.
        order: of the training samples.
    """

    network: nn.Module
    order: SampleOrder

    def load(self, samples: Sequence[SamplePosition]) -> dict[str, Tensor]:
        """The CPU tensors of a batch, first dimension B. Runs in a background thread.

        Everything random about a sample is drawn here, from (seed, position) alone.
        """
        ...

    def losses(self, network: Any, batch: dict[str, Tensor]) -> Tensor:
        """(B,) losses. `network` is `self.network` as it is wrapped for this run; it must be called exactly once."""
        ...

    def key(self, sample: SamplePosition) -> str:
        """The sample's key, for people."""
        ...

    def fetch_ahead(self, position: int) -> None:
        """Told when training reaches a position; data from there on may be fetched."""
        ...

    def preview(self) -> np.ndarray | None:
        """A picture of what the network does now, uint8 (H, W, 3); None where there is nothing to see.

        Called on rank 0, with EMA weights.
        """
        ...

    def save(self, writer: ArtifactWriter) -> dict[str, Any]:
        """Write and commit the final files; returns facts for the manifest. On rank 0, with EMA weights."""
        ...


class Task(Protocol):
    """How to build the learner, in a worker."""

    def build(self, device: torch.device) -> Learner: ...
