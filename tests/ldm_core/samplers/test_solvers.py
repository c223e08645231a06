"""Samplers on normally distributed data, whose perfect denoiser and exact trajectories have closed forms."""

import functools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ldm_core import samplers
from ldm_core.configs.schedule import ScheduleConfig
from ldm_core.configs.unet import UNetConfig
from ldm_core.networks.unet import UNet
from ldm_core.objective import to_prediction
from ldm_core.samplers import Prediction, Spacing
from ldm_core.schedule import NoiseSchedule

SCHEDULE = NoiseSchedule(ScheduleConfig())
NO_TERMINAL_SIGNAL = NoiseSchedule(ScheduleConfig(zero_terminal_snr=True))
MEAN, STD = 0.7, 0.4
FEW_STEP_SAMPLERS: dict[str, Callable[..., Tensor]] = {
    "ddim": samplers.ddim,
    "plms": samplers.plms,
    "dpm_solver_pp_2m": samplers.dpm_solver_pp_2m,
    "unipc-1": functools.partial(samplers.unipc, order=1),
    "unipc-2": samplers.unipc,
    "unipc-3": functools.partial(samplers.unipc, order=3),
}
few_step_samplers = pytest.mark.parametrize("sampler", FEW_STEP_SAMPLERS.values(), ids=FEW_STEP_SAMPLERS.keys())


def perfect_denoise(x: Tensor, t: Tensor) -> Tensor:
    """Return E[noise | x_t] if each element of the clean latent is drawn from N(MEAN, STD**2)."""
    signal, sigma = SCHEDULE.levels(t, like=x)
    return sigma * (x - signal * MEAN) / (signal.square() * STD**2 + sigma.square())


def perfect_v(x: Tensor, t: Tensor) -> Prediction:
    """Return the same prediction as v, on the schedule that ends without signal."""
    signal, sigma = NO_TERMINAL_SIGNAL.levels(t, like=x)
    deviation = (x - signal * MEAN) / (signal.square() * STD**2 + sigma.square())
    v = signal * sigma * deviation - sigma * (MEAN + signal * STD**2 * deviation)
    return to_prediction("v", NO_TERMINAL_SIGNAL, v, x, t)


def exact_end(x: Tensor, start: int, schedule: NoiseSchedule = SCHEDULE) -> Tensor:
    """Return where the probability-flow ODE takes x from timestep `start` to 0: to the same quantile."""

    def moments(t: int) -> tuple[float, float]:
        abar = schedule.alpha_bar(t)
        return math.sqrt(abar) * MEAN, math.sqrt(abar * STD**2 + 1 - abar)

    (mean_start, std_start), (mean_end, std_end) = moments(start), moments(0)
    return mean_end + std_end * (x - mean_start) / std_start


def worst_error(sampler: Callable[..., Tensor], num_steps: int) -> float:
    x = torch.linspace(-2, 2, 64, dtype=torch.float64).view(4, 1, 4, 4)
    start = samplers.timestep_grid(SCHEDULE, num_steps)[0]
    result = sampler(perfect_denoise, x, SCHEDULE, num_steps=num_steps)
    return (result - exact_end(x, start)).abs().max().item()


@few_step_samplers
def test_deterministic_samplers_converge_to_the_exact_trajectory(sampler: Callable[..., Tensor]) -> None:
    assert worst_error(sampler, 50) < 0.05
    assert worst_error(sampler, 500) < 0.006


def test_halving_the_steps_shows_the_order_of_a_sampler() -> None:
    def gain(sampler: Callable[..., Tensor]) -> float:
        return worst_error(sampler, 250) / worst_error(sampler, 500)

    assert 1.7 < gain(samplers.ddim) < 2.2
    assert 2.8 < gain(samplers.dpm_solver_pp_2m) < 4.5
    assert gain(samplers.unipc) > 3.5
    assert worst_error(samplers.plms, 50) < 0.1 * worst_error(samplers.ddim, 50)
    # UniPC of order 1 and 2 is DDIM and DPM-Solver++(2M) with a corrector, which costs no evaluation and must help.
    assert worst_error(FEW_STEP_SAMPLERS["unipc-1"], 100) < 0.6 * worst_error(samplers.ddim, 100)
    assert worst_error(samplers.unipc, 100) < 0.6 * worst_error(samplers.dpm_solver_pp_2m, 100)
    assert worst_error(FEW_STEP_SAMPLERS["unipc-3"], 100) < worst_error(samplers.unipc, 100)


@few_step_samplers
@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
def test_a_prediction_of_the_latent_lets_every_sampler_start_from_pure_noise(
    sampler: Callable[..., Tensor], spacing: Spacing
) -> None:
    x = torch.linspace(-2, 2, 64, dtype=torch.float64).view(4, 1, 4, 4)
    result = sampler(perfect_v, x, NO_TERMINAL_SIGNAL, num_steps=200, spacing=spacing)
    assert (result - exact_end(x, 999, NO_TERMINAL_SIGNAL)).abs().max() < 0.015


@pytest.mark.parametrize("sampler", [samplers.ddpm, functools.partial(samplers.ddim, eta=1.0, spacing="trailing")])
def test_random_samplers_start_from_pure_noise_too(sampler: Callable[..., Tensor]) -> None:
    noise = samplers.seeded_noise([0, 1, 2, 3], (1, 32, 32))
    steps = {} if sampler is samplers.ddpm else {"num_steps": 500}
    drawn = sampler(perfect_v, noise(), NO_TERMINAL_SIGNAL, noise=noise, **steps)
    assert drawn.mean().item() == pytest.approx(MEAN, abs=0.025)
    assert drawn.std().item() == pytest.approx(STD, abs=0.02)


def test_a_random_step_from_pure_noise_survives_the_rounding_of_its_variance() -> None:
    # From 999 to 959, float64 rounds the share of the old noise to -1e-16.
    noise = samplers.seeded_noise([0], (1, 4, 4))
    drawn = samplers.ddim(perfect_v, noise(), NO_TERMINAL_SIGNAL, num_steps=25, spacing="trailing", eta=1, noise=noise)
    assert drawn.isfinite().all()


@pytest.mark.parametrize("sampler", [*FEW_STEP_SAMPLERS.values(), samplers.ddpm])
def test_starting_from_pure_noise_with_the_noise_alone_is_refused(sampler: Callable[..., Tensor]) -> None:
    steps = {} if sampler is samplers.ddpm else {"spacing": "trailing"}
    with pytest.raises(ValueError, match=r"timestep 999, where zero_terminal_snr leaves no signal.*to_prediction"):
        sampler(perfect_denoise, torch.zeros(1, 1, 2, 2), NO_TERMINAL_SIGNAL, **steps)


def test_ddpm_draws_from_the_data_distribution() -> None:
    noise = samplers.seeded_noise([0, 1, 2, 3], (1, 32, 32))
    drawn = samplers.ddpm(perfect_denoise, noise(), SCHEDULE, noise=noise)
    # 4096 draws: the standard errors of mean and std are 0.006 and 0.004.
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


def test_trailing_and_linspace_grids_start_at_the_last_timestep() -> None:
    assert samplers.timestep_grid(SCHEDULE, 5, "trailing") == [999, 799, 599, 399, 199]
    assert samplers.timestep_grid(SCHEDULE, 7, "trailing") == [999, 856, 713, 570, 428, 285, 142]
    assert samplers.timestep_grid(SCHEDULE, 5, "linspace") == [999, 799, 599, 400, 200]
    for spacing in ("leading", "trailing", "linspace"):
        for num_steps in (1, 3, 50, 999, 1000):
            grid = samplers.timestep_grid(SCHEDULE, num_steps, spacing)
            assert grid == sorted(set(grid), reverse=True)
            assert 999 >= grid[0] >= grid[-1] >= 1
    with pytest.raises(ValueError, match="spacing must be leading, leading_n, trailing or linspace, got 'karras'"):
        samplers.timestep_grid(SCHEDULE, 5, "karras")  # type: ignore[arg-type]


@few_step_samplers
def test_timesteps_may_be_given(sampler: Callable[..., Tensor]) -> None:
    x = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    by_name = sampler(perfect_denoise, x, SCHEDULE, num_steps=6, spacing="trailing")
    grid = samplers.timestep_grid(SCHEDULE, 6, "trailing")
    assert torch.equal(sampler(perfect_denoise, x, SCHEDULE, timesteps=grid), by_name)


@pytest.mark.parametrize("timesteps", [[], [100, 200], [200, 200], [1000, 5], [300, 0]])
def test_timesteps_off_the_chain_or_out_of_order_are_refused(timesteps: list[int]) -> None:
    with pytest.raises(ValueError, match=r"must descend strictly from at most 999 to above 0, got \["):
        samplers.unipc(perfect_denoise, torch.zeros(1, 1, 2, 2), SCHEDULE, timesteps=timesteps)


@pytest.mark.parametrize("num_steps", [0, -5, 1001])
def test_a_number_of_steps_outside_the_chain_is_refused(num_steps: int) -> None:
    with pytest.raises(ValueError, match=f"between 1 and the schedule's 1000 timesteps, got {num_steps}"):
        samplers.ddim(perfect_denoise, torch.zeros(1, 1, 2, 2), SCHEDULE, num_steps=num_steps)


@pytest.mark.parametrize(
    "sampler",
    [
        *FEW_STEP_SAMPLERS.values(),
        functools.partial(samplers.ddim, eta=0.6),
        functools.partial(samplers.ddim, eta=1.0, spacing="trailing"),
        samplers.ddpm,
    ],
)
def test_an_image_is_the_same_in_a_batch_and_alone(sampler: Callable[..., Tensor]) -> None:
    def sample(seeds: list[int]) -> Tensor:
        noise = samplers.seeded_noise(seeds, (3, 5, 7))
        keywords = getattr(sampler, "keywords", {})
        settings = {"noise": noise} if sampler is samplers.ddpm or "eta" in keywords else {}
        if sampler is not samplers.ddpm:
            settings["num_steps"] = 10
        return sampler(perfect_denoise, noise(), SCHEDULE, **settings)

    together = sample([7, 8, 9])
    assert torch.equal(together[1:2], sample([8]))
    assert torch.equal(together[1:], sample([8, 9]))
    assert not torch.equal(together[0], together[1])


@pytest.mark.parametrize("sampler", [samplers.ddim, samplers.unipc])
def test_latents_larger_than_those_trained_on_are_sampled_convolutionally(sampler: Callable[..., Tensor]) -> None:
    torch.manual_seed(0)
    config = UNetConfig(
        latent_size=8,
        in_channels=3,
        out_channels=3,
        model_channels=32,
        num_res_blocks=1,
        channel_mult=(1, 1, 1),
        attention_downsampling=(4,),
        num_heads=2,
    )
    unet = UNet(config).eval()
    torch.nn.init.normal_(list(unet.parameters())[-2], std=0.05)

    @torch.no_grad()
    def sample(seeds: list[int]) -> Tensor:
        return sampler(unet, samplers.initial_noise(seeds, (3, 64, 128)), SCHEDULE, num_steps=2)

    together = sample([1, 2])
    assert together.shape == (2, 3, 64, 128)
    torch.testing.assert_close(together[1:], sample([2]), atol=1e-4, rtol=1e-4)
    assert (together[0] - together[1]).abs().max() > 0.1


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


@few_step_samplers
def test_a_step_costs_one_evaluation_and_reports_once(sampler: Callable[..., Tensor]) -> None:
    evaluated: list[int] = []
    reported: list[tuple[int, int]] = []

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        evaluated.append(int(t[0]))
        return perfect_denoise(x, t)

    sampler(
        denoise,
        torch.ones(1, 1, 2, 2),
        SCHEDULE,
        num_steps=5,
        callback=lambda step, timestep, x0: reported.append((step, timestep)),
    )
    grid = samplers.timestep_grid(SCHEDULE, 5)
    assert reported == list(enumerate(grid))
    # The first step of PLMS evaluates the next timestep too.
    assert evaluated == ([grid[0], grid[1], *grid[1:]] if sampler is samplers.plms else grid)


@pytest.mark.parametrize("order", [0, 4])
def test_an_order_that_unipc_does_not_have_is_refused(order: int) -> None:
    with pytest.raises(ValueError, match=f"order must be 1, 2 or 3, got {order}"):
        samplers.unipc(perfect_denoise, torch.zeros(1, 1, 2, 2), SCHEDULE, order=order)


def test_eta_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match="eta must be between 0"):
        samplers.ddim(perfect_denoise, torch.zeros(1, 1, 2, 2), SCHEDULE, eta=1.5)
