"""The order of samples: complete, shuffled, the same for everyone, and free to skip in."""

import tracemalloc
from collections import Counter
from typing import Any

import numpy as np
import pytest

from pipelines.shards import order as order_module
from pipelines.shards.order import SampleOrder
from pipelines.shards.randomness import Purpose, generator


def shard_sizes(random: np.random.Generator) -> list[int]:
    sizes = [int(size) for size in random.integers(0, 12, int(random.integers(1, 20)))]
    return sizes if sum(sizes) else [1]


@pytest.mark.parametrize("case", range(30))
def test_each_epoch_sees_each_sample_exactly_once(case: int) -> None:
    random = np.random.default_rng(case)
    sizes = shard_sizes(random)
    order = SampleOrder(sizes, seed=case, window=int(random.integers(1, 8)))
    everything = {(shard, row) for shard, rows in enumerate(sizes) for row in range(rows)}
    for epoch in range(3):
        first = epoch * order.samples_per_epoch
        samples = [order.sample(position) for position in range(first, first + order.samples_per_epoch)]
        assert Counter((s.shard, s.row) for s in samples) == Counter(everything)
        assert {s.epoch for s in samples} == {epoch}


@pytest.mark.parametrize("case", range(10))
def test_any_number_of_workers_reads_the_same_global_batches(case: int) -> None:
    random = np.random.default_rng(100 + case)
    sizes, cursor = shard_sizes(random), int(random.integers(0, 500))
    batches = []
    for world in (1, 2, 3, 4, 6, 12):
        order = SampleOrder(sizes, seed=7, window=3)
        batches.append([sample for rank in range(world) for sample in order.slice(cursor, 12, rank, world)])
    assert all(batch == batches[0] for batch in batches)
    assert [sample.position for sample in batches[0]] == list(range(cursor, cursor + 12))


@pytest.mark.parametrize("case", range(30))
def test_excluded_samples_are_never_seen_and_all_others_once_an_epoch(case: int) -> None:
    random = np.random.default_rng(200 + case)
    sizes = [*shard_sizes(random), 3]
    everything = [(shard, row) for shard, rows in enumerate(sizes) for row in range(rows)]
    excluded = {place for place in everything[:-1] if random.random() < 0.4}
    order = SampleOrder(sizes, seed=case, window=int(random.integers(1, 8)), excluded=excluded)
    assert order.samples_per_epoch == len(everything) - len(excluded)
    for epoch in range(2):
        first = epoch * order.samples_per_epoch
        samples = [order.sample(position).place for position in range(first, first + order.samples_per_epoch)]
        assert sorted(samples) == [place for place in everything if place not in excluded]


def test_a_shard_of_excluded_samples_alone_is_not_fetched() -> None:
    order = SampleOrder([3, 2, 5], seed=0, window=1, excluded=[(1, 0), (1, 1), (2, 4)])
    assert order.samples_per_epoch == 7
    assert all(1 not in order.shards_ahead(position) for position in range(14))


def test_epochs_differ_and_seeds_differ() -> None:
    first, other = SampleOrder([50, 50], seed=1, window=2), SampleOrder([50, 50], seed=2, window=2)
    epochs = [[first.sample(100 * epoch + i)[2:] for i in range(100)] for epoch in range(2)]
    assert epochs[0] != epochs[1]
    assert epochs[0] != [other.sample(i)[2:] for i in range(100)]


def test_samples_are_mixed_within_a_window_and_no_further() -> None:
    order = SampleOrder([10] * 8, seed=0, window=2)
    for window in range(4):
        samples = [order.sample(position) for position in range(20 * window, 20 * window + 20)]
        shards = [sample.shard for sample in samples]
        assert len(set(shards)) == 2
        assert shards != sorted(shards), "the shards of a window must be mixed"


def test_skipping_shuffles_nothing_but_the_shards_of_the_epoch_and_the_samples_of_the_window(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn: list[tuple[Any, ...]] = []

    def recording(seed: int, purpose: Purpose, *place: int) -> np.random.Generator:
        drawn.append((purpose, *place))
        return generator(seed, purpose, *place)

    monkeypatch.setattr(order_module, "generator", recording)
    order = SampleOrder([1000] * 5000, seed=0, window=16)
    tracemalloc.start()
    try:
        order.sample(3 * 5_000_000 + 1_234_567)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert drawn == [(Purpose.SHARD_ORDER, 3), (Purpose.SAMPLE_ORDER, 3, 1_234_567 // 16_000)]
    assert peak_bytes < 2 * 2**20, "a permutation of the whole epoch takes 40 MB"


def test_the_shards_of_the_window_come_first_when_fetching_ahead() -> None:
    order = SampleOrder([3, 0, 5, 4, 2], seed=0, window=2)
    for position in range(40):
        ahead = order.shards_ahead(position)
        assert order.sample(position).shard in ahead[:2]
        assert 1 not in ahead, "nothing to fetch in an empty shard"


@pytest.mark.parametrize(
    ("sizes", "window", "message"),
    [([0, 0], 1, "at least one sample, got none in 2 shards"), ([3], 0, "window must be at least 1")],
)
def test_nothing_to_order_is_an_error(sizes: list[int], window: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SampleOrder(sizes, seed=0, window=window)


def test_a_batch_that_does_not_divide_is_an_error() -> None:
    with pytest.raises(ValueError, match="batch of 10 must be divisible by the 4 workers"):
        SampleOrder([5], seed=0, window=1).slice(0, 10, 0, 4)
