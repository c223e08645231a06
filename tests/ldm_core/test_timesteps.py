"""The timesteps that a training draws: today's draws to the bit, published distributions, and clear refusals."""

import math

import numpy as np
import pytest
import torch

from ldm_core.configs.objective import TimestepsConfig
from ldm_core.configs.schedule import ScheduleConfig
from ldm_core.objective import DiffusionObjective
from ldm_core.schedule import NoiseSchedule
from ldm_core.timesteps import draw_timesteps, shifted

CHAIN, FLOW = ScheduleConfig(), ScheduleConfig(kind="rectified_flow")
UNIFORM = TimestepsConfig()
# Words of random bits as numbers, both ends included.
WORDS = np.concatenate([[0, 2**32 - 1], np.random.default_rng(0).integers(0, 2**32, 20_000)])


@pytest.mark.parametrize("timesteps", [2, 7, 1000, 4096])
def test_uniform_timesteps_of_a_chain_are_equal_parts_of_a_word(timesteps: int) -> None:
    drawn = draw_timesteps(WORDS * 2.0**-32, ScheduleConfig(timesteps=timesteps), UNIFORM)
    assert drawn.dtype == np.int64
    assert np.array_equal(drawn, WORDS * timesteps >> 32)


def test_uniform_times_of_a_flow_are_the_numbers_themselves_shifted() -> None:
    uniform = np.array([0.0, 0.25, 0.5, 0.75])
    drawn = draw_timesteps(uniform, FLOW, UNIFORM)
    assert drawn.dtype == np.float32
    assert drawn.tolist() == [0, 250, 500, 750]
    # Esser et al. 2024, Eq. (23) with alpha = 3, by hand.
    drawn = draw_timesteps(uniform, ScheduleConfig(kind="rectified_flow", shift=3.0), UNIFORM)
    assert drawn.tolist() == pytest.approx([0, 500, 750, 900])


def test_the_shift_keeps_the_uncertainty_of_a_larger_picture() -> None:
    # Esser et al. 2024, Sec. 5.3.2: with alpha^2 as many pixels the error of the estimated mean, t / (1 - t) / sqrt(n),
    # must stay the same.
    for t in (0.1, 0.5, 0.9):
        there = shifted(t, 2.0)
        assert there / (1 - there) / 2.0 == pytest.approx(t / (1 - t))


@pytest.mark.parametrize("shift", [0.05, 0.1, 0.3, 0.45, 1.0, 3.0, 5.95])
def test_a_shift_leaves_both_ends_exactly_where_they_are(shift: float) -> None:
    # A flow that began with a trace of signal would be divided by it.
    assert (shifted(0.0, shift), shifted(1.0, shift)) == (0, 1)


@pytest.mark.parametrize("schedule", [CHAIN, FLOW])
def test_logit_normal_timesteps_have_the_mean_and_deviation_of_their_logits(schedule: ScheduleConfig) -> None:
    drawn = draw_timesteps(WORDS * 2.0**-32, schedule, TimestepsConfig(kind="logit_normal", mean=-0.5, std=1.2))
    assert 0 <= drawn.min() <= drawn.max() <= schedule.timesteps
    # A chain's timestep is the whole part: its middle stands for it.
    time = (drawn.astype(np.float64) + (0 if schedule.is_flow else 0.5)) / schedule.timesteps
    logits = np.log(time[2:] / (1 - time[2:]))
    # 20,000 draws: the standard errors are 0.0085 and 0.006.
    assert logits.mean() == pytest.approx(-0.5, abs=0.035)
    assert logits.std() == pytest.approx(1.2, abs=0.03)


def test_the_median_of_the_logit_normal_distribution_is_the_sigmoid_of_its_mean() -> None:
    for mean in (-1.0, 0.0, 2.0):
        (drawn,) = draw_timesteps(np.array([0.5]), FLOW, TimestepsConfig(kind="logit_normal", mean=mean))
        assert drawn == pytest.approx(1000 / (1 + math.exp(-mean)), rel=1e-6)


def test_an_objective_draws_what_a_loader_draws_whatever_the_batch() -> None:
    config = TimestepsConfig(kind="logit_normal")
    objective = DiffusionObjective(NoiseSchedule(FLOW), parameterization="flow", timesteps=config)
    uniform = torch.rand(8, generator=torch.Generator().manual_seed(0))
    drawn = objective.timesteps(uniform)
    assert drawn.dtype == torch.float32
    assert drawn.tolist() == draw_timesteps(uniform.double().numpy(), FLOW, config).tolist()
    assert torch.equal(objective.timesteps(uniform[3:5]), drawn[3:5])
    assert DiffusionObjective(NoiseSchedule(CHAIN)).timesteps(uniform).dtype == torch.int64


def test_unusable_distributions_and_numbers_are_refused() -> None:
    for settings, message in (
        ({"kind": "cosine"}, "timesteps must be uniform or logit_normal, got 'cosine'"),
        ({"kind": "logit_normal", "std": 0.0}, "a finite mean and a positive std, got 0.0 and 0.0"),
        ({"kind": "logit_normal", "mean": math.nan}, "a finite mean and a positive std, got nan and 1.0"),
        ({"mean": 1.0}, "uniform timesteps have neither mean nor std"),
    ):
        with pytest.raises(ValueError, match=message):
            TimestepsConfig(**settings)  # type: ignore[arg-type]
    for number in (-0.1, 1.0, math.nan):
        with pytest.raises(ValueError, match=r"drawn from numbers in \[0, 1\), got"):
            draw_timesteps(np.array([number]), CHAIN, UNIFORM)
