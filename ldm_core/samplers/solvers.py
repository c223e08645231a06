"""The samplers: DDPM, DDIM, PLMS, Euler, Heun, DPM-Solver++(2M) and UniPC.

x: (B, ...) noisy latent; eps, x0: predicted noise and clean latent of x's shape; t: timestep.
start, end: signal and noise, x = signal x0 + sigma eps, where a step begins and where it ends (schedule.py).
lambda = log(signal / sigma): half of the log SNR, the "time" of the two exponential integrators;
h: its increase over a step.

All but DDPM follow the same deterministic trajectory (the probability-flow ODE), on every schedule. DDIM and Euler are
the first-order step, Heun corrects it by a second evaluation, PLMS extrapolates the noise from earlier steps,
DPM-Solver++ and UniPC extrapolate the clean latent. The scalars of a step are Python floats in float64, so that they
cost nothing beside the network.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ldm_core.samplers.noise import NoiseSource, noise_like
from ldm_core.samplers.steps import Callback, Denoise, Final, Spacing, plan_steps, predict, x0_from_eps
from ldm_core.schedule import Level, NoiseSchedule


def ddpm(
    denoise: Denoise,
    x: Tensor,
    schedule: NoiseSchedule,
    *,
    noise: NoiseSource | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Sample ancestrally through all T timesteps with the posterior's variance (Ho et al. 2020, Eq. 6 and 7).

    Args:
        denoise: predicts the noise, or noise and clean latent.
        x: (B, ...) normal noise to start from.
        schedule: forward process the network was trained on.
        noise: source of noise of x's shape; None draws from torch's global generator.
        callback: called after every step.

    Returns:
        Clean latents of x's shape.

    Raises:
        ValueError: for a start without any signal from which only the noise is predicted; for a rectified flow, which
            has no posterior.
    """
    draw = noise_like(x, noise)
    for step, t in enumerate(range(schedule.timesteps - 1, -1, -1)):
        abar, abar_next = schedule.alpha_bar(t), schedule.alpha_bar(t - 1)
        alpha = abar / abar_next
        x0 = predict(denoise, x, t, schedule).x0
        # Eq. (7): the posterior q(x_{t-1} | x_t, x_0) is a normal distribution, its mean linear in x_0 and x_t.
        from_x0 = math.sqrt(abar_next) * (1 - alpha) / (1 - abar)
        from_x = math.sqrt(alpha) * (1 - abar_next) / (1 - abar)
        x = from_x0 * x0 + from_x * x
        if t > 0:
            x = x + math.sqrt((1 - alpha) * (1 - abar_next) / (1 - abar)) * draw()
        if callback:
            callback(step, t, x0)
    return x


def ddim(
    denoise: Denoise,
    x: Tensor,
    schedule: NoiseSchedule,
    *,
    num_steps: int = 50,
    spacing: Spacing | None = None,
    timesteps: Sequence[float] | None = None,
    final: Final = "timestep_0",
    eta: float = 0.0,
    noise: NoiseSource | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Sample by DDIM (Song et al. 2021, Eq. 12 and 16).

    Args:
        denoise: predicts the noise, or noise and clean latent.
        x: (B, ...) normal noise to start from, or what `img2img_start` returns.
        schedule: forward process the network was trained on.
        num_steps, spacing: the timesteps to visit, see `timestep_grid`.
        timesteps: visited instead of that grid, in descending order; of a chain from at most T - 1, also between
            integers.
        final: where the last step ends: at the noise level of "timestep_0", as published, or at the "clean" latent. Of
            a rectified flow both are the same.
        eta: 0 (deterministic) to 1 (as random as DDPM); a rectified flow takes 0 alone.
        noise: source of noise of x's shape for eta > 0; None draws from torch's global generator.
        callback: called after every step.

    Returns:
        Latents of x's shape.

    Raises:
        ValueError: for num_steps, timesteps or eta out of range, or a start without any signal from which only the
            noise is predicted.
    """
    if not 0.0 <= eta <= 1.0:
        raise ValueError(f"eta must be between 0 (deterministic) and 1 (as random as DDPM), got {eta}")
    if eta and schedule.config.is_flow:
        raise ValueError(f"eta is that of a chain's steps, which a rectified_flow does not have: keep 0, got {eta}")
    draw = noise_like(x, noise)
    for step, t, _, start, end in plan_steps(schedule, num_steps, spacing, timesteps, final):
        eps, x0 = predict(denoise, x, t, schedule)
        # Eq. (16), then Eq. (12): "predicted x_0", "direction pointing to x_t", "random noise".
        std = eta * end.sigma / start.sigma * math.sqrt(1 - (start.signal / end.signal) ** 2)
        # From pure noise with eta = 1 none of the old noise is kept, and rounding may make its share -1e-16.
        x = end.signal * x0 + math.sqrt(max(end.sigma**2 - std**2, 0.0)) * eps
        if std > 0:
            x = x + std * draw()
        if callback:
            callback(step, t, x0)
    return x


def plms(
    denoise: Denoise,
    x: Tensor,
    schedule: NoiseSchedule,
    *,
    num_steps: int = 50,
    spacing: Spacing | None = None,
    timesteps: Sequence[float] | None = None,
    final: Final = "timestep_0",
    callback: Callback | None = None,
) -> Tensor:
    """Sample by PLMS, the pseudo linear multistep method of PNDM (Liu et al. 2022, Eq. 9, 12 and 13).

    As in the code release, the first step is an improved Euler step with a second evaluation; every other step costs
    one. A first step from pure noise (zero terminal SNR) needs no second one.

    Arguments, result and errors are those of `ddim` without eta and noise.
    """
    history: list[Tensor] = []
    for step, t, following, start, end in plan_steps(schedule, num_steps, spacing, timesteps, final):
        now = predict(denoise, x, t, schedule)
        if history:
            eps = _adams_bashforth([*history, now.eps])
            x0 = x0_from_eps(x, eps, start)
        elif start.signal > 0.0:
            ahead = _transfer(*now, end)
            # A grid of one step has no next timestep to look ahead to; the release evaluates the same one again.
            then = predict(denoise, ahead, following if following > 0 else t, schedule)
            eps = (now.eps + then.eps) / 2
            x0 = x0_from_eps(x, eps, start)
        else:
            # x is the noise itself; the mean of two predictions would leave x0 undefined, a division by signal = 0.
            eps, x0 = now
        # The rules extrapolate what the network predicted, not what was extrapolated before.
        history = [*history[-2:], now.eps]
        x = _transfer(eps, x0, end)
        if callback:
            callback(step, t, x0)
    return x


def _transfer(eps: Tensor, x0: Tensor, end: Level) -> Tensor:
    """Move to another noise level along the deterministic trajectory (Liu et al. 2022, Eq. 9; DDIM with eta = 0)."""
    return end.signal * x0 + end.sigma * eps


def _adams_bashforth(eps: list[Tensor]) -> Tensor:
    """Extrapolate two to four predictions, newest last, by the Adams-Bashforth rules (Liu et al. 2022, Eq. 12)."""
    if len(eps) == 2:
        return (3 * eps[-1] - eps[-2]) / 2
    if len(eps) == 3:
        return (23 * eps[-1] - 16 * eps[-2] + 5 * eps[-3]) / 12
    return (55 * eps[-1] - 59 * eps[-2] + 37 * eps[-3] - 9 * eps[-4]) / 24


def euler(
    denoise: Denoise,
    x: Tensor,
    schedule: NoiseSchedule,
    *,
    num_steps: int = 50,
    spacing: Spacing | None = None,
    timesteps: Sequence[float] | None = None,
    final: Final = "clean",
    callback: Callback | None = None,
) -> Tensor:
    """Sample by Euler's method, down to the clean latent.

    Of a rectified flow a step is (t_next - t) times the velocity eps - x0 (Liu et al. 2023). Of a chain it goes along
    d(x / signal) / d(sigma / signal) = eps (Karras et al. 2022, Algorithm 1 without lines 6 to 8). Both are DDIM with
    eta = 0.

    Other arguments, result and errors are those of `ddim` without eta and noise.
    """
    return ddim(
        denoise,
        x,
        schedule,
        num_steps=num_steps,
        spacing=spacing,
        timesteps=timesteps,
        final=final,
        callback=callback,
    )


def heun(
    denoise: Denoise,
    x: Tensor,
    schedule: NoiseSchedule,
    *,
    num_steps: int = 25,
    spacing: Spacing | None = None,
    timesteps: Sequence[float] | None = None,
    final: Final = "clean",
    callback: Callback | None = None,
) -> Tensor:
    """Sample by Heun's second-order method (Karras et al. 2022, Algorithm 1), down to the clean latent.

    Each of Euler's steps is repeated with the mean of the slopes at its two ends, but for one that reaches the clean
    latent, where there is none: n steps take 2 n - 1 evaluations. Of a chain, a step from pure noise (zero terminal
    SNR) is not repeated either, since sigma / signal is infinite there.

    Other arguments, result and errors are those of `ddim` without eta and noise.
    """
    for step, t, following, start, end in plan_steps(schedule, num_steps, spacing, timesteps, final):
        now = predict(denoise, x, t, schedule)
        ahead = _transfer(*now, end)
        if end.sigma == 0.0 or (start.signal == 0.0 and not schedule.config.is_flow):
            x = ahead
        else:
            then = predict(denoise, ahead, following, schedule)
            if schedule.config.is_flow:
                x = ahead + (end.sigma - start.sigma) / 2 * ((then.eps - then.x0) - (now.eps - now.x0))
            else:
                x = ahead + (end.sigma - end.signal / start.signal * start.sigma) / 2 * (then.eps - now.eps)
        if callback:
            callback(step, t, now.x0)
    return x


def dpm_solver_pp_2m(
    denoise: Denoise,
    x: Tensor,
    schedule: NoiseSchedule,
    *,
    num_steps: int = 20,
    spacing: Spacing | None = None,
    timesteps: Sequence[float] | None = None,
    final: Final = "timestep_0",
    callback: Callback | None = None,
) -> Tensor:
    """Sample by DPM-Solver++(2M), the second-order multistep solver (Lu et al. 2022b, Algorithm 2).

    With fewer than 15 steps the last one is of first order, as its authors recommend for stability.

    Arguments, result and errors are those of `ddim` without eta and noise.
    """
    steps = plan_steps(schedule, num_steps, spacing, timesteps, final)
    x0_before, h_before = x, 0.0
    for step, t, _, start, end in steps:
        x0 = predict(denoise, x, t, schedule).x0
        # Infinite where the step leaves pure noise. Algorithm 2 then still holds: expm1(-h) is -1 in this step, and
        # 1 / (2 r) is 0 in the next, so that both are first-order steps. So is one that reaches the clean latent.
        h = end.half_log_snr - start.half_log_snr
        last = step == len(steps) - 1
        if step == 0 or (last and (len(steps) < 15 or end.sigma == 0.0)):
            direction = x0
        else:
            # D = (1 + 1 / (2 r)) x0 - 1 / (2 r) x0_before with r = h_before / h.
            direction = x0 + (h / (2 * h_before)) * (x0 - x0_before)
        x = end.sigma / start.sigma * x - end.signal * math.expm1(-h) * direction
        x0_before, h_before = x0, h
        if callback:
            callback(step, t, x0)
    return x


def unipc(
    denoise: Denoise,
    x: Tensor,
    schedule: NoiseSchedule,
    *,
    num_steps: int = 20,
    order: int = 2,
    spacing: Spacing | None = None,
    timesteps: Sequence[float] | None = None,
    final: Final = "timestep_0",
    callback: Callback | None = None,
) -> Tensor:
    """Sample by UniPC in data prediction with B(h) = exp(h) - 1, called "bh2" (Zhao et al. 2023, Sec. 3).

    One evaluation a step serves twice: the corrector UniC improves the step that led to it, the predictor UniP takes
    the next. The order grows from 1 in the first steps and falls back to 1 in the last, as its authors recommend.

    Other arguments, result and errors are those of `ddim` without eta and noise.

    Args:
        order: order of the predictor, 1 to 3; the corrector makes the trajectory one order more accurate.

    Raises:
        ValueError: for another order.
    """
    if order not in (1, 2, 3):
        raise ValueError(f"UniPC's order must be 1, 2 or 3, got {order}")
    steps = plan_steps(schedule, num_steps, spacing, timesteps, final)
    history: list[_Point] = []
    x_before, order_before = x, 0
    for step, t, _, start, end in steps:
        now = _Point(start, predict(denoise, x, t, schedule).x0)
        if history:
            # UniC repeats the last step from where it began, now that the prediction at its end is known.
            x = _unipc_step(x_before, history[-order_before:], start, arrived=now)
        history = [*history[-2:], now]
        x_before, order_before = x, min(order, len(history), len(steps) - step)
        x = _unipc_step(x, history[-order_before:], end)
        if callback:
            callback(step, t, now.x0)
    return x


class _Point(NamedTuple):
    """A prediction of the clean latent, and the noise level at which it was made."""

    level: Level
    x0: Tensor


def _unipc_step(x: Tensor, history: list[_Point], end: Level, *, arrived: _Point | None = None) -> Tensor:
    """Step from x at the newest point of the history to another noise level (Zhao et al. 2023, Sec. 3).

    The predictor UniP uses the points behind; the corrector UniC uses also the prediction where UniP arrived.
    """
    *behind, start = history
    start_lambda = start.level.half_log_snr
    h = end.half_log_snr - start_lambda
    # A point without signal lies infinitely far behind, so that its ratio is infinite and its weight zero.
    points = [point for point in behind if point.level.signal > 0.0]
    ratios = [(point.level.half_log_snr - start_lambda) / h for point in points]
    if arrived:
        points, ratios = [*points, arrived], [*ratios, 1.0]
    # x_next = sigma_next / sigma x - alpha_next ((exp(-h) - 1) x0 + B(h) sum_m a_m (x0_m - x0) / r_m)
    direction = math.expm1(-h) * start.x0
    for weight, ratio, point in zip(_unipc_weights(h, ratios), ratios, points):
        direction = direction + (weight / ratio) * (point.x0 - start.x0)
    return end.sigma / start.level.sigma * x - end.signal * direction


def _unipc_weights(h: float, ratios: list[float]) -> list[float]:
    """Return B(h) a_m of Zhao et al. 2023, Sec. 3, in data prediction: one weight for each ratio r_m.

    With phi_1(z) = (exp(z) - 1) / z and phi_{k+1}(z) = (phi_k(z) - 1 / k!) / z they solve the order conditions
    sum_m r_m^(k-1) B(h) a_m = k! (-h) phi_{k+1}(-h) for k = 1, 2, ...: one more power of lambda is exact with each.
    """
    if len(ratios) < 2:
        # a_1 = 1/2 is accurate enough without solving, and the only weight that depends on the choice of B.
        return [math.expm1(-h) / 2] * len(ratios)
    phi, moments = math.expm1(-h) / -h, []
    for k in range(1, len(ratios) + 1):
        phi = (phi - 1 / math.factorial(k)) / -h
        moments.append(-h * phi * math.factorial(k))
    powers = [[ratio**k for ratio in ratios] for k in range(len(ratios))]
    matrix = torch.tensor(powers, dtype=torch.float64, device="cpu")
    return torch.linalg.solve(matrix, torch.tensor(moments, dtype=torch.float64, device="cpu")).tolist()
