"""Batches of one size each: every sample as often as the others, and the same batches for any number of workers."""

from collections import Counter
from typing import Any

import numpy as np
import pytest

from pipelines.errors import MisuseError
from pipelines.shards.buckets import BucketOrder, bucket_of
from pipelines.shards.order import Place, SampleOrder, SamplePosition
from pipelines.stages.pairs.shard.files import tar_name

WORLDS = (1, 2, 3, 5, 8)
SIZES = ("256x256", "320x192", "192x320", "384x128")


class Case:
    """Random shards of several buckets, some samples of which are left out."""

    def __init__(self, case: int, least: int = 1, **options: int) -> None:
        random = np.random.default_rng(case)
        self.buckets = [
            *random.choice(SIZES[: int(random.integers(1, 5))], int(random.integers(1, 25))).tolist(),
            "1x1",
        ]
        self.rows = [*random.integers(0, 12, len(self.buckets) - 1).tolist(), least]
        if least > 1:
            self.rows = [rows + least for rows in self.rows]
        places = [(shard, row) for shard, rows in enumerate(self.rows) for row in range(rows)]
        self.excluded = [place for place in places[:-1] if least == 1 and random.random() < 0.2]
        self.kept: list[Place] = [place for place in places if place not in set(self.excluded)]
        self.seed, self.window = case, int(random.integers(1, 9))
        self.options = {"batch_size": int(random.integers(1, 20)), "partitions": int(random.integers(1, 20)), **options}

    def order(self) -> BucketOrder:
        return BucketOrder(self.rows, self.buckets, self.seed, self.window, excluded=self.excluded, **self.options)


def global_batch(order: Any, step: int, world: int = 1) -> list[SamplePosition]:
    return [sample for rank in range(world) for sample in order.slice(step, rank, world)]


@pytest.mark.parametrize("case", range(15))
def test_a_batch_holds_one_bucket_and_no_sample_is_ahead_of_others(case: int) -> None:
    shards = Case(case)
    order, seen = shards.order(), Counter[Place]()
    assert order.samples_per_epoch == len(shards.kept)
    steps = 4 * len(shards.kept) // order.batch_size + 1
    for step in range(steps):
        batch = order.slice(step, 0, 1)
        assert {shards.buckets[sample.shard] for sample in batch} == {order.bucket(step)}
        seen.update(sample.place for sample in batch)
    assert set(seen) <= set(shards.kept)
    epochs = steps * order.batch_size / len(shards.kept)
    for bucket in order.buckets:
        mine = [place for place in shards.kept if shards.buckets[place[0]] == bucket]
        # To within the batches of a bucket that it may be ahead or behind, shared among its samples.
        slack = 2 + len(order.buckets) * order.batch_size / len(mine)
        for place in mine:
            assert abs(seen[place] - epochs) <= slack


@pytest.mark.parametrize("case", range(8))
def test_each_epoch_of_a_bucket_sees_each_of_its_samples_exactly_once(case: int) -> None:
    shards = Case(case)
    order = shards.order()
    seen: dict[tuple[str, int], list[Place]] = {}
    for step in range(6 * len(shards.kept) // order.batch_size + 6 * len(order.buckets)):
        for sample in order.slice(step, 0, 1):
            seen.setdefault((shards.buckets[sample.shard], sample.epoch), []).append(sample.place)
    for bucket in order.buckets:
        expected = [place for place in shards.kept if shards.buckets[place[0]] == bucket]
        for epoch in range(2):
            assert sorted(seen[bucket, epoch]) == expected


@pytest.mark.parametrize("case", range(10))
def test_stopping_anywhere_and_going_on_with_another_number_of_workers_changes_nothing(case: int) -> None:
    random = np.random.default_rng(case)
    shards = Case(case, least=120, batch_size=240, partitions=120)
    uninterrupted = [global_batch(shards.order(), step) for step in range(10)]
    for step, batch in enumerate(uninterrupted):
        assert [sample.position for sample in batch] == list(range(240 * step, 240 * step + 240))
    step = 0
    while step < 10:
        # Every start is a new process, which knows nothing but the step.
        restarted, world, stop = shards.order(), int(random.choice(WORLDS)), int(random.integers(step, 11))
        for each in range(step, stop):
            assert global_batch(restarted, each, world) == uninterrupted[each]
        step = stop


def test_a_position_names_the_sample_that_its_batch_has_there() -> None:
    order = Case(3, batch_size=12).order()
    batches = [sample for step in range(20) for sample in order.slice(step, 0, 1)]
    assert [order.sample(position) for position in reversed(range(len(batches)))] == batches[::-1]


@pytest.mark.parametrize("case", range(6))
def test_what_a_batch_needs_is_fetched_ahead(case: int) -> None:
    shards = Case(case, least=4, batch_size=8, partitions=4)
    for rank in range(2):
        order = shards.order()
        for step in range(40):
            ahead = order.shards_ahead(step, rank, 2)
            assert {sample.shard for sample in order.slice(step, rank, 2)} <= set(ahead)
            assert len(ahead) == len(set(ahead))
            assert ahead == shards.order().shards_ahead(step, rank, 2)


def test_one_bucket_alone_is_in_its_own_order() -> None:
    rows, options = [5, 0, 7, 3], {"batch_size": 6, "partitions": 3, "excluded": [(2, 1)]}
    alone = SampleOrder(rows, 4, 2, **options)  # type: ignore[arg-type]
    order = BucketOrder(rows, [""] * 4, 4, 2, **options)  # type: ignore[arg-type]
    for step in (0, 1, 2, 77, 10**9):
        assert order.slice(step, 0, 3) == alone.slice(step, 0, 3)
        assert order.shards_ahead(step, 1, 3) == alone.shards_ahead(step, 1, 3)


def test_many_samples_are_begun_in_the_middle() -> None:
    rows, buckets = np.full(400_000, 1000), [SIZES[shard % 4] for shard in range(400_000)]
    order = BucketOrder(rows, buckets, 0, 16, batch_size=2048, partitions=64)
    batch = order.slice(10**9 // 2048, 3, 64)
    assert {sample.epoch for sample in batch} == {2}
    assert {sample.shard for sample in batch} <= set(order.shards_ahead(10**9 // 2048, 3, 64))


def test_the_bucket_of_a_shard_is_in_its_name() -> None:
    assert bucket_of(tar_name(42, "320x192")) == "320x192"
    assert bucket_of(tar_name(42)) == ""


def test_the_smallest_bucket_bounds_the_workers() -> None:
    order = BucketOrder([100, 3], ["256x256", "320x192"], 0, 4, batch_size=8, partitions=8)
    assert order.partitions == 2
    with pytest.raises(MisuseError, match=r"training.workers must be one of 1, 2, .* got 8"):
        order.slice(0, 0, 8)


def test_no_samples_are_an_error() -> None:
    with pytest.raises(ValueError, match="at least one sample, got none in 2 shards"):
        BucketOrder([0, 0], ["256x256", "320x192"], 0, 4, batch_size=8, partitions=8)
