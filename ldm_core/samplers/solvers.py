"""UniPC (Zhao et al. 2023): a multistep predictor, corrected by the evaluation that the next step makes anyway.

x, x0: (B, ...) noisy latent and predicted clean latent; abar: see schedule.py; lambda: half of the log SNR.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ldm_core.samplers.noise import NoiseSource, noise_like
from ldm_core.samplers.steps import Callback, Denoise, Spacing, half_log_snr, plan_steps, predict, x0_from_eps
from ldm_core.schedule import NoiseSchedule


class _Point(NamedTuple):
    """A prediction of the clean latent, and where on the trajectory it was made."""

    abar: float
    x0: Tensor

    @property
    def half_log_snr(self) -> float:
        return half_log_snr(self.abar)


def unipc(
    denoise: Denoise,
    x: Tensor,
    schedule: NoiseSchedule,
    *,
    num_steps: int = 20,
    order: int = 2,
    spacing: Spacing = "leading",
    timesteps: Sequence[int] | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """UniPC of the given order in data prediction with B(h) = exp(h) - 1, "bh2" (Zhao et al. 2023, Sec. 3).

    One evaluation a step: it corrects the step before and predicts the next. The order grows from 1 in the first
    steps and falls back to 1 in the last, as its authors recommend. Other arguments, result and errors as for `ddim`.

    Args:
        order: of the predictor, 1 to 3; the corrector makes the trajectory one order more accurate.

    Raises:
        ValueError: for another order.
    """
    if order not in (1, 2, 3):
        raise ValueError(f"UniPC's order must be 1, 2 or 3, got {order}")
    steps = plan_steps(schedule, num_steps, spacing, timesteps)
    history: list[_Point] = []
    x_before, order_before = x, 0
    for step, t, _, abar, abar_next in steps:
        now = _Point(abar, predict(denoise, x, t, schedule).x0)
        if history:
            x = _advance(x_before, history[-order_before:], abar, arrived=now)
        history = [*history[-2:], now]
        x_before, order_before = x, min(order, len(history), len(steps) - step)
        x = _advance(x, history[-order_before:], abar_next)
        if callback:
            callback(step, t, now.x0)
    return x


def _advance(x: Tensor, history: list[_Point], abar_next: float, *, arrived: _Point | None = None) -> Tensor:
    """From x at the last point of the history to the next noise level (Zhao et al. 2023, Sec. 3).

    The predictor UniP knows the points behind; the corrector UniC also the prediction where UniP arrived.
    """
    *behind, start = history
    width = half_log_snr(abar_next) - start.half_log_snr
    # A point without signal lies infinitely far behind and has no weight.
    points = [point for point in behind if point.abar > 0.0]
    ratios = [(point.half_log_snr - start.half_log_snr) / width for point in points]
    if arrived:
        points, ratios = [*points, arrived], [*ratios, 1.0]
    direction = math.expm1(-width) * start.x0
    for weight, ratio, point in zip(_weights(width, ratios), ratios, points):
        direction = direction + (weight / ratio) * (point.x0 - start.x0)
    return math.sqrt((1 - abar_next) / (1 - start.abar)) * x - math.sqrt(abar_next) * direction


def _weights(width: float, ratios: list[float]) -> list[float]:
    """B(h) a_m of Zhao et al. 2023, Sec. 3, for data prediction: one weight for each ratio r_m."""
    if len(ratios) < 2:
        # The weight that needs no solving, and the only one that depends on the choice of B.
        return [math.expm1(-width) / 2] * len(ratios)
    phi, moments = math.expm1(-width) / -width, []
    for k in range(1, len(ratios) + 1):
        # phi_{k+1}(-h) from phi_k(-h), and the k-th moment k! h phi_{k+1}.
        phi = (phi - 1 / math.factorial(k)) / -width
        moments.append(-width * phi * math.factorial(k))
    powers = [[ratio**k for ratio in ratios] for k in range(len(ratios))]
    matrix = torch.tensor(powers, dtype=torch.float64, device="cpu")
    return torch.linalg.solve(matrix, torch.tensor(moments, dtype=torch.float64, device="cpu")).tolist()


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
