"""Random numbers by what they are for."""

import numpy as np
import pytest
import torch

from pipelines.shards.randomness import Purpose, generator, philox, words

PI = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)
# Counter, key and result of Philox4x32-10, from the known answers that its authors publish with Random123.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (*PI, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
]


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


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
@pytest.mark.parametrize("array", [lambda word: np.array([word]), lambda word: torch.tensor([word])])
def test_philox_gives_the_known_answers_in_numpy_and_in_torch(
    array: object, counter: tuple[int, ...], key: tuple[int, int], expected: tuple[int, ...]
) -> None:
    assert callable(array)
    found = philox(tuple(map(array, counter)), key)  # type: ignore[arg-type]
    assert tuple(int(word[0]) for word in found) == expected


def test_words_depend_on_seed_purpose_and_place_alone() -> None:
    places = np.array([0, 1, 2**31, 2**32, 2**40 + 3, 2**62])
    whole = words(-5, Purpose.CHOICES, places)
    assert whole.shape == (4, 6)
    assert (whole >= 0).all()
    assert (whole < 2**32).all()
    for number, place in enumerate(places):
        assert np.array_equal(words(-5, Purpose.CHOICES, places[number : number + 1])[:, 0], whole[:, number]), place
    assert len(np.unique(whole)) == whole.size
    assert not np.array_equal(words(-5, Purpose.NOISE, places), whole)
    assert not np.array_equal(words(-5 + 2**32, Purpose.CHOICES, places), whole)
    assert np.array_equal(words(-5 + 2**64, Purpose.CHOICES, places), whole)


def test_words_are_uniform_and_their_neighbours_independent() -> None:
    uniform = words(7, Purpose.CHOICES, np.arange(20_000)) / 2**32
    assert np.allclose(uniform.mean(axis=1), 0.5, atol=0.01)
    assert np.allclose(uniform.var(axis=1), 1 / 12, atol=0.003)
    for word in uniform:
        counts, _ = np.histogram(word, 20, (0, 1))
        assert (np.square(counts - 1000) / 1000).sum() < 50
        assert abs(np.corrcoef(word[:-1], word[1:])[0, 1]) < 0.03
