"""Image-to-image and masked sampling (inpainting), with every sampler."""

import functools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ldm_core import samplers
from ldm_core.configs.schedule import ScheduleConfig
from ldm_core.objective import to_prediction
from ldm_core.samplers import Prediction
from ldm_core.schedule import NoiseSchedule

SCHEDULE = NoiseSchedule(ScheduleConfig())
SAMPLERS: list[Callable[..., Tensor]] = [
    samplers.ddim,
    samplers.plms,
    samplers.dpm_solver_pp_2m,
    samplers.unipc,
    functools.partial(samplers.unipc, order=3),
]
KERNEL = torch.randn(4, 4, 3, 3, generator=torch.Generator().manual_seed(1)) / 6
KNOWN = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(2))
MASK = torch.zeros(2, 1, 8, 8)
MASK[0, :, 2:6, 2:6] = 1
MASK[1, :, :, 4:] = 1


def denoise(x: Tensor, t: Tensor) -> Tensor:
    """Stand in for a network: the answer at each place depends on its neighbours."""
    hidden = torch.nn.functional.conv2d(x, KERNEL, padding=1)
    return 2 * torch.tanh(hidden + 0.001 * t.view(-1, 1, 1, 1) + 0.5 * x)


def noise() -> Tensor:
    return samplers.initial_noise([0, 1], (4, 8, 8))


@pytest.mark.parametrize(("strength", "steps"), [(1.0, 50), (0.75, 37), (0.02, 1)])
def test_strength_is_the_share_of_the_steps_that_are_taken(strength: float, steps: int) -> None:
    x, timesteps = samplers.img2img_start(KNOWN, noise(), SCHEDULE, strength=strength)
    assert timesteps == samplers.timestep_grid(SCHEDULE, 50)[-steps:]
    abar = SCHEDULE.alpha_bar(timesteps[0])
    torch.testing.assert_close(x, math.sqrt(abar) * KNOWN + math.sqrt(1 - abar) * noise())


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_stronger_image_to_image_the_less_is_kept(sampler: Callable[..., Tensor]) -> None:
    def change(strength: float) -> float:
        x, timesteps = samplers.img2img_start(KNOWN, noise(), SCHEDULE, strength=strength, num_steps=20)
        return (sampler(denoise, x, SCHEDULE, timesteps=timesteps) - KNOWN).square().mean().item()

    assert change(0.1) < change(0.4) < change(1.0)
    assert change(0.1) < 0.1


@pytest.mark.parametrize("strength", [0.0, -0.1, 1.5, 0.05, float("nan")])
def test_a_strength_that_leaves_no_step_is_refused(strength: float) -> None:
    with pytest.raises(ValueError, match=r"strength must be above 0, at most 1, and leave at least one of 10 steps"):
        samplers.img2img_start(KNOWN, noise(), SCHEDULE, strength=strength, num_steps=10)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_mask_is_filled_and_the_rest_is_kept(sampler: Callable[..., Tensor]) -> None:
    filled = sampler(samplers.masked(denoise, SCHEDULE, KNOWN, MASK), noise(), SCHEDULE, num_steps=20)
    kept = (1 - MASK).bool().expand_as(KNOWN)
    # The error of the known region is the noise of timestep 0, of unit variance once its level is divided out.
    error = (filled - KNOWN)[kept] / math.sqrt(1 - SCHEDULE.alpha_bar(0))
    assert 0.8 < error.std().item() < 1.2
    assert (filled - KNOWN)[~kept].abs().mean() > 0.5


def test_masked_ddim_equals_the_releases_replacement_of_the_known_region_at_every_step() -> None:
    x, timesteps = samplers.img2img_start(KNOWN, noise(), SCHEDULE, strength=1.0, num_steps=10)
    ours = samplers.ddim(samplers.masked(denoise, SCHEDULE, KNOWN, MASK), x, SCHEDULE, timesteps=timesteps)
    # The release pastes the known region, noised anew, over x before each step; here with the noise x began with.
    theirs = x
    for t, following in zip(timesteps, [*timesteps[1:], 0]):
        step = torch.full((2,), t)
        theirs = MASK * theirs + (1 - MASK) * SCHEDULE.add_noise(KNOWN, noise(), step)
        eps = denoise(theirs, step)
        (signal, sigma), (signal_next, sigma_next) = (
            SCHEDULE.levels(torch.full((2,), level), like=x) for level in (t, following)
        )
        theirs = signal_next * (theirs - sigma * eps) / signal + sigma_next * eps
    torch.testing.assert_close(MASK * ours, MASK * theirs, atol=1e-4, rtol=0)
    at_the_end = SCHEDULE.add_noise(KNOWN, noise(), torch.tensor([0, 0]))
    torch.testing.assert_close((1 - MASK) * ours, (1 - MASK) * at_the_end, atol=1e-4, rtol=0)


@pytest.mark.parametrize("sampler", [functools.partial(samplers.ddim, num_steps=20, eta=0.7), samplers.ddpm])
def test_random_samplers_show_the_network_the_known_region_at_the_right_noise_level(
    sampler: Callable[..., Tensor],
) -> None:
    known = KNOWN[:1].repeat(1, 1, 8, 8)
    levels: list[Tensor] = []

    def watching(x: Tensor, t: Tensor) -> Tensor:
        signal, sigma = SCHEDULE.levels(t, like=x)
        levels.append((x - signal * known)[..., :32].div(sigma).std())
        return denoise(x, t)

    draws = samplers.seeded_noise([5], (4, 64, 64))
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., 32:] = 1
    start, _ = samplers.img2img_start(known, draws(), SCHEDULE, strength=1.0, num_steps=1000)
    sampler(samplers.masked(watching, SCHEDULE, known, mask), start, SCHEDULE, noise=draws)
    torch.testing.assert_close(torch.stack(levels), torch.ones(len(levels)), atol=0.05, rtol=0)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_masked_sampling_starts_from_pure_noise_with_a_prediction(sampler: Callable[..., Tensor]) -> None:
    schedule = NoiseSchedule(ScheduleConfig(zero_terminal_snr=True))

    def predict(x: Tensor, t: Tensor) -> Prediction:
        return to_prediction("v", schedule, denoise(x, t), x, t)

    wrapped = samplers.masked(predict, schedule, KNOWN, MASK)
    filled = sampler(wrapped, noise(), schedule, num_steps=10, spacing="trailing")
    error = (1 - MASK) * (filled - KNOWN)
    assert error.abs().max() < 5 * math.sqrt(1 - schedule.alpha_bar(0))


def test_masks_and_latents_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"only 1 \(to be filled\) and 0 \(kept\), got values between 0 and 0\.5"):
        samplers.masked(denoise, SCHEDULE, KNOWN, MASK / 2)
    with pytest.raises(ValueError, match=r"must broadcast to the known latent \(2, 4, 8, 8\), got \(2, 1, 4, 4\)"):
        samplers.masked(denoise, SCHEDULE, KNOWN, MASK[:, :, ::2, ::2])
    with pytest.raises(ValueError, match=r"must have x's shape \(3, 4, 8, 8\), got \(2, 4, 8, 8\)"):
        samplers.masked(denoise, SCHEDULE, KNOWN, MASK)(torch.zeros(3, 4, 8, 8), torch.zeros(3, dtype=torch.long))
