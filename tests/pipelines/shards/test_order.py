"""The order of samples: complete, shuffled, the same for any number of workers, and free to skip in."""

import tracemalloc
from collections import Counter
from typing import Any

import numpy as np
import pytest

from pipelines.errors import MisuseError
from pipelines.shards import order as order_module
from pipelines.shards.order import Place, SampleOrder
from pipelines.shards.randomness import Purpose, generator

WORLDS = (1, 2, 3, 5, 8)


def shard_sizes(random: np.random.Generator) -> list[int]:
    sizes = [int(size) for size in random.integers(0, 12, int(random.integers(1, 20)))]
    return sizes if sum(sizes) else [1]


def places_of(sizes: list[int]) -> list[Place]:
    return [(shard, row) for shard, rows in enumerate(sizes) for row in range(rows)]


def any_order(case: int, **changes: Any) -> tuple[SampleOrder, list[Place]]:
    """Return an order of random shards, batch size and partitions, with the samples that it must show."""
    random = np.random.default_rng(case)
    sizes = [*shard_sizes(random), 3]
    everything = places_of(sizes)
    excluded = {place for place in everything[:-1] if random.random() < random.choice([0, 0.4])}
    options = {"batch_size": int(random.integers(1, 30)), "partitions": int(random.integers(1, 20)), **changes}
    order = SampleOrder(sizes, seed=case, window=int(random.integers(1, 12)), excluded=excluded, **options)
    return order, [place for place in everything if place not in excluded]


def global_batch(order: SampleOrder, step: int, world: int) -> list[Any]:
    return [sample for rank in range(world) for sample in order.slice(step, rank, world)]


def steps_of_epochs(order: SampleOrder, epochs: int) -> int:
    """Return after how many steps all partitions have shown so many epochs."""
    return -(-(epochs * order.samples_per_epoch + order.partitions) // order.batch_size) + 1


@pytest.mark.parametrize("case", range(30))
def test_each_epoch_sees_each_sample_but_the_excluded_exactly_once(case: int) -> None:
    order, expected = any_order(case)
    assert order.samples_per_epoch == len(expected)
    samples = [sample for step in range(steps_of_epochs(order, 3)) for sample in order.slice(step, 0, 1)]
    for epoch in range(3):
        assert sorted(sample.place for sample in samples if sample.epoch == epoch) == expected


@pytest.mark.parametrize("case", range(5))
def test_any_number_of_workers_reads_the_same_global_batches_for_three_epochs(case: int) -> None:
    sizes = [int(size) for size in np.random.default_rng(case).integers(0, 40, 40)]
    reference = SampleOrder(sizes, seed=7, window=30, batch_size=120, partitions=120)
    assert reference.partitions == 120
    orders = {world: SampleOrder(sizes, seed=7, window=30, batch_size=120, partitions=120) for world in WORLDS}
    seen: Counter[Place] = Counter()
    for step in range(steps_of_epochs(reference, 3)):
        batch = global_batch(reference, step, 1)
        assert [sample.position for sample in batch] == list(range(120 * step, 120 * step + 120))
        for world, order in orders.items():
            assert global_batch(order, step, world) == batch
        seen.update(sample.place for sample in batch if sample.epoch < 3)
    assert seen == Counter(dict.fromkeys(places_of(sizes), 3))


@pytest.mark.parametrize("case", range(15))
def test_stopping_anywhere_and_going_on_with_another_number_of_workers_changes_nothing(case: int) -> None:
    random = np.random.default_rng(300 + case)
    batch_size = 120 * int(random.integers(1, 3))
    order, places = any_order(case, batch_size=batch_size, partitions=int(random.integers(1, 130)))
    allowed = [world for world in WORLDS if order.partitions % world == 0]
    uninterrupted = [global_batch(order, step, 1) for step in range(12)]
    step = 0
    while step < 12:
        # Every start is a new process, which knows nothing but the step.
        restarted, _ = any_order(case, batch_size=batch_size, partitions=order.partitions)
        world, stop = int(random.choice(allowed)), int(random.integers(step, 13))
        for each in range(step, stop):
            assert global_batch(restarted, each, world) == uninterrupted[each]
        step = stop
    assert {sample.place for batch in uninterrupted for sample in batch} <= set(places)


@pytest.mark.parametrize("case", range(20))
def test_no_partition_ever_runs_ahead_of_another_by_more_than_a_sample_an_epoch(case: int) -> None:
    order, expected = any_order(case)
    seen = Counter(sample.place for step in range(200) for sample in order.slice(step, 0, 1))
    epochs = 200 * order.batch_size / len(expected)
    assert set(seen) == set(expected)
    assert max(seen.values()) <= epochs + 2
    assert min(seen.values()) >= epochs - 2


def test_a_position_names_the_sample_that_its_batch_has_there() -> None:
    order, _ = any_order(5, batch_size=24)
    batches = [sample for step in range(20) for sample in order.slice(step, 0, 1)]
    assert [order.sample(position) for position in reversed(range(len(batches)))] == batches[::-1]


def test_one_partition_is_a_permutation_of_everything_an_epoch() -> None:
    order = SampleOrder([50, 50], seed=1, window=2, batch_size=10, partitions=1)
    other = SampleOrder([50, 50], seed=2, window=2, batch_size=10, partitions=1)
    epochs = [[order.sample(100 * epoch + i).place for i in range(100)] for epoch in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == places_of([50, 50])
    assert epochs[0] != epochs[1]
    assert epochs[0] != [other.sample(i).place for i in range(100)]


def test_samples_are_mixed_within_a_window_and_no_further() -> None:
    order = SampleOrder([10] * 8, seed=0, window=2, batch_size=20, partitions=1)
    for window in range(4):
        shards = [sample.shard for sample in order.slice(window, 0, 1)]
        assert len(set(shards)) == 2
        assert shards != sorted(shards), "the shards of a window must be mixed"


def test_the_window_is_of_all_partitions_together() -> None:
    order = SampleOrder([10] * 64, seed=0, window=16, batch_size=8, partitions=8)
    shards = {sample.shard for step in range(20) for sample in order.slice(step, 0, 1)}
    assert len(shards) == 16


def test_a_batch_takes_the_same_number_of_samples_from_each_range_of_shards() -> None:
    order = SampleOrder([5] * 40, seed=0, window=8, batch_size=16, partitions=4)
    for step in range(12):
        assert [sample.shard // 10 for sample in order.slice(step, 0, 1)] == [p for p in range(4) for _ in range(4)]


@pytest.mark.parametrize(
    ("batch_size", "most", "samples", "partitions"),
    [(64, 64, 1000, 64), (64, 64, 50, 32), (96, 64, 1000, 48), (7, 64, 1000, 7), (64, 1, 9, 1), (120, 120, 120, 120)],
)
def test_the_partitions_are_the_most_that_share_a_batch_equally_and_have_samples(
    batch_size: int, most: int, samples: int, partitions: int
) -> None:
    order = SampleOrder([samples], seed=0, window=1, batch_size=batch_size, partitions=most)
    assert order.partitions == partitions


def test_skipping_shuffles_nothing_but_the_pieces_of_the_epoch_and_the_samples_of_the_window(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn: list[tuple[Any, ...]] = []

    def recording(seed: int, purpose: Purpose, *place: int) -> np.random.Generator:
        drawn.append((purpose, *place))
        return generator(seed, purpose, *place)

    monkeypatch.setattr(order_module, "generator", recording)
    order = SampleOrder([1000] * 5000, seed=0, window=16, batch_size=100, partitions=4)
    step = (3 * 5_000_000 + 1_234_500) // 100
    tracemalloc.start()
    try:
        order.slice(step, 1, 2)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    window = 1_234_500 // 4 // 4_000
    assert drawn == [
        (Purpose.SHARD_ORDER, 3, 2),
        (Purpose.SAMPLE_ORDER, 3, 4 * window + 2),
        (Purpose.SHARD_ORDER, 3, 3),
        (Purpose.SAMPLE_ORDER, 3, 4 * window + 3),
    ]
    assert peak_bytes < 2 * 2**20, "a permutation of the whole epoch takes 40 MB"


def test_a_huge_set_is_begun_in_the_middle_with_little_memory() -> None:
    rows = np.full(400_000, 2500)
    tracemalloc.start()
    try:
        order = SampleOrder(rows, seed=0, window=16, batch_size=2048, partitions=64)
        step = 2_500_000_000 // 2048
        batch = order.slice(step, 3, 64)
        ahead = order.shards_ahead(step, 3, 64)
        kept_bytes, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert [sample.epoch for sample in batch] == [2] * 32
    assert {sample.shard for sample in batch} <= set(ahead)
    assert all(3 * 6250 <= shard < 4 * 6250 for shard in ahead)
    assert kept_bytes < 8 * 2**20, "two numbers a shard, and its own partitions"


@pytest.mark.parametrize(("case", "world"), [(case, world) for case in range(4) for world in (1, 2)])
def test_what_a_batch_needs_is_fetched_ahead_at_whatever_step_training_goes_on(case: int, world: int) -> None:
    sizes = [int(size) for size in np.random.default_rng(case).integers(0, 12, 50)]

    def begin() -> SampleOrder:
        return SampleOrder(sizes, seed=case, window=9, batch_size=[12, 20, 60, 4][case], partitions=4)

    for rank in range(world):
        order = begin()
        for step in range(100):
            ahead = order.shards_ahead(step, rank, world)
            assert {sample.shard for sample in order.slice(step, rank, world)} <= set(ahead)
            assert len(ahead) == len(set(ahead))
            assert ahead == begin().shards_ahead(step, rank, world)


def test_the_shards_in_use_come_before_those_of_the_next_windows() -> None:
    order = SampleOrder([10] * 64, seed=0, window=16, batch_size=8, partitions=8)
    for step in range(0, 400, 7):
        ahead = order.shards_ahead(step, 0, 1)
        window_end = step - step % 20 + 20
        in_use = {sample.shard for each in range(window_end - 20, window_end) for sample in order.slice(each, 0, 1)}
        assert set(ahead[:16]) == in_use
        # At the end of an epoch the next window may hold a shard that is in use.
        assert 24 <= len(ahead) <= 32


def test_a_shard_of_excluded_samples_alone_is_not_fetched() -> None:
    excluded = [(1, 0), (1, 1), (2, 4)]
    order = SampleOrder([3, 2, 5, 0], seed=0, window=1, batch_size=2, partitions=2, excluded=excluded)
    assert order.samples_per_epoch == 7
    assert {shard for step in range(14) for shard in order.shards_ahead(step, 0, 1)} == {0, 2}


def test_a_node_fetches_its_share_of_the_shards_and_hardly_more() -> None:
    nodes, world, shards, epochs = 4, 8, 2003, 3
    sizes = [int(size) for size in np.random.default_rng(0).integers(10, 30, shards)]
    orders = [SampleOrder(sizes, seed=0, window=64, batch_size=64, partitions=64) for _ in range(world)]
    # With the smallest cache: what nobody on the node needs soon is gone.
    fetches, kept = [0] * nodes, [set[int]() for _ in range(nodes)]
    for step in range(epochs * orders[0].samples_per_epoch // 64):
        for node in range(nodes):
            ahead = {
                shard for rank in (2 * node, 2 * node + 1) for shard in orders[rank].shards_ahead(step, rank, world)
            }
            fetches[node] += len(ahead - kept[node])
            kept[node] = ahead
    assert max(fetches) <= 1.1 * epochs * shards / nodes
    assert min(fetches) >= 0.9 * epochs * shards / nodes


@pytest.mark.parametrize(
    ("sizes", "window", "message"),
    [([0, 0], 1, "at least one sample, got none in 2 shards"), ([3], 0, "window must be at least 1")],
)
def test_nothing_to_order_is_an_error(sizes: list[int], window: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SampleOrder(sizes, seed=0, window=window, batch_size=1, partitions=1)


def test_workers_that_cannot_share_the_partitions_are_refused_with_the_numbers_that_can() -> None:
    order = SampleOrder([10], seed=0, window=1, batch_size=64, partitions=64)
    with pytest.raises(
        MisuseError,
        match=r"^training.workers must be one of 1, 2, 4, 8, to share 8 partitions of the samples equally "
        r"\(batch_size 64, at most 64, 10 samples\), got 16; another training.partitions or batch_size allows others, "
        "and begins another training$",
    ):
        order.slice(0, 0, 16)
    with pytest.raises(MisuseError, match=r"must be one of 1, 2, 4, 8, .* got 3;"):
        order.shards_ahead(0, 0, 3)


def test_numbers_of_more_samples_than_32_bits_hold_are_right() -> None:
    order = SampleOrder([2**20] * 4100, 0, 1, batch_size=4, partitions=4)
    assert order.samples_per_epoch > 2**32
    found = [order.sample(position) for position in range(4)]
    # Each partition reads its quarter of the shards.
    assert [sample.shard * 4 // 4100 for sample in found] == [0, 1, 2, 3]
    assert all(sample.row < 2**20 for sample in found)
