"""The loss on held-out samples, measured while training goes on and without a trace in it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pipelines.errors import UserError
from pipelines.notices import tell
from pipelines.training.loader.held_out import QUARTILES, held_out_batches
from pipelines.training.loader.open import tensors_of
from pipelines.training.loader.prefetch import Prefetcher

if TYPE_CHECKING:
    from pipelines.training.task import Learner


class HeldOutLoss:
    """The mean loss of the first held-out samples, with the same noise and timesteps each time.

    They are read by a thread as soon as this is made, since a store may take its time, and kept: each time the same
    bytes are looked at.

    Args:
        learner: whose held-out samples; there must be one at least.
        most: how many are looked at at most, a multiple of QUARTILES.
        batch_size: how many at a time.
    """

    def __init__(self, learner: Learner, most: int, batch_size: int) -> None:
        self._learner = learner
        batches = learner.batches
        self._samples = held_out_batches(batches.held_out, batches.buckets, most, batch_size)
        # A few samples of many shards: fetched whole, these would fill the node's cache.
        batches.reader.read_in_ranges({sample.shard for batch in self._samples for sample in batch})
        self._tensors: list[dict[str, Tensor]] = []
        self._reading: Prefetcher[dict[str, Tensor]] | None = self._read()

    @torch.no_grad()
    def measure(self, device: torch.device) -> dict[str, float]:
        """Return the mean loss as `held_out` and, if the learner's have timesteps, `held_out_q1` to `held_out_q4`.

        Nothing if the samples cannot be read, which is told, and tried again for the next time.
        """
        if self._reading is not None:
            try:
                self._tensors = [self._reading.next() for _ in self._samples]
            except (UserError, OSError) as error:
                tell(f"the held-out samples cannot be read, training goes on without their loss: {error}")
                self._reading.close()
                self._reading = self._read()
                return {}
            self.close()
        losses = [
            self._learner.held_out_losses({name: tensor.to(device) for name, tensor in batch.items()})
            for batch in self._tensors
        ]
        # In double precision, in the order of the positions: buckets and batches change no bit of the sum.
        positions = torch.tensor([sample.position for batch in self._samples for sample in batch])
        by_position = torch.cat(losses).double().cpu()[positions.argsort()]
        found = {"held_out": float(by_position.mean())}
        if self._learner.has_timesteps:
            # The first position is of the first quartile, and they are consecutive.
            for number, losses_of_quartile in enumerate(by_position.reshape(-1, QUARTILES).unbind(1), 1):
                found[f"held_out_q{number}"] = float(losses_of_quartile.mean())
        return found

    def close(self) -> None:
        """Stop reading. May be called twice."""
        if self._reading is not None:
            self._reading.close()
            self._reading = None

    def _read(self) -> Prefetcher[dict[str, Tensor]]:
        def make(number: int) -> dict[str, Tensor]:
            return tensors_of(self._learner.batches, self._samples[number])

        return Prefetcher(make, 0, len(self._samples), depth=len(self._samples))
