"""The two ways that batches come: from a thread of the training process, or from processes of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from pipelines.training.loader.prefetch import Prefetcher
from pipelines.training.loader.processes import ProcessLoader
from pipelines.training.loader.source import arrays_of

if TYPE_CHECKING:
    from pipelines.shards.order import SamplePosition
    from pipelines.training.loader.source import Batches

# For each GPU: one makes a batch while the other waits for a shard.
GPU_PROCESSES = 2


class Loader(Protocol):
    """Batches of consecutive steps, on the device.

    Attributes:
        waited_s: seconds that `next` has spent waiting; its owner may reset it.
    """

    waited_s: float

    def next(self) -> dict[str, Tensor]:
        """Return the tensors of the next step, which are to be used before the next call. Raises what went wrong."""
        ...

    def close(self) -> None:
        """Stop making batches. May be called twice."""
        ...


def tensors_of(batches: Batches, samples: Sequence[SamplePosition]) -> dict[str, Tensor]:
    """Return the CPU tensors of a batch by name, first dimension B. Raises as `Batches.assemble` does."""
    return {name: torch.from_numpy(array) for name, array in arrays_of(batches, samples).items()}


def open_loader(
    batches: Batches,
    rank: int,
    world_size: int,
    first: int,
    last: int,
    *,
    processes: int | None,
    device: torch.device,
) -> Loader:
    """Begin to make the batches of the steps `first` to `last` - 1.

    Args:
        batches: makes them in the thread; processes open its source anew.
        rank, world_size: whose part of the global batches.
        first, last: the first step, and the one after the last.
        processes: how many make batches; 0 for a thread. None takes GPU_PROCESSES for a GPU; a CPU that trains has
            nothing to gain, since they would take its cores.
        device: what the batches are copied to.
    """
    if processes is None:
        processes = GPU_PROCESSES if device.type == "cuda" else 0
    if processes:
        return ProcessLoader(batches.source, rank, world_size, first, last, processes=processes, device=device)
    return ThreadLoader(batches, rank, world_size, first, last, device)


class ThreadLoader:
    """Batches made by a thread; see `open_loader`."""

    def __init__(
        self, batches: Batches, rank: int, world_size: int, first: int, last: int, device: torch.device
    ) -> None:
        self._device = device

        def make(step: int) -> dict[str, Tensor]:
            # The whole state of the data is the step: the order is an endless sequence of batches.
            batches.reader.fetch_ahead(batches.order.shards_ahead(step, rank, world_size))
            tensors = tensors_of(batches, batches.order.slice(step, rank, world_size))
            if device.type == "cuda":
                return {name: tensor.pin_memory() for name, tensor in tensors.items()}
            return tensors

        self._batches = Prefetcher(make, first, last)

    @property
    def waited_s(self) -> float:
        return self._batches.waited_s

    @waited_s.setter
    def waited_s(self, seconds: float) -> None:
        self._batches.waited_s = seconds

    def next(self) -> dict[str, Tensor]:
        return {name: tensor.to(self._device, non_blocking=True) for name, tensor in self._batches.next().items()}

    def close(self) -> None:
        self._batches.close()
