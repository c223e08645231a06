"""Samplers that combine several steps' predictions: PLMS (Liu et al. 2022), DPM-Solver++(2M) (Lu et al. 2022b).

x, x0, eps: (B, ...) noisy latent, predicted clean latent, predicted noise; abar: see schedule.py.
"""

import math
from collections.abc import Sequence

from torch import Tensor

from ldm_core.samplers.grid import Spacing, plan_steps
from ldm_core.samplers.steps import Callback, Denoise, half_log_snr, predict, x0_from_eps
from ldm_core.schedule import NoiseSchedule


def plms(
    denoise: Denoise,
    x: Tensor,
    schedule: NoiseSchedule,
    *,
    num_steps: int = 50,
    spacing: Spacing = "leading",
    timesteps: Sequence[int] | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Pseudo linear multistep sampling (Liu et al. 2022, Eq. 9, 12 and 13), as in the code release.

    One evaluation a step, except for a second one in the first (improved Euler), unless that starts from pure noise
    (zero terminal SNR). Arguments, result and errors as for `ddim`.
    """
    history: list[Tensor] = []
    for step, t, following, abar, abar_next in plan_steps(schedule, num_steps, spacing, timesteps):
        now = predict(denoise, x, t, schedule)
        if history:
            eps = _adams_bashforth([*history, now.eps])
            x0 = x0_from_eps(x, eps, abar)
        elif abar > 0.0:
            ahead = _transfer(*now, abar_next)
            # A grid of one step has no next timestep to look at; the release evaluates the same one again.
            then = predict(denoise, ahead, following if following > 0 else t, schedule)
            eps = (now.eps + then.eps) / 2
            x0 = x0_from_eps(x, eps, abar)
        else:
            # Pure noise is its own noise at both ends of the step.
            eps, x0 = now
        history = [*history[-2:], now.eps]
        x = _transfer(eps, x0, abar_next)
        if callback:
            callback(step, t, x0)
    return x


def dpm_solver_pp_2m(
    denoise: Denoise,
    x: Tensor,
    schedule: NoiseSchedule,
    *,
    num_steps: int = 20,
    spacing: Spacing = "leading",
    timesteps: Sequence[int] | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """DPM-Solver++(2M), the multistep second-order solver (Lu et al. 2022b, Algorithm 2).

    With fewer than 15 steps the last one is of first order, as its authors recommend for stability.
    Arguments, result and errors as for `ddim`.
    """
    steps = plan_steps(schedule, num_steps, spacing, timesteps)
    x0_before, width_before = x, 0.0
    for step, t, _, abar, abar_next in steps:
        x0 = predict(denoise, x, t, schedule).x0
        # Infinite from a start without signal, where both steps that it enters become first-order ones.
        width = half_log_snr(abar_next) - half_log_snr(abar)
        last = step == len(steps) - 1
        if step == 0 or (last and len(steps) < 15):
            direction = x0
        else:
            direction = x0 + (width / (2 * width_before)) * (x0 - x0_before)
        ratio = math.sqrt((1 - abar_next) / (1 - abar))
        x = ratio * x - math.sqrt(abar_next) * math.expm1(-width) * direction
        x0_before, width_before = x0, width
        if callback:
            callback(step, t, x0)
    return x


def _transfer(eps: Tensor, x0: Tensor, abar_next: float) -> Tensor:
    """The deterministic step to another noise level (Liu et al. 2022, Eq. 9)."""
    return math.sqrt(abar_next) * x0 + math.sqrt(1 - abar_next) * eps


def _adams_bashforth(eps: list[Tensor]) -> Tensor:
    """Linear multistep extrapolation of two to four predictions, newest last (Liu et al. 2022, Eq. 12)."""
    if len(eps) == 2:
        return (3 * eps[-1] - eps[-2]) / 2
    if len(eps) == 3:
        return (23 * eps[-1] - 16 * eps[-2] + 5 * eps[-3]) / 12
    return (55 * eps[-1] - 59 * eps[-2] + 37 * eps[-3] - 9 * eps[-4]) / 24
