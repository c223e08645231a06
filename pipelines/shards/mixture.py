"""Several sets of samples mixed by weight in one sequence: a pure function of (rows of each set, weights, seed, step).

Each set keeps its own order (`pipelines.shards.order`), cut into as many partitions as the mixture has. Partition p of
the mixture takes its samples from partition p of each set, so that a worker still reads its share of each. In each
epoch of a set every sample of it is seen once; sets of unequal size are in different epochs.

Which set comes next is not drawn, it follows from the weights. With two sets, of weights w and 1 - w, the first n
samples of partition p have floor(n w + p/P) of the first set. So no partition is further than one sample from its
share, and neither are all together: floor(n w P) of their first n P samples are of that set (Hermite's identity). Of
more sets the first is set against all others, then the second against those after it at the places that are left, and
so on: each adds one sample at most. The partitions take other phases every time, so that what is too much in one is
too little in the next.

All of this is closed form in whole numbers: nothing is gone through to skip ahead, and the number of steps done is the
whole state.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipelines.shards.order import Needed, Place, SampleOrder, SamplePosition, in_order_of_need
from pipelines.shards.partitions import check_workers, count_partitions
from pipelines.shards.reader import ShardReader

_Numbers = NDArray[np.int64]

# Of the square of the sum of all weights, times the partitions: what is counted with them fits into 64 bits.
MOST_WEIGHT = 2**62

_GOLDEN_RATIO = (math.sqrt(5) - 1) / 2


class Part(NamedTuple):
    """One of the sets that are mixed.

    Attributes:
        rows_per_shard: number of samples in each shard; empty shards are allowed.
        excluded: the samples that are left out.
        weight: its share of all samples is this weight over the sum of all; a positive whole number.
    """

    rows_per_shard: Sequence[int] | _Numbers
    excluded: Iterable[Place] = ()
    weight: int = 1


class Mixture:
    """An endless sequence of global batches in which each of several sets has its share.

    A mixture of one set is that set's `SampleOrder`. Shards are numbered over all sets, one set after the other, and
    `epoch` is that of a partition of the sample's set.

    Args:
        parts: the sets; their weights are whole numbers, of which `Turns` takes sums up to some millions.
        seed: the run's seed.
        window: number of shards of each set whose samples are mixed with each other at a time, over all partitions;
            each of these mixes at least one.
        batch_size: samples of a global batch.
        partitions: the most partitions; there are as many as the largest divisor of the batch size that is neither
            above it nor above the number of samples of any set.

    Raises:
        ValueError: a set has no sample at all, a weight or the window is not positive, or the weights are too large.
    """

    def __init__(self, parts: Sequence[Part], seed: int, window: int, *, batch_size: int, partitions: int) -> None:
        self.batch_size, self._most_partitions = batch_size, partitions
        excluded = [set(part.excluded) for part in parts]
        sizes = [int(np.sum(part.rows_per_shard)) - len(out) for part, out in zip(parts, excluded, strict=True)]
        self.samples_per_epoch = sum(sizes)
        # An empty set is refused by its order.
        self._fewest = max(1, min(sizes))
        self.partitions = count_partitions(batch_size, partitions, self._fewest)
        self._share = batch_size // self.partitions
        self._orders = [
            SampleOrder(
                part.rows_per_shard,
                # Sets of equal shape would otherwise be shuffled alike.
                seed + number,
                window,
                batch_size=batch_size,
                partitions=self.partitions,
                excluded=excluded[number],
            )
            for number, part in enumerate(parts)
        ]
        self._turns = Turns([part.weight for part in parts], self.partitions)
        self._first_shards = list(accumulate((len(part.rows_per_shard) for part in parts), initial=0))
        self._needed: Needed | None = None

    def slice(self, step: int, rank: int, world: int) -> list[SamplePosition]:
        """Return the part of a step's global batch that belongs to one of `world` workers.

        The parts of all ranks, joined in order, are the same global batch whatever their number.

        Raises:
            MisuseError: the partitions do not divide among the workers.
        """
        served = self._served(rank, world)
        places = np.arange(step * self._share, (step + 1) * self._share)
        return self._at(step * self.batch_size + served.start * self._share, np.array(served), places)

    def sample(self, position: int) -> SamplePosition:
        """Return the sample at a position of the endless sequence."""
        step, place = divmod(position, self.batch_size)
        partition, offset = divmod(place, self._share)
        return self._at(position, np.array([partition]), np.array([step * self._share + offset]))[0]

    def shards_ahead(self, step: int, rank: int, world: int) -> list[int]:
        """Return the shards that one of `world` workers needs from a step on, in the order of need.

        They are those of the windows that the step reads, and of the window after these in each partition of each set.

        Raises:
            MisuseError: the partitions do not divide among the workers.
        """
        if self._needed is None or not self._needed.holds(step, rank, world):
            self._needed = self._look_ahead(step, rank, world)
        return self._needed.shards

    def _at(self, position: int, partitions: _Numbers, places: _Numbers) -> list[SamplePosition]:
        """Return the samples at consecutive places of the streams of some partitions; the first is at `position`."""
        turns, numbers = self._turns.at(partitions[:, None], places[None])
        shape = turns.shape
        epochs, shards, rows = np.empty(shape, np.int64), np.empty(shape, np.int64), np.empty(shape, np.int64)
        for number, order in enumerate(self._orders):
            mine = turns == number
            counts = mine.sum(axis=1)
            # What a partition takes of a set at consecutive places is consecutive in the set's stream.
            firsts = numbers[np.arange(len(numbers)), mine.argmax(axis=1)]
            samples: list[_Numbers] = []
            found: list[int] = []
            for partition, first, count in zip(partitions.tolist(), firsts.tolist(), counts.tolist(), strict=True):
                order.read(partition, first, first + count, samples, found)
            if samples:
                its_shards, rows[mine] = order.places(np.concatenate(samples))
                shards[mine], epochs[mine] = its_shards + self._first_shards[number], found
        positions = range(position, position + turns.size)
        columns = (each.ravel().tolist() for each in (epochs, shards, rows))
        return list(map(SamplePosition, positions, *columns))

    def _look_ahead(self, step: int, rank: int, world: int) -> Needed:
        served = self._served(rank, world)
        begin, end = (self._turns.before(np.array(served), each * self._share).tolist() for each in (step, step + 1))
        needed: list[tuple[int, _Numbers]] = []
        until = []
        for number, order in enumerate(self._orders):
            for partition, first, last in zip(served, begin[number], end[number], strict=True):
                ahead = order.ahead(partition, first, last)
                # The first one is in use even if this step takes nothing from it.
                steps = [step, *(self._step_of(number, partition, start) for start in ahead.starts[1:])]
                shards = (each + self._first_shards[number] for each in ahead.shards)
                needed += zip(steps, shards, strict=True)
                # Something changes with the first step that has left the first window, or that reads the last one.
                until += [
                    self._step_of(number, partition, ahead.left - 1) + 1,
                    self._step_of(number, partition, ahead.reached),
                ]
        return Needed(rank, world, step, min(until), in_order_of_need(needed))

    def _step_of(self, number: int, partition: int, sample: int) -> int:
        """Return the step that reads a sample of a partition's stream in one of the sets."""
        return self._turns.place(number, partition, sample) // self._share

    def _served(self, rank: int, world: int) -> range:
        """Return the partitions that a worker serves."""
        if self.partitions % world:
            check_workers(world, self.batch_size, self._most_partitions, self._fewest)
        each = self.partitions // world
        return range(rank * each, (rank + 1) * each)


class Turns:
    """Whose turn it is at each place of each of several partitions, when streams take turns by weight.

    Stream i has its share of the places that the streams before it leave: of the first n of these, in a partition of
    phase t, the first floor(n a/A + t/P) are counted as its own, with its weight a and the sum A of the weights from
    it on.

    Args:
        weights: of each stream, positive whole numbers.
        partitions: number of partitions, P.

    Raises:
        ValueError: a weight is not positive, or they are too large.
    """

    def __init__(self, weights: Sequence[int], partitions: int) -> None:
        if min(weights) < 1 or sum(weights) ** 2 * partitions > MOST_WEIGHT:
            most = math.isqrt(MOST_WEIGHT // partitions)
            raise ValueError(f"weights must be positive and their sum at most {most}, got {list(weights)}")
        self.partitions = partitions
        self._weights = list(weights)
        # From each stream on.
        self._sums = list(accumulate(reversed(weights)))[::-1]
        # Neighbours, which are what streams before tell apart, get phases far from each other.
        stride = next(each for each in _near(round(_GOLDEN_RATIO * partitions)) if math.gcd(each, partitions) == 1)
        numbers = np.arange(partitions)
        self._phases = [numbers * pow(stride, level, partitions) % partitions for level in range(len(weights) - 1)]

    def at(self, partitions: _Numbers, places: _Numbers) -> tuple[_Numbers, _Numbers]:
        """Return which stream has its turn at places of partitions, and how many turns it had before, in each."""
        partitions, left = np.broadcast_arrays(partitions, places)
        turns = np.full(left.shape, len(self._weights) - 1)
        numbers = np.empty(left.shape, np.int64)
        open_ = np.ones(left.shape, bool)
        for level in range(len(self._weights) - 1):
            before = self._taken(level, partitions, left)
            mine = open_ & (self._taken(level, partitions, left + 1) > before)
            turns[mine], numbers[mine] = level, before[mine]
            open_, left = open_ & ~mine, left - before
        numbers[open_] = left[open_]
        return turns, numbers

    def before(self, partitions: _Numbers, place: int) -> _Numbers:
        """Return how many turns each stream had before a place of each partition, (streams, partitions)."""
        left = np.full(partitions.shape, place)
        found = []
        for level in range(len(self._weights) - 1):
            found.append(self._taken(level, partitions, left))
            left = left - found[-1]
        return np.stack([*found, left])

    def place(self, stream: int, partition: int, number: int) -> int:
        """Return the place of a partition at which a stream has had `number` turns, and has the next one."""
        size = self.partitions
        if stream < len(self._phases):
            weight, total, phase = self._weights[stream], self._sums[stream], int(self._phases[stream][partition])
            # The least n with floor((n + 1) a/A + t/P) > number.
            number = -(-((number + 1) * total * size - total * phase) // (weight * size)) - 1
        for level in reversed(range(min(stream, len(self._phases)))):
            weight, total, phase = self._weights[level], self._sums[level], int(self._phases[level][partition])
            # The least n with n + 1 - floor((n + 1) a/A + t/P) > number.
            number = (number * total * size + total * phase) // ((total - weight) * size)
        return number

    def _taken(self, level: int, partitions: _Numbers, places: _Numbers) -> _Numbers:
        """Return how many of the first places that are left to a stream it takes."""
        weight, total, size = self._weights[level], self._sums[level], self.partitions
        rounds, rest = np.divmod(places, total)
        # In two parts, each of which fits into 64 bits.
        taken: _Numbers = rounds * weight + (rest * weight * size + self._phases[level][partitions] * total) // (
            total * size
        )
        return taken


def _near(number: int) -> Iterable[int]:
    """Yield positive numbers, the nearest to one first."""
    for distance in range(number + 2):
        yield number + distance
        if number > distance:
            yield number - distance


def joined(readers: Sequence[ShardReader]) -> ShardReader | JoinedReader:
    """Return one reader of all shards; a single one as it is."""
    return readers[0] if len(readers) == 1 else JoinedReader(readers)


class JoinedReader:
    """The shards of several readers as those of one, numbered one reader after the other; see `ShardReader`.

    Readers of remote shards share the cache of their node.

    Attributes:
        rows_per_shard: samples in each shard, (shards,) int64.
    """

    def __init__(self, readers: Sequence[ShardReader]) -> None:
        self._readers = list(readers)
        self._ends = list(accumulate(len(each.rows_per_shard) for each in readers))
        self.rows_per_shard = np.concatenate([each.rows_per_shard for each in readers])

    def key(self, shard: int, row: int) -> str:
        """Return the key of one sample; samples of different readers may have the same."""
        number, shard = self._find(shard)
        return self._readers[number].key(shard, row)

    def read(self, shard: int, row: int, extensions: Iterable[str] | None = None) -> dict[str, bytes]:
        """Return the files of one sample by extension; raises as `ShardReader.read` does."""
        number, shard = self._find(shard)
        return self._readers[number].read(shard, row, extensions)

    def read_into(self, shard: int, row: int, extension: str, head: bytearray, values: memoryview) -> bool:
        """Read one file of a sample into memory that is there, as `ShardReader.read_into` does."""
        number, shard = self._find(shard)
        return self._readers[number].read_into(shard, row, extension, head, values)

    def facts(self, shard: int, row: int) -> bytes:
        """Return the json of one sample; raises as `ShardReader.facts` does."""
        number, shard = self._find(shard)
        return self._readers[number].facts(shard, row)

    def fetch_ahead(self, shards: list[int]) -> None:
        """Start to fetch remote shards in the background, and let go of others."""
        wanted: list[list[int]] = [[] for _ in self._readers]
        for each in shards:
            number, shard = self._find(each)
            wanted[number].append(shard)
        for reader, its_own in zip(self._readers, wanted, strict=True):
            reader.fetch_ahead(its_own)

    def close(self) -> None:
        for reader in self._readers:
            reader.close()

    def _find(self, shard: int) -> tuple[int, int]:
        """Return the number of the reader that has a shard, and the number that the shard has there."""
        number = bisect_right(self._ends, shard)
        return number, shard - (self._ends[number - 1] if number else 0)
