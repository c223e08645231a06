"""What all samplers share: the timesteps they visit, and how they ask a denoiser.

x, eps, x0: (B, ...) noisy latent, its noise and its clean latent; a `Level` is the signal and the noise at a timestep.
"""

import itertools
from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ldm_core.configs.schedule import ScheduleConfig
from ldm_core.objective import Prediction
from ldm_core.schedule import CLEAN, Level, NoiseSchedule
from ldm_core.timesteps import shifted

# (x (B, ...), t (B,), floating of a rectified flow, else integers) -> the predicted noise of x's shape, or noise and
# clean latent.
Denoise = Callable[[Tensor, Tensor], Tensor | Prediction]
# callback(step, timestep, x0): after each step, with its number and its prediction of the clean latent.
Callback = Callable[[int, Any, Tensor], None]

Spacing = Literal["leading", "leading_n", "trailing", "linspace"]
# Where the last step ends: at the noise level of timestep 0 (of a rectified flow there is none), or without any noise.
Final = Literal["timestep_0", "clean"]


class Step(NamedTuple):
    """One step: its number, the timestep it leaves, the lower one it reaches, and signal and noise at both."""

    number: int
    timestep: float
    next_timestep: float
    start: Level
    end: Level


def timestep_grid(schedule: NoiseSchedule, num_steps: int, spacing: Spacing | None = None) -> list[float]:
    """Return the timesteps to visit, in descending order; the last step goes from the last of them to timestep 0.

    Those of a chain are integers. A rectified flow is visited at num_steps times t / T = 1 ... 1 / num_steps, evenly
    spaced and then shifted (Esser et al. 2024, Eq. 23), which is what "trailing" does.

    Args:
        schedule: forward process with T timesteps.
        num_steps: number of steps wanted.
        spacing: "leading" is the published grid, range(0, T, T // num_steps) + 1: if num_steps does not divide T,
            it has a few more steps than asked for, as in the code release, and if it runs off the chain (e.g. all
            1000 of 1000 steps), it ends at T - 1. "leading_n" strides as far and stops after num_steps, as diffusers'
            "leading" does with steps_offset=1. "trailing" counts down from T - 1 in steps of T / num_steps,
            "linspace" divides the way from T - 1 to 0 evenly; both start where the latent holds the least signal,
            as schedules with zero terminal SNR need (Lin et al. 2024, Table 2). None is `default_spacing`.

    Raises:
        ValueError: unless 1 <= num_steps <= T, for an unknown spacing, or one that a rectified flow does not have.
    """
    spacing = spacing or default_spacing(schedule.config)
    total = schedule.timesteps
    if not 1 <= num_steps <= total:
        raise ValueError(f"num_steps must be between 1 and the schedule's {total} timesteps, got {num_steps}")
    if schedule.config.is_flow:
        if spacing != "trailing":
            raise ValueError(
                f"sampling of a rectified_flow starts from pure noise: spacing must be trailing, got {spacing}"
            )
        return [total * shifted(1 - i / num_steps, schedule.config.shift) for i in range(num_steps)]
    if spacing in ("leading", "leading_n"):
        starts = range(0, total, total // num_steps)
        grid = {min(step + 1, total - 1) for step in (starts if spacing == "leading" else starts[:num_steps])}
    elif spacing == "trailing":
        grid = {round(total - i * (total / num_steps)) - 1 for i in range(num_steps)}
    elif spacing == "linspace":
        grid = {round(i * ((total - 1) / num_steps)) for i in range(1, num_steps + 1)}
    else:
        raise ValueError(f"spacing must be leading, leading_n, trailing or linspace, got {spacing!r}")
    # Sampling ends at timestep 0: a step that also begins there would do nothing.
    return sorted(grid - {0}, reverse=True)


def default_spacing(schedule: ScheduleConfig) -> Spacing:
    """Return "leading", or "trailing" where the last timestep, all noise, must be visited."""
    return "trailing" if schedule.ends_without_signal else "leading"


def plan_steps(
    schedule: NoiseSchedule,
    num_steps: int,
    spacing: Spacing | None = None,
    timesteps: Sequence[float] | None = None,
    final: Final = "timestep_0",
) -> list[Step]:
    """Return the steps through the given timesteps, or through `timestep_grid` if none are given.

    Args:
        schedule, num_steps, spacing: as for `timestep_grid`.
        timesteps: visited instead of that grid, descending.
        final: where the last step ends, at the noise level of timestep 0 or at the clean latent.

    Raises:
        ValueError: for timesteps that do not descend or are out of range, an unknown end, or as for `timestep_grid`.
    """
    if final not in ("timestep_0", "clean"):
        raise ValueError(f"final must be timestep_0 or clean, got {final!r}")
    if timesteps is None:
        timesteps = timestep_grid(schedule, num_steps, spacing)
    last = schedule.last_timestep
    descending = all(high > low for high, low in itertools.pairwise(timesteps))
    if not (len(timesteps) > 0 and descending and last >= timesteps[0] and timesteps[-1] > 0):
        raise ValueError(
            f"timesteps must descend strictly from at most {last} to above 0, got {list(timesteps)}: take them from "
            "timestep_grid or img2img_start"
        )
    levels = [*map(schedule.at, timesteps), CLEAN if final == "clean" else schedule.at(0)]
    return [
        Step(number, *visited, *passed)
        for number, (visited, passed) in enumerate(
            zip(itertools.pairwise([*timesteps, 0]), itertools.pairwise(levels), strict=True)
        )
    ]


def same_timestep(x: Tensor, timestep: float) -> Tensor:
    """Return one timestep for a whole batch x (B, ...): (B,), int64 for an integer, else as exact as x."""
    dtype = torch.long if isinstance(timestep, Integral) else torch.promote_types(x.dtype, torch.float32)
    return torch.full((x.shape[0],), timestep, dtype=dtype, device=x.device)


def predict(denoise: Denoise, x: Tensor, timestep: float, schedule: NoiseSchedule) -> Prediction:
    """Predict noise and clean latent at x, in x's dtype whatever the network computes in.

    Raises:
        ValueError: at a timestep without signal if only the noise is predicted; for an x of integers, or an answer of
            another shape.
    """
    if not x.is_floating_point():
        raise ValueError(f"latents must be floating point, got {x.dtype}")
    answer = denoise(x, same_timestep(x, timestep))
    for part in answer if isinstance(answer, Prediction) else (answer,):
        if part.shape != x.shape:
            raise ValueError(f"denoise must answer in x's shape {tuple(x.shape)}, got {tuple(part.shape)}")
    if isinstance(answer, Prediction):
        return Prediction(answer.eps.to(x.dtype), answer.x0.to(x.dtype))
    level = schedule.at(timestep)
    if level.signal <= 0.0:
        raise ValueError(
            f"sampling starts at timestep {timestep:g}, where {_without_signal(schedule.config)} leaves no signal and "
            "the predicted noise says nothing about the clean latent: let denoise return objective.to_prediction(...), "
            "or give timesteps that begin lower"
        )
    eps = answer.to(x.dtype)
    return Prediction(eps, x0_from_eps(x, eps, level))


def _without_signal(schedule: ScheduleConfig) -> str:
    return "a rectified_flow" if schedule.is_flow else "zero_terminal_snr"


def x0_from_eps(x: Tensor, eps: Tensor, level: Level) -> Tensor:
    """Solve x = signal x0 + sigma eps for the clean latent."""
    return (x - level.sigma * eps) / level.signal
