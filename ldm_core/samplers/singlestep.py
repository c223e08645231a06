"""Samplers that remember nothing between steps: DDPM (Ho et al. 2020) and DDIM (Song et al. 2021).

x, x0, eps: (B, ...) noisy latent, predicted clean latent, predicted noise; abar: see schedule.py.
"""

import math
from collections.abc import Sequence

from torch import Tensor

from ldm_core.samplers.grid import Spacing, plan_steps
from ldm_core.samplers.noise import NoiseSource, noise_like
from ldm_core.samplers.steps import Callback, Denoise, predict
from ldm_core.schedule import NoiseSchedule


def ddim(
    denoise: Denoise,
    x: Tensor,
    schedule: NoiseSchedule,
    *,
    num_steps: int = 50,
    spacing: Spacing = "leading",
    timesteps: Sequence[int] | None = None,
    eta: float = 0.0,
    noise: NoiseSource | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """DDIM (Song et al. 2021, Eq. 12 and 16).

    Args:
        denoise: predicts the noise, or noise and clean latent.
        x: (B, ...) normal noise to start from, or what `img2img_start` gives.
        schedule: forward process the network was trained on.
        num_steps, spacing: the timesteps visited, see `timestep_grid`.
        timesteps: visited instead, in descending order within T - 1 ... 1.
        eta: 0 deterministic ... 1 as random as DDPM.
        noise: source of noise of x's shape for eta > 0; None draws from torch's global generator.
        callback: called after every step.

    Returns:
        Latents of x's shape, at the noise level of timestep 0 (as published, not extrapolated to none).

    Raises:
        ValueError: for num_steps, timesteps or eta out of range, or a start without any signal from which only the
            noise is predicted.
    """
    if not 0.0 <= eta <= 1.0:
        raise ValueError(f"eta must be between 0 (deterministic) and 1 (as random as DDPM), got {eta}")
    draw = noise_like(x, noise)
    for step, t, _, abar, abar_next in plan_steps(schedule, num_steps, spacing, timesteps):
        eps, x0 = predict(denoise, x, t, schedule)
        sigma = eta * math.sqrt((1 - abar_next) / (1 - abar) * (1 - abar / abar_next))
        # From pure noise with eta = 1 nothing of the old noise is left, and rounding must not make it negative.
        x = math.sqrt(abar_next) * x0 + math.sqrt(max(1 - abar_next - sigma**2, 0.0)) * eps
        if sigma > 0:
            x = x + sigma * draw()
        if callback:
            callback(step, t, x0)
    return x


def ddpm(
    denoise: Denoise,
    x: Tensor,
    schedule: NoiseSchedule,
    *,
    noise: NoiseSource | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Ancestral sampling over all T timesteps with the posterior's variance (Ho et al. 2020, Eq. 6-7).

    Args:
        denoise: predicts the noise, or noise and clean latent.
        x: (B, ...) normal noise to start from.
        schedule: forward process the network was trained on.
        noise: source of noise of x's shape; None draws from torch's global generator.
        callback: called after every step.

    Returns:
        Clean latents of x's shape.

    Raises:
        ValueError: for a start without any signal from which only the noise is predicted.
    """
    draw = noise_like(x, noise)
    for step, t in enumerate(range(schedule.timesteps - 1, -1, -1)):
        abar, abar_next = schedule.alpha_bar(t), schedule.alpha_bar(t - 1)
        alpha = abar / abar_next
        x0 = predict(denoise, x, t, schedule).x0
        from_x0 = math.sqrt(abar_next) * (1 - alpha) / (1 - abar)
        from_x = math.sqrt(alpha) * (1 - abar_next) / (1 - abar)
        x = from_x0 * x0 + from_x * x
        if t > 0:
            x = x + math.sqrt((1 - alpha) * (1 - abar_next) / (1 - abar)) * draw()
        if callback:
            callback(step, t, x0)
    return x
