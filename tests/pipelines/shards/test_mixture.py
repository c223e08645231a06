"""Several sets in one sequence: each whole, in its share at any time, the same for any number of workers."""

import itertools
import tracemalloc
from collections import Counter
from typing import Any

import numpy as np
import pytest

from pipelines.errors import MisuseError
from pipelines.shards.mixture import Mixture, Part, Turns
from pipelines.shards.order import SampleOrder, SamplePosition

WORLDS = (1, 2, 3, 5, 8)


def any_parts(random: np.random.Generator, count: int, least: int = 1) -> list[Part]:
    """Return sets of random shards, some samples of which are left out, and random weights."""
    parts = []
    most = int(random.choice([1, 9, 25_000]))
    for _ in range(count):
        sizes = [*random.integers(0, 12, int(random.integers(1, 12))).tolist(), least]
        places = [(shard, row) for shard, rows in enumerate(sizes[:-1]) for row in range(rows)]
        excluded = [place for place in places if random.random() < random.choice([0, 0.3])]
        parts.append(Part(sizes, excluded, int(random.integers(-(-most // 8), most + 1))))
    return parts


def any_mixture(case: int, **changes: Any) -> tuple[Mixture, list[Part]]:
    random = np.random.default_rng(case)
    parts = any_parts(random, int(random.integers(1, 5)), changes.pop("least", 1))
    options = {"batch_size": int(random.integers(1, 30)), "partitions": int(random.integers(1, 20)), **changes}
    return Mixture(parts, case, int(random.integers(1, 12)), **options), parts


def global_batch(order: Mixture, step: int, world: int = 1) -> list[SamplePosition]:
    return [sample for rank in range(world) for sample in order.slice(step, rank, world)]


def part_of(parts: list[Part], sample: SamplePosition) -> tuple[int, tuple[int, int]]:
    """Return the set that a sample is of, and its place there."""
    shard = sample.shard
    for number, part in enumerate(parts):
        if shard < len(part.rows_per_shard):
            return number, (shard, sample.row)
        shard -= len(part.rows_per_shard)
    raise AssertionError(sample)


@pytest.mark.parametrize("case", range(12))
def test_each_epoch_of_a_set_sees_each_of_its_samples_but_the_excluded_exactly_once(case: int) -> None:
    order, parts = any_mixture(case)
    slowest = max(sum(map(int, part.rows_per_shard)) / part.weight for part in parts)
    samples = 3.5 * slowest * sum(part.weight for part in parts) + 4 * order.batch_size
    seen: dict[tuple[int, int], list[Any]] = {}
    for step in range(int(samples) // order.batch_size):
        for sample in order.slice(step, 0, 1):
            number, place = part_of(parts, sample)
            seen.setdefault((number, sample.epoch), []).append(place)
    for number, part in enumerate(parts):
        every = {(shard, row) for shard, rows in enumerate(part.rows_per_shard) for row in range(rows)}
        expected = sorted(every - set(part.excluded))
        epochs = sorted(epoch for other, epoch in seen if other == number)
        for epoch in epochs:
            # Those at the end may be under way in some partitions.
            assert len(set(seen[number, epoch])) == len(seen[number, epoch])
            if epoch <= max(2, max(epochs) - 2):
                assert sorted(seen[number, epoch]) == expected


@pytest.mark.parametrize("case", range(20))
def test_the_shares_are_those_of_the_weights_at_any_time_in_all_and_in_each_partition(case: int) -> None:
    order, parts = any_mixture(case)
    shares = [part.weight / sum(part.weight for part in parts) for part in parts]
    slice_size = order.batch_size // order.partitions
    batches = [[part_of(parts, sample)[0] for sample in order.slice(step, 0, 1)] for step in range(300)]
    table = np.array(batches).reshape(300, order.partitions, slice_size)
    for number, share in enumerate(shares):
        mine = np.cumsum((table == number).sum(axis=2), axis=0)
        expected = share * slice_size * np.arange(1, 301)
        # Two sets: less than a sample; each further one adds at most one.
        most = max(len(parts) - 1, 0)
        assert np.abs(mine - expected[:, None]).max() <= most
        assert np.abs(mine.sum(axis=1) - order.partitions * expected).max() <= (most if len(parts) == 2 else 4 * most)


def test_no_batch_has_more_or_less_of_a_set_than_its_share_by_a_sample() -> None:
    order = Mixture([Part([500], (), 8), Part([300], (), 2)], 0, 4, batch_size=64, partitions=64)
    shares = [sum(sample.shard == 1 for sample in order.slice(step, 0, 1)) for step in range(500)]
    assert set(shares) == {12, 13}
    assert sum(shares) == pytest.approx(0.2 * 64 * 500, abs=1)


@pytest.mark.parametrize("case", range(5))
def test_any_number_of_workers_reads_the_same_global_batches(case: int) -> None:
    orders = {world: any_mixture(case, batch_size=240, partitions=120, least=120) for world in WORLDS}
    assert orders[1][0].partitions == 120
    for step in range(12):
        batch = global_batch(orders[1][0], step)
        assert [sample.position for sample in batch] == list(range(240 * step, 240 * step + 240))
        for world, (order, _) in orders.items():
            assert global_batch(order, step, world) == batch


@pytest.mark.parametrize("case", range(15))
def test_stopping_anywhere_and_going_on_with_another_number_of_workers_changes_nothing(case: int) -> None:
    random = np.random.default_rng(300 + case)
    options = {"batch_size": 120 * int(random.integers(1, 3)), "partitions": int(random.integers(1, 130)), "least": 60}
    order, _ = any_mixture(case, **options)
    allowed = [world for world in WORLDS if order.partitions % world == 0]
    begun = int(random.choice([0, 10**6]))
    uninterrupted = [global_batch(order, begun + step) for step in range(12)]
    step = 0
    while step < 12:
        # Every start is a new process, which knows nothing but the step.
        restarted, _ = any_mixture(case, **options)
        world, stop = int(random.choice(allowed)), int(random.integers(step, 13))
        for each in range(step, stop):
            assert global_batch(restarted, begun + each, world) == uninterrupted[each]
        step = stop


@pytest.mark.parametrize("case", range(10))
def test_one_set_alone_is_in_its_own_order(case: int) -> None:
    random = np.random.default_rng(case)
    (part,) = any_parts(random, 1)
    options = {"batch_size": int(random.integers(1, 30)), "partitions": int(random.integers(1, 20))}
    mixture = Mixture([part], case, 3, **options)
    alone = SampleOrder(part.rows_per_shard, case, 3, excluded=part.excluded, **options)
    assert (mixture.partitions, mixture.samples_per_epoch) == (alone.partitions, alone.samples_per_epoch)
    for step in (0, 1, 2, 50, 51, 10**6):
        assert mixture.slice(step, 0, 1) == alone.slice(step, 0, 1)
        assert mixture.shards_ahead(step, 0, 1) == alone.shards_ahead(step, 0, 1)


def test_in_a_mixture_too_a_set_is_in_its_own_order() -> None:
    parts = [Part([40, 30], (), 3), Part([25, 0, 10], (), 1)]
    mixture = Mixture(parts, 5, 2, batch_size=8, partitions=1)
    samples = [sample for step in range(100) for sample in mixture.slice(step, 0, 1)]
    for number, first in ((0, 0), (1, 2)):
        mine = [s for s in samples if part_of(parts, s)[0] == number]
        alone = SampleOrder(parts[number].rows_per_shard, 5 + number, 2, batch_size=1, partitions=1)
        expected = [alone.sample(position) for position in range(len(mine))]
        assert [(s.epoch, s.shard - first, s.row) for s in mine] == [(s.epoch, s.shard, s.row) for s in expected]


def test_a_position_names_the_sample_that_its_batch_has_there() -> None:
    order, _ = any_mixture(2, batch_size=24)
    batches = [sample for step in range(20) for sample in order.slice(step, 0, 1)]
    assert [order.sample(position) for position in reversed(range(len(batches)))] == batches[::-1]


@pytest.mark.parametrize(("case", "world"), [(case, world) for case in range(6) for world in (1, 2)])
def test_what_a_batch_needs_is_fetched_ahead_at_whatever_step_training_goes_on(case: int, world: int) -> None:
    options = {"batch_size": [12, 20, 60, 4, 8, 4][case], "partitions": 4, "least": 4}
    for rank in range(world):
        order, _ = any_mixture(case, **options)
        for step in range(60):
            ahead = order.shards_ahead(step, rank, world)
            assert {sample.shard for sample in order.slice(step, rank, world)} <= set(ahead)
            assert len(ahead) == len(set(ahead))
            assert ahead == any_mixture(case, **options)[0].shards_ahead(step, rank, world)


def test_what_is_needed_first_is_fetched_first() -> None:
    order = Mixture([Part([10] * 20, (), 9), Part([10] * 20, (), 1)], 0, 1, batch_size=10, partitions=1)
    used = [{sample.shard for sample in order.slice(step, 0, 1)} for step in range(120)]
    for step in range(80):
        ahead = order.shards_ahead(step, 0, 1)
        first_use = {shard: next(each for each in range(step, 120) if shard in used[each]) for shard in ahead}
        # A shard of the rare set serves ten steps: one is in use, and the next one is the last that is needed.
        assert [shard >= 20 for shard in ahead].count(True) == 2
        assert ahead[-1] >= 20
        assert sorted(ahead[1:], key=lambda shard: max(first_use[shard], step + 1)) == ahead[1:]


def test_a_huge_set_is_begun_in_the_middle_with_little_memory() -> None:
    rows = np.full(400_000, 2500)
    tracemalloc.start()
    try:
        order = Mixture([Part(rows, (), 7), Part(rows[:1000], (), 3)], 0, 16, batch_size=2048, partitions=64)
        step = 1_500_000_000 // 2048
        batch = order.slice(step, 3, 64)
        ahead = order.shards_ahead(step, 3, 64)
        kept_bytes, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert {sample.shard for sample in batch} <= set(ahead)
    # 0.7 of 1.5e9 samples are an epoch of the first set, 0.3 of them 180 epochs of the second.
    assert Counter(sample.shard < 400_000 for sample in batch) == {True: 22, False: 10}
    assert {sample.epoch for sample in batch if sample.shard < 400_000} == {1}
    assert {sample.epoch for sample in batch if sample.shard >= 400_000} <= {179, 180}
    assert all(3 * 6250 - 1 <= shard <= 4 * 6250 for shard in ahead if shard < 400_000)
    assert kept_bytes < 16 * 2**20, "two numbers a shard, and its own partitions"


@pytest.mark.parametrize("case", range(10))
def test_how_often_a_stream_had_its_turn_tells_the_place_of_the_next(case: int) -> None:
    random = np.random.default_rng(case)
    weights = [int(random.choice([1, 300, 200_000]) + random.integers(0, 9)) for _ in range(random.integers(1, 5))]
    turns = Turns(weights, int(random.integers(1, 70)))
    partitions = np.arange(turns.partitions)
    for first in (0, 10**12):
        places = first + np.arange(40)
        streams, numbers = turns.at(partitions[:, None], places[None])
        for partition, column in itertools.product(partitions.tolist(), range(40)):
            stream, number = int(streams[partition, column]), int(numbers[partition, column])
            assert turns.place(stream, partition, number) == first + column
            assert turns.before(partitions, first + column)[stream, partition] == number


def test_there_are_no_more_partitions_than_the_smallest_set_has_samples() -> None:
    order = Mixture([Part([1000], (), 1), Part([11], [(0, 3)], 1)], 0, 1, batch_size=64, partitions=64)
    assert order.partitions == 8
    with pytest.raises(MisuseError, match=r"must be one of 1, 2, 4, 8, .*\(batch_size 64, at most 64, 10 samples\)"):
        order.slice(0, 0, 16)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([Part([3], (), 1), Part([0], (), 1)], "at least one sample, got none in 1 shards"),
        ([Part([3], (), 0)], r"weights must be positive and their sum at most 2147483648, got \[0\]"),
        ([Part([3], (), 1), Part([3], (), 2**31)], "their sum at most 2147483648"),
    ],
)
def test_what_cannot_be_mixed_is_an_error(parts: list[Part], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Mixture(parts, 0, 1, batch_size=1, partitions=1)
