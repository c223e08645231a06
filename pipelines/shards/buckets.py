"""Samples of several sizes in one sequence of global batches, each of which has samples of one size.

Pairs of `resize: buckets` keep the sizes apart: a shard holds one, and is named after it (`000000.320x192.tar`). So the
bucket of every sample is known from the names of the shards, and a bucket is a set with an order of its own.

The buckets take turns by batches (`pipelines.shards.mixture.Turns`), each as often as it has samples: when a bucket is
through its samples once, so are the others, to within a batch of each. The number of steps done is the whole state.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from pipelines.shards.mixture import Mixture, Part, Turns
from pipelines.shards.order import Order, Place, SampleOrder, SamplePosition
from pipelines.shards.partitions import count_partitions

_Numbers = NDArray[np.int64]

_BUCKET = re.compile(r"\.(\d+x\d+)\.tar$")


def bucket_of(shard: str) -> str:
    """Return the bucket that a shard's name tells, `WIDTHxHEIGHT` in pixels; empty where there are no buckets."""
    found = _BUCKET.search(shard)
    return found[1] if found else ""


def buckets_of(shards: Iterable[str]) -> list[str]:
    """Return the bucket of each shard by its name; an empty list where there are no buckets."""
    found = list(map(bucket_of, shards))
    return found if any(found) else []


def order_of(
    parts: Sequence[Part], buckets: Sequence[str], seed: int, window: int, *, batch_size: int, partitions: int
) -> Order:
    """Return the order of samples that come in buckets, or else of several sets that are mixed.

    Args:
        parts: the sets; one alone if there are buckets.
        buckets: the bucket of each shard; empty where there are none.
        seed, window, batch_size, partitions: see `BucketOrder` and `Mixture`.
    """
    if not buckets:
        return Mixture(parts, seed, window, batch_size=batch_size, partitions=partitions)
    (part,) = parts
    rows, excluded = part.rows_per_shard, part.excluded
    return BucketOrder(rows, buckets, seed, window, batch_size=batch_size, partitions=partitions, excluded=excluded)


class BucketOrder:
    """An endless sequence of global batches, each of one bucket, in which no sample is ahead of others.

    In each epoch of a bucket every sample of it but the excluded ones is seen once; `epoch` is that of a partition of
    the sample's bucket. With a single bucket it is that bucket's `SampleOrder`.

    Args:
        rows_per_shard: number of samples in each shard; empty shards are allowed.
        buckets: the bucket of each shard.
        seed: the run's seed.
        window: number of shards of each bucket whose samples are mixed with each other at a time, over all partitions.
        batch_size: samples of a global batch.
        partitions: the most partitions; there are as many as the largest divisor of the batch size that is neither
            above it nor above the number of samples of any bucket.
        excluded: the samples that are left out.

    Raises:
        ValueError: there is no sample at all, or the window is not positive.
    """

    def __init__(
        self,
        rows_per_shard: Sequence[int] | _Numbers,
        buckets: Sequence[str],
        seed: int,
        window: int,
        *,
        batch_size: int,
        partitions: int,
        excluded: Iterable[Place] = (),
    ) -> None:
        rows = np.asarray(rows_per_shard, np.int64)
        names, which = np.unique(np.asarray(buckets, str), return_inverse=True)
        left_out = np.array(sorted(set(excluded)), np.int64).reshape(-1, 2)
        kept = rows - np.bincount(left_out[:, 0], minlength=len(rows))
        sizes = np.bincount(which, weights=kept, minlength=len(names)).astype(np.int64)
        # The largest first: its shards are needed most often. What is left of an empty one takes no turn.
        used = [number for number in np.argsort(-sizes, kind="stable").tolist() if sizes[number]]
        if not used:
            raise ValueError(f"there must be at least one sample, got none in {len(rows)} shards")
        self.buckets = tuple(str(names[number]) for number in used)
        self.batch_size, self.samples_per_epoch = batch_size, int(sizes.sum())
        self.partitions = count_partitions(batch_size, partitions, int(sizes[used].min()))
        self._turns = Turns(sizes[used].tolist(), 1)
        self._shards: list[_Numbers] = []
        self._orders: list[SampleOrder] = []
        for place, number in enumerate(used):
            shards = np.flatnonzero(which == number)
            mine = left_out[which[left_out[:, 0]] == number]
            order = SampleOrder(
                rows[shards],
                # Buckets of equal shape would otherwise be shuffled alike.
                seed + place,
                window,
                batch_size=batch_size,
                partitions=self.partitions,
                excluded=zip(np.searchsorted(shards, mine[:, 0]).tolist(), mine[:, 1].tolist(), strict=True),
            )
            self._shards.append(shards)
            self._orders.append(order)

    def bucket(self, step: int) -> str:
        """Return the bucket of a step's global batch."""
        return self.buckets[self._turn(step)[0]]

    def slice(self, step: int, rank: int, world: int) -> list[SamplePosition]:
        """Return the part of a step's global batch that belongs to one of `world` workers.

        The parts of all ranks, joined in order, are the same global batch whatever their number.

        Raises:
            MisuseError: the partitions do not divide among the workers.
        """
        number, turn = self._turn(step)
        shift, shards = (step - turn) * self.batch_size, self._shards[number]
        return [
            SamplePosition(position + shift, epoch, int(shards[shard]), row)
            for position, epoch, shard, row in self._orders[number].slice(turn, rank, world)
        ]

    def sample(self, position: int) -> SamplePosition:
        """Return the sample at a position of the endless sequence."""
        step, place = divmod(position, self.batch_size)
        number, turn = self._turn(step)
        found = self._orders[number].sample(turn * self.batch_size + place)
        return SamplePosition(position, found.epoch, int(self._shards[number][found.shard]), found.row)

    def shards_ahead(self, step: int, rank: int, world: int) -> list[int]:
        """Return the shards that one of `world` workers needs from a step on: those of each bucket, the largest first.

        They are those of the windows that a bucket's next batch reads, and of the window after these.

        Raises:
            MisuseError: the partitions do not divide among the workers.
        """
        turns = self._turns.before(np.array([0]), step)[:, 0].tolist()
        return [
            int(shards[shard])
            for order, shards, turn in zip(self._orders, self._shards, turns, strict=True)
            for shard in order.shards_ahead(turn, rank, world)
        ]

    def _turn(self, step: int) -> tuple[int, int]:
        """Return which bucket a step's batch is of, and how many batches of that bucket came before."""
        numbers, turns = self._turns.at(np.array([0]), np.array([step]))
        return int(numbers[0]), int(turns[0])
