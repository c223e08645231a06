"""Every sampler on every schedule, on normally distributed data: perfect denoiser and exact end have closed forms."""

import functools
import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ldm_core import samplers
from ldm_core.configs.schedule import ScheduleConfig
from ldm_core.samplers import Prediction
from ldm_core.schedule import CLEAN, Level, NoiseSchedule

MEAN, STD = 0.7, 0.4
FLOW = NoiseSchedule(ScheduleConfig(kind="rectified_flow"))
SHIFTED = NoiseSchedule(ScheduleConfig(kind="rectified_flow", shift=3.0))
SCHEDULES = {
    "scaled_linear": NoiseSchedule(ScheduleConfig()),
    "zero terminal SNR": NoiseSchedule(ScheduleConfig(zero_terminal_snr=True)),
    "rectified flow": FLOW,
    "shifted rectified flow": SHIFTED,
}
# With the factor by which four times the steps must reduce the error at least: 4 to the power of the order, less what
# the first steps from almost pure noise cost the multistep methods. PLMS changes the sign of its error on the way.
SAMPLERS: dict[str, tuple[Callable[..., Tensor], float]] = {
    "ddim": (samplers.ddim, 3.6),
    "euler": (functools.partial(samplers.euler, final="timestep_0"), 3.6),
    "heun": (functools.partial(samplers.heun, final="timestep_0"), 14),
    "dpm_solver_pp_2m": (samplers.dpm_solver_pp_2m, 8),
    "unipc": (samplers.unipc, 12),
    "plms": (samplers.plms, 0),
}


def perfect(schedule: NoiseSchedule) -> samplers.Denoise:
    """Return E[eps | x_t] and E[x_0 | x_t] if each element of the clean latent is drawn from N(MEAN, STD**2)."""

    def denoise(x: Tensor, t: Tensor) -> Prediction:
        signal, sigma = schedule.levels(t, like=x)
        deviation = (x - signal * MEAN) / (signal.square() * STD**2 + sigma.square())
        return Prediction(sigma * deviation, MEAN + signal * STD**2 * deviation)

    return denoise


def exact(x: Tensor, start: Level, end: Level) -> Tensor:
    """Return where the probability-flow ODE takes x: to the same quantile."""
    of_start, of_end = (math.hypot(level.signal * STD, level.sigma) for level in (start, end))
    return end.signal * MEAN + of_end * (x - start.signal * MEAN) / of_start


def quantiles() -> Tensor:
    return torch.linspace(-2, 2, 4, dtype=torch.float64).view(4, 1, 1, 1)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
@pytest.mark.parametrize("name", SAMPLERS)
def test_noise_becomes_the_data_and_more_steps_reduce_the_error_by_the_samplers_order(
    name: str, schedule: NoiseSchedule
) -> None:
    sampler, gain = SAMPLERS[name]

    def error(num_steps: int) -> float:
        x, start = quantiles(), schedule.at(samplers.timestep_grid(schedule, num_steps)[0])
        end = sampler(perfect(schedule), x, schedule, num_steps=num_steps)
        return (end - exact(x, start, schedule.at(0))).abs().max().item()

    few, many = error(125), error(500)
    assert many < 0.006
    assert many < few / gain if gain else many < 2.5e-4


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_ends_at_the_clean_latent_if_asked_to(name: str, schedule: NoiseSchedule) -> None:
    evaluated: list[float] = []

    def denoise(x: Tensor, t: Tensor) -> Tensor | Prediction:
        evaluated.append(float(t[0]))
        return perfect(schedule)(x, t)

    x, grid = quantiles(), samplers.timestep_grid(schedule, 50, "trailing")
    options = {"num_steps": 50, "spacing": "trailing"}
    sampler = SAMPLERS[name][0]
    end = sampler(denoise, x, schedule, **options | {"final": "clean"})
    # The one last step from the noise of t = 19 of a chain is of first order.
    assert (end - exact(x, schedule.at(grid[0]), CLEAN)).abs().max() < 0.08
    assert sorted(set(evaluated), reverse=True) == pytest.approx(grid)
    if schedule.config.is_flow:
        assert torch.equal(end, sampler(perfect(schedule), x, schedule, **options))
    with pytest.raises(ValueError, match="final must be timestep_0 or clean, got 'zero'"):
        sampler(denoise, x, schedule, **options | {"final": "zero"})


@pytest.mark.parametrize("schedule", [FLOW, SHIFTED])
def test_eulers_method_on_the_velocity_is_ddim(schedule: NoiseSchedule) -> None:
    # Liu et al. 2023: z <- z + (t' - t) v at the times alpha t / (1 + (alpha - 1) t) of Esser et al. 2024, Eq. (23).
    alpha = schedule.config.shift
    times = [alpha * t / (1 + (alpha - 1) * t) for t in (1 - i / 10 for i in range(11))]
    z = quantiles()
    for t, following in itertools.pairwise(times):
        eps, x0 = perfect(schedule)(z, torch.full((4,), 1000 * t, dtype=torch.float64))
        z = z + (following - t) * (eps - x0)
    torch.testing.assert_close(samplers.ddim(perfect(schedule), quantiles(), schedule, num_steps=10), z)
    torch.testing.assert_close(samplers.euler(perfect(schedule), quantiles(), schedule, num_steps=10), z)


def test_heun_evaluates_twice_a_step_but_for_the_last() -> None:
    for schedule, calls in ((FLOW, 9), (SCHEDULES["scaled_linear"], 9), (SCHEDULES["zero terminal SNR"], 8)):
        evaluated: list[float] = []

        def denoise(x: Tensor, t: Tensor) -> Tensor | Prediction:
            evaluated.append(float(t[0]))  # noqa: B023
            return perfect(schedule)(x, t)  # noqa: B023

        samplers.heun(denoise, quantiles(), schedule, num_steps=5)
        assert len(evaluated) == calls


@pytest.mark.parametrize("name", SAMPLERS)
def test_image_to_image_and_masks_work_on_a_rectified_flow(name: str) -> None:
    sampler, _ = SAMPLERS[name]
    z0, noise = torch.randn(2, 4, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x, timesteps = samplers.img2img_start(z0, noise, SHIFTED, strength=0.5, num_steps=40)
    level = SHIFTED.at(timesteps[0])
    assert len(timesteps) == 20
    # Eq. (23) at t = 1/2: 3/2 / (1 + 2/2).
    assert level.sigma == pytest.approx(0.75)
    torch.testing.assert_close(x, 0.25 * z0 + 0.75 * noise)
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., 4:] = 1
    filled = sampler(samplers.masked(perfect(SHIFTED), SHIFTED, z0, mask), x, SHIFTED, timesteps=timesteps)
    torch.testing.assert_close(filled[..., :4], z0[..., :4])
    expected = exact(x, level, CLEAN)[..., 4:]
    assert (filled[..., 4:] - expected).abs().max() < 0.15


def test_the_network_is_given_timesteps_between_0_and_1000() -> None:
    seen: list[Tensor] = []

    def denoise(x: Tensor, t: Tensor) -> Tensor | Prediction:
        seen.append(t)
        return perfect(FLOW)(x, t)

    samplers.ddim(denoise, quantiles().float(), FLOW, num_steps=4)
    assert [t[0].item() for t in seen] == [1000, 750, 500, 250]
    assert {t.dtype for t in seen} == {torch.float32}


@pytest.mark.parametrize("sampler", [samplers.ddim, samplers.heun, samplers.unipc])
def test_timesteps_between_those_of_a_chain_may_be_visited(sampler: Callable[..., Tensor]) -> None:
    schedule, timesteps = SCHEDULES["scaled_linear"], [980.5 - 9.8 * i for i in range(100)]
    end = sampler(perfect(schedule), quantiles(), schedule, timesteps=timesteps, final="timestep_0")
    error = end - exact(quantiles(), schedule.at(980.5), schedule.at(0))
    assert error.abs().max() < 0.03


def test_what_a_rectified_flow_does_not_have_is_refused() -> None:
    def sample(sampler: Callable[..., Tensor], **options: object) -> Callable[[], Tensor]:
        return lambda: sampler(perfect(FLOW), quantiles(), FLOW, **options)

    refused: dict[str, Callable[[], object]] = {
        "eta is that of a chain's steps.* keep 0, got 0.5": sample(samplers.ddim, eta=0.5),
        "is no chain of steps, as DDPM": sample(samplers.ddpm),
        "spacing must be trailing, got leading": sample(samplers.unipc, spacing="leading"),
        "at most 1000 to above 0, got": sample(samplers.plms, timesteps=[1000.5, 3.0]),
        r"timestep 1000, where a rectified_flow leaves no signal.*to_prediction": lambda: samplers.ddim(
            lambda x, t: x, quantiles(), FLOW
        ),
    }
    for message, call in refused.items():
        with pytest.raises(ValueError, match=message):
            call()


def test_leading_n_takes_exactly_as_many_evaluations_as_asked_for() -> None:
    schedule = SCHEDULES["scaled_linear"]
    grid = samplers.timestep_grid(schedule, 30, "leading_n")
    assert grid == [1 + 33 * i for i in range(29, -1, -1)]
    assert len(samplers.timestep_grid(schedule, 30)) == 31
    for num_steps in (1, 7, 300, 999):
        assert len(samplers.timestep_grid(schedule, num_steps, "leading_n")) == num_steps
