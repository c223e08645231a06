"""Noise from (seed, position): normal, and the same whoever draws it."""

import math

import pytest
import torch

from pipelines.shards.randomness import Purpose, words
from pipelines.training.noise import standard_normal

SHAPE = (4, 16, 16)


def test_it_is_normal_and_independent_between_samples_and_elements() -> None:
    noise = standard_normal(3, Purpose.NOISE, torch.arange(1000), SHAPE).double()
    values = noise.flatten()
    moments = [float(values.pow(power).mean()) for power in range(1, 7)]
    assert moments == pytest.approx([0, 1, 0, 3, 0, 15], abs=0.15)
    assert moments[:2] == pytest.approx([0, 1], abs=0.005)
    for bound in (-2.0, -0.5, 0.3, 1.0, 2.5):
        expected = 0.5 * (1 + math.erf(bound / math.sqrt(2)))
        assert float((values < bound).double().mean()) == pytest.approx(expected, abs=0.002)
    by_sample = noise.flatten(1)
    for shifted in (by_sample.roll(1, 0), by_sample.roll(1, 1), by_sample.roll(by_sample.shape[1] // 4, 1)):
        assert abs(float((by_sample * shifted).mean())) < 0.005
        # Both numbers of a Box-Muller pair share a radius: neither may they be dependent.
        assert abs(float((by_sample.square() * shifted.square()).mean()) - 1) < 0.02


def test_a_sample_has_its_noise_in_whatever_batch() -> None:
    positions = torch.tensor([5, 0, 2**40 + 7, 2**31, 2**62])
    whole = standard_normal(1, Purpose.NOISE, positions, SHAPE)
    assert whole.shape == (5, *SHAPE)
    assert whole.dtype == torch.float32
    for number in range(5):
        assert torch.equal(standard_normal(1, Purpose.NOISE, positions[number : number + 1], SHAPE)[0], whole[number])
    for other in (
        standard_normal(2, Purpose.NOISE, positions, SHAPE),
        standard_normal(1, Purpose.POSTERIOR, positions, SHAPE),
        standard_normal(1, Purpose.NOISE, positions + 1, SHAPE),
    ):
        assert not torch.isclose(other, whole).flatten(1).all(dim=1).any()


@pytest.mark.parametrize("elements", [1, 3, 4, 7])
def test_any_number_of_elements_is_drawn(elements: int) -> None:
    noise = standard_normal(1, Purpose.NOISE, torch.arange(50), (elements,))
    assert noise.shape == (50, elements)
    assert len(noise.unique()) == noise.numel()


def test_its_first_numbers_are_box_mullers_of_philox() -> None:
    """With float64 and math's functions: the same to the last bits."""
    positions = torch.arange(20)
    found = standard_normal(9, Purpose.NOISE, positions, (4,))
    for position, numbers in zip(positions.tolist(), found.tolist(), strict=True):
        drawn = words(9, Purpose.NOISE, positions.numpy()[position : position + 1])[:, 0].tolist()
        expected = []
        for first, second in (drawn[:2], drawn[2:]):
            radius = math.sqrt(-2 * math.log((first + 0.5) / 2**32))
            expected += [
                radius * math.cos(2 * math.pi * second / 2**32),
                radius * math.sin(2 * math.pi * second / 2**32),
            ]
        assert numbers == pytest.approx(expected, abs=2e-6)
