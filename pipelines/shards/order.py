"""The order in which training sees the samples: a pure function of (rows of the shards, excluded rows, seed, step).

The samples, in the order of their shards, are cut into P partitions of equal size. Each partition is an endless stream
of its own: in each epoch its pieces of shards are permuted, then the samples are shuffled within windows of consecutive
pieces (a shuffle of all samples would read one sample of a shard at a time, a shuffle of shards alone would keep
neighbours together). A global batch is the next `batch_size / P` samples of each partition, one after the other.

A worker serves some of the partitions and reads their shards alone, so that every shard goes to one node; and any
number of workers that divides P trains on the same global batches. The number of steps done is the whole state. Nothing
is read to skip ahead, and one window's permutation a partition is held in memory.

An epoch of a partition has N/P samples, which is a whole number in the mean only: where P does not divide N, the cuts
move by less than one sample an epoch, in a circle. In epoch e partition p holds the kept samples c(p + e) - d(e) to
c(p + 1 + e) - d(e) - 1, modulo N, with c(k) = floor(kN/P) and d(e) = e floor(N/P). So every sample is in exactly one
partition of every epoch, the sizes differ by at most one, and after any number of steps no partition is more than one
sample further than another: small sets are not seen unevenly.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from pipelines.shards.partitions import check_workers, count_partitions
from pipelines.shards.randomness import Purpose, generator

# The number of a shard, and of a sample in it.
Place = tuple[int, int]

_Numbers = NDArray[np.int64]


class SamplePosition(NamedTuple):
    """One sample in the endless sequence of all batches: `position` counts from the first sample of step 0.

    `epoch` is that of its partition.
    """

    position: int
    epoch: int
    shard: int
    row: int

    @property
    def place(self) -> Place:
        return self.shard, self.row


class Order(Protocol):
    """An endless sequence of global batches, as training goes by it.

    Attributes:
        batch_size: samples of a global batch.
        partitions: in how many streams the samples are; a number of workers that divides it can train on them.
        samples_per_epoch: samples that there are; sets that are mixed have epochs of their own.
    """

    batch_size: int
    partitions: int
    samples_per_epoch: int

    def slice(self, step: int, rank: int, world: int) -> list[SamplePosition]:
        """Return the part of a step's global batch that belongs to one of `world` workers.

        The parts of all ranks, joined in order, are the same global batch whatever their number.

        Raises:
            MisuseError: the partitions do not divide among the workers.
        """
        ...

    def sample(self, position: int) -> SamplePosition:
        """Return the sample at a position of the endless sequence."""
        ...

    def shards_ahead(self, step: int, rank: int, world: int) -> list[int]:
        """Return the shards that one of `world` workers needs from a step on, in the order of need.

        Raises:
            MisuseError: the partitions do not divide among the workers.
        """
        ...


class Ahead(NamedTuple):
    """What a range of a partition's stream is read from, and what comes after it.

    Attributes:
        shards: those of each window that the range reads, and of the one after these, in order.
        starts: where the need for each of these windows begins.
        left: a range from here on no longer reads the first of them.
        reached: a range to beyond here reads the last of them, too.
    """

    shards: list[_Numbers]
    starts: list[int]
    left: int
    reached: int


class Needed(NamedTuple):
    """The shards that a worker needs from `step` on, in the order of need; unchanged until before `until`."""

    rank: int
    world: int
    step: int
    until: int
    shards: list[int]

    def holds(self, step: int, rank: int, world: int) -> bool:
        """Tell whether a worker needs just these at a step."""
        return (self.rank, self.world) == (rank, world) and self.step <= step < self.until


class _Epoch(NamedTuple):
    """An epoch of a partition: `first` to `last` - 1 of its stream, and its pieces of shards as they are permuted.

    firsts: first sample of each piece, among the kept ones
    edges: where in the epoch each piece starts, and its end
    window: pieces of a window

    Both arrays in half the memory where the numbers allow it.
    """

    number: int
    first: int
    last: int
    firsts: NDArray[np.integer[Any]]
    edges: NDArray[np.integer[Any]]
    window: int

    def window_at(self, place: int) -> int:
        """Return the number of the window that holds a place of the stream."""
        # Of its own dtype: another would copy the edges.
        place_here = self.edges.dtype.type(place - self.first)
        return (int(np.searchsorted(self.edges, place_here, side="right")) - 1) // self.window

    def bounds(self, window: int) -> tuple[int, int]:
        """Return where in the epoch a window starts and ends."""
        last = len(self.edges) - 1
        return int(self.edges[window * self.window]), int(self.edges[min((window + 1) * self.window, last)])

    def pieces(self, window: int) -> tuple[_Numbers, _Numbers]:
        """Return the first sample and the size of each piece of a window."""
        pieces = slice(window * self.window, (window + 1) * self.window)
        edges = self.edges[pieces.start : pieces.stop + 1].astype(np.int64)
        return self.firsts[pieces].astype(np.int64), np.diff(edges)


class _Window(NamedTuple):
    """The samples `first` to `last` - 1 of a partition's stream, as numbers of kept samples."""

    epoch: int
    first: int
    last: int
    samples: _Numbers


class SampleOrder:
    """An endless sequence of global batches, in each epoch of which every sample but the excluded ones is seen once.

    Args:
        rows_per_shard: number of samples in each shard; empty shards are allowed.
        seed: the run's seed.
        window: number of shards whose samples are mixed with each other at a time, over all partitions; each of them
            mixes at least one.
        batch_size: samples of a global batch.
        partitions: the most partitions; there are as many as the largest divisor of the batch size that is neither
            above it nor above the number of samples.
        excluded: the samples that are left out.

    Raises:
        ValueError: there is no sample at all, or the window is not positive.
    """

    def __init__(
        self,
        rows_per_shard: Sequence[int] | _Numbers,
        seed: int,
        window: int,
        *,
        batch_size: int,
        partitions: int,
        excluded: Iterable[Place] = (),
    ) -> None:
        if window < 1:
            raise ValueError(f"window must be at least 1 shard, got {window}")
        # The first row of each shard, and the end of the last one. The one array that grows with the number of shards.
        self._starts = np.zeros(len(rows_per_shard) + 1, np.int64)
        np.cumsum(np.asarray(rows_per_shard, np.int64), out=self._starts[1:])
        places = np.array(list(excluded), np.int64).reshape(-1, 2)
        self._left_out = np.unique(self._starts[places[:, 0]] + places[:, 1])
        # How many rows are kept before each excluded one.
        self._kept_before = self._left_out - np.arange(len(self._left_out))
        self.samples_per_epoch = int(self._starts[-1]) - len(self._left_out)
        if self.samples_per_epoch == 0:
            raise ValueError(f"there must be at least one sample, got none in {len(rows_per_shard)} shards")
        self.seed, self.batch_size, self._most_partitions = seed, batch_size, partitions
        self.partitions = count_partitions(batch_size, partitions, self.samples_per_epoch)
        # Pieces in a window of one partition.
        self._window = max(1, window // self.partitions)
        # The window in use of each partition, and its last two epochs: the one in use and the one fetched ahead.
        self._windows: dict[int, _Window] = {}
        self._epochs: dict[tuple[int, int], _Epoch] = {}
        self._needed: Needed | None = None

    def slice(self, step: int, rank: int, world: int) -> list[SamplePosition]:
        """Return the part of a step's global batch that belongs to one of `world` workers.

        The parts of all ranks, joined in order, are the same global batch whatever their number.

        Raises:
            MisuseError: the partitions do not divide among the workers.
        """
        share = self.batch_size // self.partitions
        found: list[_Numbers] = []
        epochs: list[int] = []
        served = self._served(rank, world)
        for partition in served:
            self.read(partition, step * share, (step + 1) * share, found, epochs)
        shards, rows = self.places(np.concatenate(found))
        position = step * self.batch_size + served.start * share
        positions = range(position, position + len(shards))
        return list(map(SamplePosition, positions, epochs, shards.tolist(), rows.tolist()))

    def sample(self, position: int) -> SamplePosition:
        """Return the sample at a position of the endless sequence."""
        step, place = divmod(position, self.batch_size)
        partition, offset = divmod(place, self.batch_size // self.partitions)
        offset += step * (self.batch_size // self.partitions)
        window = self._window_at(partition, offset)
        shards, rows = self.places(window.samples[offset - window.first, None])
        return SamplePosition(position, window.epoch, int(shards[0]), int(rows[0]))

    def shards_ahead(self, step: int, rank: int, world: int) -> list[int]:
        """Return the shards that one of `world` workers needs from a step on, in the order of need.

        They are those of the windows that the step reads, and of the window after these in each partition.

        Raises:
            MisuseError: the partitions do not divide among the workers.
        """
        if self._needed is None or not self._needed.holds(step, rank, world):
            # Asked for at every step, while it changes only when a partition enters a window.
            self._needed = self._look_ahead(step, rank, world)
        return self._needed.shards

    def read(self, partition: int, first: int, end: int, samples: list[_Numbers], epochs: list[int]) -> None:
        """Append what a partition's stream has at `first` to `end` - 1: numbers for `places`, and the epoch of each."""
        while first < end:
            window = self._window_at(partition, first)
            found = window.samples[first - window.first : end - window.first]
            samples.append(found)
            epochs += [window.epoch] * len(found)
            first += len(found)

    def places(self, samples: _Numbers) -> tuple[_Numbers, _Numbers]:
        """Return shard and row of the samples that `read` has found."""
        # They were counted without the excluded ones: those that lie before each are added again.
        places = samples + np.searchsorted(self._kept_before, samples, side="right")
        shards = np.searchsorted(self._starts, places, side="right") - 1
        return shards, places - self._starts[shards]

    def ahead(self, partition: int, first: int, end: int) -> Ahead:
        """Return what a partition's stream at `first` to `end` - 1, and a window beyond, is read from."""
        shards: list[_Numbers] = []
        starts: list[int] = []
        left, last = 0, first
        while True:
            epoch = self._epoch_at(partition, last)
            index = epoch.window_at(last)
            shards.append(self._shards(epoch.pieces(index)[0]))
            starts.append(last)
            if left and last >= end:
                return Ahead(shards, starts, left, last)
            last = epoch.first + epoch.bounds(index)[1]
            left = left or last

    def _look_ahead(self, step: int, rank: int, world: int) -> Needed:
        share = self.batch_size // self.partitions
        needed: list[tuple[int, _Numbers]] = []
        until = []
        for partition in self._served(rank, world):
            ahead = self.ahead(partition, step * share, (step + 1) * share)
            needed += [(start // share, shards) for start, shards in zip(ahead.starts, ahead.shards, strict=True)]
            # Something changes with the first step that has left the first window, or that reads the last one.
            until += [-(-ahead.left // share), ahead.reached // share]
        return Needed(rank, world, step, min(until), in_order_of_need(needed))

    def _served(self, rank: int, world: int) -> range:
        """Return the partitions that a worker serves."""
        if self.partitions % world:
            check_workers(world, self.batch_size, self._most_partitions, self.samples_per_epoch)
        each = self.partitions // world
        return range(rank * each, (rank + 1) * each)

    def _shards(self, samples: _Numbers) -> _Numbers:
        """Return the shards of kept samples."""
        return self.places(samples)[0]

    def _window_at(self, partition: int, place: int) -> _Window:
        """Return the window that holds a place of a partition's stream."""
        window = self._windows.get(partition)
        if window is None or not window.first <= place < window.last:
            window = self._windows[partition] = self._shuffle(partition, place)
        return window

    def _shuffle(self, partition: int, place: int) -> _Window:
        epoch = self._epoch_at(partition, place)
        index = epoch.window_at(place)
        samples = _ranges(*epoch.pieces(index))
        # One number for window and partition; of two words of the counter the epoch has the other.
        inner = index * self.partitions + partition
        order = generator(self.seed, Purpose.SAMPLE_ORDER, epoch.number, inner).permutation(len(samples))
        start, end = epoch.bounds(index)
        return _Window(epoch.number, epoch.first + start, epoch.first + end, samples[order])

    def _epoch_at(self, partition: int, place: int) -> _Epoch:
        """Return the epoch that holds a place of a partition's stream."""
        # Each has N/P samples in the mean, so that the first guess is off by one at most.
        number = place * self.partitions // self.samples_per_epoch
        while self._epoch_start(partition, number + 1) <= place:
            number += 1
        while self._epoch_start(partition, number) > place:
            number -= 1
        epoch = self._epochs.get((partition, number % 2))
        if epoch is None or epoch.number != number:
            epoch = self._epochs[partition, number % 2] = self._permute(partition, number)
        return epoch

    def _permute(self, partition: int, number: int) -> _Epoch:
        first, last = self._epoch_start(partition, number), self._epoch_start(partition, number + 1)
        cut = self._cut(partition + number) - number * (self.samples_per_epoch // self.partitions)
        begin = cut % self.samples_per_epoch
        # In a circle: the last partition may go on with the first samples.
        beyond = max(0, begin + last - first - self.samples_per_epoch)
        pieces = [self._cut_at_shards(begin, begin + last - first - beyond), self._cut_at_shards(0, beyond)]
        firsts, sizes = (np.concatenate(each) for each in zip(*pieces, strict=True))
        order = generator(self.seed, Purpose.SHARD_ORDER, number, partition).permutation(len(firsts))
        dtype: type[np.integer[Any]] = np.uint32 if self.samples_per_epoch < 2**32 else np.int64
        edges: NDArray[np.integer[Any]] = np.zeros(len(firsts) + 1, dtype)
        np.cumsum(sizes[order], dtype=dtype, out=edges[1:])
        return _Epoch(number, first, last, firsts[order].astype(dtype), edges, self._window)

    def _epoch_start(self, partition: int, number: int) -> int:
        """Return how many samples of a partition's stream come before one of its epochs."""
        return self._cut(partition + number) - self._cut(partition)

    def _cut(self, place: int) -> int:
        """Return floor(place N/P)."""
        return place * self.samples_per_epoch // self.partitions

    def _cut_at_shards(self, begin: int, end: int) -> tuple[_Numbers, _Numbers]:
        """Return first sample and size of each shard's piece of a range of kept samples."""
        if begin == end:
            return np.empty(0, np.int64), np.empty(0, np.int64)
        shards = self._shards(np.array([begin, end - 1]))
        starts = self._starts[shards[0] : shards[1] + 2]
        # As the kept samples are counted. Empty shards start where the next one does.
        edges = np.unique((starts - np.searchsorted(self._left_out, starts)).clip(begin, end))
        return edges[:-1], np.diff(edges)


def in_order_of_need(needed: Iterable[tuple[int, _Numbers]]) -> list[int]:
    """Return shards, each once, by the step from which on they are needed."""
    by_step = sorted(needed, key=lambda each: each[0])
    return list(dict.fromkeys(int(shard) for _, shards in by_step for shard in shards))


def _ranges(firsts: _Numbers, sizes: _Numbers) -> _Numbers:
    """Return the numbers of several ranges, one after the other."""
    before = np.cumsum(sizes) - sizes
    return np.repeat(firsts - before, sizes) + np.arange(sizes.sum())
