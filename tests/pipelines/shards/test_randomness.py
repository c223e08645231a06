"""Random numbers by what they are for."""

import time

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


def test_a_batch_costs_little() -> None:
    """64 samples of the tiny latents; process time, since the machine may be busy with other things."""
    noise = np.empty((64, 2, 4, 8, 8), np.float32)
    best = np.inf
    for _ in range(20):
        started = time.process_time()
        for place in range(64):
            random = generator(0, Purpose.SAMPLE, place)
            random.integers(1000)
            random.standard_normal(out=noise[place], dtype=np.float32)
        best = min(best, time.process_time() - started)
    assert best < 0.01
