"""What makes batches, in the process that trains or in the loader's own.

Nothing here imports torch, nor may what implements it: a process that makes batches starts in half a second then, and
takes a fraction of the memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

if TYPE_CHECKING:
    from pipelines.shards.order import Order, Place, SamplePosition

# Returns an array of a batch, by name, shape and dtype, to be filled: its bytes are whatever they are.
NewArray = Callable[[str, tuple[int, ...], DTypeLike], NDArray[Any]]


class Reader(Protocol):
    """Where the samples lie: a `ShardReader`, or several as one."""

    def key(self, shard: int, row: int) -> str:
        """Return the sample's key, for messages to people."""
        ...

    def fetch_ahead(self, shards: list[int]) -> None:
        """Start to fetch shards that training is about to read, in the order of need; called before every batch."""
        ...

    def read_in_ranges(self, shards: Iterable[int]) -> None:
        """Do not fetch these shards for a few samples of them."""
        ...

    def close(self) -> None:
        """Let go of the data."""
        ...


class Batches(Protocol):
    """Makes the batches of one training run."""

    @property
    def source(self) -> Source:
        """What opens the same data in another process."""
        ...

    @property
    def reader(self) -> Reader: ...

    @property
    def order(self) -> Order:
        """The order of the training samples."""
        ...

    @property
    def held_out(self) -> Sequence[Place]:
        """The places of the samples that nothing is trained on, in an order of their own."""
        ...

    @property
    def buckets(self) -> Sequence[str]:
        """The bucket of each shard; empty where there are none."""
        ...

    def assemble(self, samples: Sequence[SamplePosition], new: NewArray) -> None:
        """Fill the arrays of a batch, first dimension B.

        What is drawn for a sample comes from (seed, position) alone, so that neither the number of workers nor a
        restart changes it. Of the held-out stream (`pipelines.training.loader.held_out`) no condition is dropped.

        Args:
            samples: B of them, in order.
            new: makes the arrays, each name once.

        Raises:
            UserError: a shard is damaged, or samples do not fit each other.
        """
        ...


class Source(Protocol):
    """A small picklable description of batches."""

    def open(self) -> Batches:
        """Open the data, in whichever process makes the batches."""
        ...


def arrays_of(batches: Batches, samples: Sequence[SamplePosition]) -> dict[str, NDArray[Any]]:
    """Return the arrays of a batch by name, each in memory of its own."""
    arrays: dict[str, NDArray[Any]] = {}

    def new(name: str, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        arrays[name] = np.empty(shape, dtype)
        return arrays[name]

    batches.assemble(samples, new)
    return arrays
