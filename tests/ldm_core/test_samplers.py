"""Samplers against a distribution whose perfect denoiser and exact trajectories are known in closed form."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ldm_core import samplers
from ldm_core.schedule import NoiseSchedule, ScheduleConfig

SCHEDULE = NoiseSchedule(ScheduleConfig())
MEAN, STD = 0.7, 0.4


def perfect_denoise(x: Tensor, t: Tensor) -> Tensor:
    """E[noise | x_t] where every element of the clean latent is drawn from N(MEAN, STD**2)."""
    signal, sigma = SCHEDULE.levels(t, like=x)
    return sigma * (x - signal * MEAN) / (signal.square() * STD**2 + sigma.square())


def exact_end(x: Tensor, start: int) -> Tensor:
    """Where the probability-flow ODE takes x from timestep `start` to timestep 0: its quantile stays."""

    def moments(t: int) -> tuple[float, float]:
        abar = SCHEDULE.alpha_bar(t)
        return math.sqrt(abar) * MEAN, math.sqrt(abar * STD**2 + 1 - abar)

    (mean_start, std_start), (mean_end, std_end) = moments(start), moments(0)
    return mean_end + std_end * (x - mean_start) / std_start


def worst_error(sampler: Callable[..., Tensor], num_steps: int) -> float:
    x = torch.linspace(-2, 2, 64, dtype=torch.float64).view(4, 1, 4, 4)
    start = samplers.timestep_grid(SCHEDULE, num_steps)[0]
    result = sampler(perfect_denoise, x, SCHEDULE, num_steps=num_steps)
    return (result - exact_end(x, start)).abs().max().item()


@pytest.mark.parametrize("sampler", [samplers.ddim, samplers.plms, samplers.dpm_solver_pp_2m])
def test_deterministic_samplers_converge_to_the_exact_trajectory(sampler: Callable[..., Tensor]) -> None:
    assert worst_error(sampler, 50) < 0.05
    assert worst_error(sampler, 500) < 0.006


def test_halving_the_steps_shows_the_order_of_a_sampler() -> None:
    def gain(sampler: Callable[..., Tensor]) -> float:
        return worst_error(sampler, 250) / worst_error(sampler, 500)

    assert 1.7 < gain(samplers.ddim) < 2.2
    assert 2.8 < gain(samplers.dpm_solver_pp_2m) < 4.5
    assert worst_error(samplers.plms, 50) < 0.1 * worst_error(samplers.ddim, 50)


def test_ddpm_draws_from_the_data_distribution() -> None:
    noise = samplers.seeded_noise([0, 1, 2, 3], (1, 32, 32))
    drawn = samplers.ddpm(perfect_denoise, noise(), SCHEDULE, noise=noise)
    # 4096 draws: standard errors of mean and std are 0.006 and 0.004.
    assert drawn.mean().item() == pytest.approx(MEAN, abs=0.025)
    assert drawn.std().item() == pytest.approx(STD, abs=0.02)


def test_ddim_with_full_eta_draws_from_the_data_distribution() -> None:
    noise = samplers.seeded_noise([0, 1, 2, 3], (1, 32, 32))
    drawn = samplers.ddim(perfect_denoise, noise(), SCHEDULE, num_steps=500, eta=1.0, noise=noise)
    assert drawn.mean().item() == pytest.approx(MEAN, abs=0.025)
    assert drawn.std().item() == pytest.approx(STD, abs=0.02)


def test_the_step_grid_is_the_published_one() -> None:
    assert samplers.timestep_grid(SCHEDULE, 50) == [981 - 20 * i for i in range(50)]
    assert samplers.timestep_grid(SCHEDULE, 1) == [1]
    # 300 does not divide 1000: the published grid strides by 3 and has 334 steps, the last off the chain.
    assert len(samplers.timestep_grid(SCHEDULE, 300)) == 334
    assert samplers.timestep_grid(SCHEDULE, 1000)[0] == 999


@pytest.mark.parametrize("num_steps", [0, -5, 1001])
def test_a_number_of_steps_outside_the_chain_is_refused(num_steps: int) -> None:
    with pytest.raises(ValueError, match=f"between 1 and the schedule's 1000 timesteps, got {num_steps}"):
        samplers.ddim(perfect_denoise, torch.zeros(1, 1, 2, 2), SCHEDULE, num_steps=num_steps)


@pytest.mark.parametrize("eta", [0.0, 0.6])
def test_an_image_is_the_same_in_a_batch_and_alone(eta: float) -> None:
    def sample(seeds: list[int]) -> Tensor:
        noise = samplers.seeded_noise(seeds, (3, 4, 4))
        return samplers.ddim(perfect_denoise, noise(), SCHEDULE, num_steps=10, eta=eta, noise=noise)

    together = sample([7, 8, 9])
    assert torch.equal(together[1:2], sample([8]))
    assert not torch.equal(together[0], together[1])


def test_initial_noise_is_the_first_draw_of_a_seed() -> None:
    assert torch.equal(samplers.initial_noise([3, 5], (2, 4, 4))[1], samplers.seeded_noise([5], (2, 4, 4))()[0])
    with pytest.raises(ValueError, match="at least one seed"):
        samplers.initial_noise([], (2, 4, 4))


def test_the_callback_sees_every_step_and_its_prediction() -> None:
    seen: list[tuple[int, int]] = []
    predictions: list[Tensor] = []

    def callback(step: int, timestep: int, x0: Tensor) -> None:
        seen.append((step, timestep))
        predictions.append(x0)

    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    samplers.ddim(perfect_denoise, x, SCHEDULE, num_steps=4, callback=callback)
    assert seen == [(0, 751), (1, 501), (2, 251), (3, 1)]
    assert predictions[0].std() < predictions[-1].std()


def test_eta_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match="eta must be between 0"):
        samplers.ddim(perfect_denoise, torch.zeros(1, 1, 2, 2), SCHEDULE, eta=1.5)


def test_starting_without_any_signal_is_refused() -> None:
    schedule = NoiseSchedule(ScheduleConfig(zero_terminal_snr=True))
    with pytest.raises(ValueError, match="timestep 999, where zero_terminal_snr leaves no signal"):
        samplers.ddpm(perfect_denoise, torch.zeros(1, 1, 2, 2), schedule)
