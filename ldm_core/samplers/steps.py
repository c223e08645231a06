"""What all samplers share: the timesteps they visit, and how they ask a denoiser.

x, eps, x0: (B, ...) noisy latent, its noise and its clean latent; abar: signal's share of the variance (schedule.py).
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ldm_core.configs.schedule import ScheduleConfig
from ldm_core.objective import Prediction
from ldm_core.schedule import NoiseSchedule

# (x (B, ...), t (B,) integers) -> the predicted noise of x's shape, or noise and clean latent.
Denoise = Callable[[Tensor, Tensor], Tensor | Prediction]
# callback(step, timestep, x0): after each step, with its number and its prediction of the clean latent.
Callback = Callable[[int, int, Tensor], None]

Spacing = Literal["leading", "trailing", "linspace"]


class Step(NamedTuple):
    """One step: its number, the timestep it leaves, the lower one it reaches, and abar at both."""

    number: int
    timestep: int
    next_timestep: int
    abar: float
    abar_next: float


def timestep_grid(schedule: NoiseSchedule, num_steps: int, spacing: Spacing | None = None) -> list[int]:
    """Return the timesteps to visit, in descending order; the last step goes from the last of them to timestep 0.

    Args:
        schedule: forward process with T timesteps.
        num_steps: number of steps wanted.
        spacing: "leading" is the published grid, range(0, T, T // num_steps) + 1: if num_steps does not divide T,
            it has a few more steps than asked for, as in the code release, and if it runs off the chain (e.g. all
            1000 of 1000 steps), it ends at T - 1. "trailing" counts down from T - 1 in steps of T / num_steps,
            "linspace" divides the way from T - 1 to 0 evenly; both start where the latent holds the least signal,
            as schedules with zero terminal SNR need (Lin et al. 2024, Table 2). None is `default_spacing`.

    Raises:
        ValueError: unless 1 <= num_steps <= T, or for an unknown spacing.
    """
    spacing = spacing or default_spacing(schedule.config)
    total = schedule.timesteps
    if not 1 <= num_steps <= total:
        raise ValueError(f"num_steps must be between 1 and the schedule's {total} timesteps, got {num_steps}")
    if spacing == "leading":
        grid = {min(step + 1, total - 1) for step in range(0, total, total // num_steps)}
    elif spacing == "trailing":
        grid = {round(total - i * (total / num_steps)) - 1 for i in range(num_steps)}
    elif spacing == "linspace":
        grid = {round(i * ((total - 1) / num_steps)) for i in range(1, num_steps + 1)}
    else:
        raise ValueError(f"spacing must be leading, trailing or linspace, got {spacing!r}")
    # Sampling ends at timestep 0: a step that also begins there would do nothing.
    return sorted(grid - {0}, reverse=True)


def default_spacing(schedule: ScheduleConfig) -> Spacing:
    """Return "leading", or "trailing" with zero terminal SNR: the last timestep, all noise, must be visited."""
    return "trailing" if schedule.zero_terminal_snr else "leading"


def plan_steps(
    schedule: NoiseSchedule, num_steps: int, spacing: Spacing | None, timesteps: Sequence[int] | None
) -> list[Step]:
    """Return the steps through the given timesteps, or through `timestep_grid` if none are given.

    Raises:
        ValueError: for timesteps that do not descend or leave the chain, or as for `timestep_grid`.
    """
    if timesteps is None:
        timesteps = timestep_grid(schedule, num_steps, spacing)
    last = schedule.timesteps - 1
    descending = all(high > low for high, low in itertools.pairwise(timesteps))
    if not (len(timesteps) > 0 and descending and last >= timesteps[0] and timesteps[-1] >= 1):
        raise ValueError(
            f"timesteps must descend strictly within {last} ... 1, got {list(timesteps)}: take them from "
            "timestep_grid or img2img_start"
        )
    return [
        Step(number, t, following, schedule.alpha_bar(t), schedule.alpha_bar(following))
        for number, (t, following) in enumerate(zip(timesteps, [*timesteps[1:], 0]))
    ]


def predict(denoise: Denoise, x: Tensor, timestep: int, schedule: NoiseSchedule) -> Prediction:
    """Predict noise and clean latent at x, in x's dtype whatever the network computes in.

    Raises:
        ValueError: at a timestep without signal if only the noise is predicted; for an x of integers, or an answer of
            another shape.
    """
    if not x.is_floating_point():
        raise ValueError(f"latents must be floating point, got {x.dtype}")
    t = torch.full((x.shape[0],), timestep, dtype=torch.long, device=x.device)
    answer = denoise(x, t)
    for part in answer if isinstance(answer, Prediction) else (answer,):
        if part.shape != x.shape:
            raise ValueError(f"denoise must answer in x's shape {tuple(x.shape)}, got {tuple(part.shape)}")
    if isinstance(answer, Prediction):
        return Prediction(answer.eps.to(x.dtype), answer.x0.to(x.dtype))
    abar = schedule.alpha_bar(timestep)
    if abar <= 0.0:
        raise ValueError(
            f"sampling starts at timestep {timestep}, where zero_terminal_snr leaves no signal and the predicted noise "
            "says nothing about the clean latent: let denoise return objective.to_prediction(...), or take a grid that "
            "ends earlier (leading, 50 of 1000)"
        )
    eps = answer.to(x.dtype)
    return Prediction(eps, x0_from_eps(x, eps, abar))


def x0_from_eps(x: Tensor, eps: Tensor, abar: float) -> Tensor:
    """Solve x = sqrt(abar) x0 + sqrt(1 - abar) eps for the clean latent."""
    return (x - math.sqrt(1 - abar) * eps) / math.sqrt(abar)


def half_log_snr(abar: float) -> float:
    """Return lambda = log(sqrt(abar) / sqrt(1 - abar)); -inf without signal."""
    return 0.5 * math.log(abar / (1 - abar)) if abar > 0.0 else -math.inf
