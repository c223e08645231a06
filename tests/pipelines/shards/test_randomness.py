"""Random numbers by what they are for."""

import numpy as np

from pipelines.shards.randomness import Purpose, generator


def test_the_same_place_always_draws_the_same_numbers() -> None:
    first = generator(5, Purpose.SAMPLE, 123).standard_normal(8)
    assert np.array_equal(first, generator(5, Purpose.SAMPLE, 123).standard_normal(8))


def test_no_two_places_share_numbers() -> None:
    places = (
        [(0, p, 0) for p in range(50)] + [(0, 3, i) for i in range(1, 50)] + [(s, 3, 0) for s in range(-2, 50) if s]
    )
    draws = {tuple(generator(s, Purpose.SAMPLE, p, i).integers(0, 2**60, 2)) for s, p, i in places}
    assert len(draws) == len(places)
    assert not np.array_equal(
        generator(0, Purpose.SAMPLE, 1).integers(0, 2**60, 4),
        generator(0, Purpose.SHARD_ORDER, 1).integers(0, 2**60, 4),
    )


def test_neighbouring_places_are_independent() -> None:
    draws = np.stack([generator(0, Purpose.SAMPLE, place).standard_normal(64) for place in range(500)])
    correlation = np.corrcoef(draws[:-1].ravel(), draws[1:].ravel())[0, 1]
    assert abs(correlation) < 0.02
    assert abs(draws.mean()) < 0.02
    assert abs(draws.std() - 1) < 0.02


def test_a_far_place_is_where_the_counter_starts_and_is_not_walked_to() -> None:
    state = generator(5, Purpose.SAMPLE, 2**60, inner=3).bit_generator.state["state"]
    assert state["key"].tolist() == [5, Purpose.SAMPLE]
    assert state["counter"].tolist() == [0, 0, 3, 2**60]
