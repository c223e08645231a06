"""Samplers: from noise to latents with any function that predicts the noise.

`denoise(x, t) -> eps` takes x (B, ...) and t (B,) integers and returns the predicted noise of x's shape.
Samplers know neither networks nor conditioning: guidance wraps `denoise` (see guidance.py).

Sources: DDPM: Ho et al. 2020; DDIM: Song et al. 2021, Eq. (12); PLMS: Liu et al. 2022; DPM-Solver++:
Lu et al. 2022.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ldm_core.schedule import NoiseSchedule

Denoise = Callable[[Tensor, Tensor], Tensor]
NoiseSource = Callable[[], Tensor]
# callback(step, timestep, x0): after each step, with its number and its prediction of the clean latent.
Callback = Callable[[int, int, Tensor], None]


def seeded_noise(seeds: Sequence[int], shape: Sequence[int], device: torch.device | str = "cpu") -> NoiseSource:
    """A source of (B, *shape) float32 normal noise in which sample i depends on seeds[i] alone.

    Each sample has its own generator on the CPU, so an image is the same whatever the batch it is drawn in
    and whatever the device. Each call of the source draws on.

    Args:
        seeds: B integers.
        shape: shape of one sample, without the batch dimension.
        device: where the noise is wanted.

    Raises:
        ValueError: without seeds.
    """
    if not seeds:
        raise ValueError("sampling needs at least one seed, got none")
    generators = [torch.Generator("cpu").manual_seed(int(seed)) for seed in seeds]

    def draw() -> Tensor:
        drawn = [torch.randn(tuple(shape), generator=generator, device="cpu") for generator in generators]
        return torch.stack(drawn).to(device)

    return draw


def initial_noise(seeds: Sequence[int], shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """The (B, *shape) noise that sampling starts from: the first draw of `seeded_noise`."""
    return seeded_noise(seeds, shape, device)()


def timestep_grid(schedule: NoiseSchedule, num_steps: int) -> list[int]:
    """The published step grid range(0, T, T // num_steps) + 1, in descending order.

    Where num_steps does not divide T it holds a few more steps than asked for, as in the code release. The
    published grid runs off the chain where T // num_steps divides T - 1 (e.g. all 1000 of 1000 steps); it
    then ends at T - 1.

    Raises:
        ValueError: unless 1 <= num_steps <= T.
    """
    total = schedule.timesteps
    if not 1 <= num_steps <= total:
        raise ValueError(f"num_steps must be between 1 and the schedule's {total} timesteps, got {num_steps}")
    grid = {min(step + 1, total - 1) for step in range(0, total, total // num_steps)}
    return sorted(grid, reverse=True)


def ddim(
    denoise: Denoise,
    x: Tensor,
    schedule: NoiseSchedule,
    *,
    num_steps: int = 50,
    eta: float = 0.0,
    noise: NoiseSource | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """DDIM (Song et al. 2021, Eq. 12 and 16).

    Args:
        denoise: predicts the noise.
        x: (B, ...) normal noise to start from.
        schedule: forward process the network was trained on.
        num_steps: steps, see `timestep_grid`.
        eta: 0 deterministic ... 1 as random as DDPM.
        noise: source of noise of x's shape for eta > 0; None draws from torch's global generator.
        callback: called after every step.

    Returns:
        Latents of x's shape, at the noise level of timestep 0 (as published, not extrapolated to none).

    Raises:
        ValueError: for num_steps or eta out of range, or a grid that starts without any signal.
    """
    if not 0.0 <= eta <= 1.0:
        raise ValueError(f"eta must be between 0 (deterministic) and 1 (as random as DDPM), got {eta}")
    draw = noise or (lambda: torch.randn_like(x))
    for step, t, previous in _steps(schedule, num_steps):
        eps = _predict(denoise, x, t)
        abar, abar_previous = schedule.alpha_bar(t), schedule.alpha_bar(previous)
        sigma = eta * math.sqrt((1 - abar_previous) / (1 - abar) * (1 - abar / abar_previous))
        x0 = _x0(x, eps, abar)
        x = math.sqrt(abar_previous) * x0 + math.sqrt(1 - abar_previous - sigma**2) * eps
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
        denoise: predicts the noise.
        x: (B, ...) normal noise to start from.
        schedule: forward process the network was trained on.
        noise: source of noise of x's shape; None draws from torch's global generator.
        callback: called after every step.

    Returns:
        Clean latents of x's shape.

    Raises:
        ValueError: for a schedule whose last timestep holds no signal.
    """
    draw = noise or (lambda: torch.randn_like(x))
    _require_signal(schedule, schedule.timesteps - 1)
    for step, t in enumerate(range(schedule.timesteps - 1, -1, -1)):
        abar, abar_previous = schedule.alpha_bar(t), schedule.alpha_bar(t - 1)
        alpha = abar / abar_previous
        x0 = _x0(x, _predict(denoise, x, t), abar)
        from_x0 = math.sqrt(abar_previous) * (1 - alpha) / (1 - abar)
        from_x = math.sqrt(alpha) * (1 - abar_previous) / (1 - abar)
        x = from_x0 * x0 + from_x * x
        if t > 0:
            x = x + math.sqrt((1 - alpha) * (1 - abar_previous) / (1 - abar)) * draw()
        if callback:
            callback(step, t, x0)
    return x


def plms(
    denoise: Denoise,
    x: Tensor,
    schedule: NoiseSchedule,
    *,
    num_steps: int = 50,
    callback: Callback | None = None,
) -> Tensor:
    """Pseudo linear multistep sampling (Liu et al. 2022, Eq. 9, 12 and 13), as in the code release.

    One evaluation a step, except for a second one in the first (improved Euler). Arguments, result and errors
    as for `ddim`.
    """
    history: list[Tensor] = []
    for step, t, previous in _steps(schedule, num_steps):
        abar, abar_previous = schedule.alpha_bar(t), schedule.alpha_bar(previous)
        eps = _predict(denoise, x, t)
        if history:
            combined = _adams_bashforth([*history, eps])
        else:
            ahead = _transfer(x, eps, abar, abar_previous)
            # A grid of one step has no next timestep to look at; the release evaluates the same one again.
            combined = (eps + _predict(denoise, ahead, previous if previous > 0 else t)) / 2
        history = [*history[-2:], eps]
        x0 = _x0(x, combined, abar)
        x = _transfer(x, combined, abar, abar_previous)
        if callback:
            callback(step, t, x0)
    return x


def dpm_solver_pp_2m(
    denoise: Denoise,
    x: Tensor,
    schedule: NoiseSchedule,
    *,
    num_steps: int = 20,
    callback: Callback | None = None,
) -> Tensor:
    """DPM-Solver++(2M), the multistep second-order solver (Lu et al. 2022b, Algorithm 2).

    With fewer than 15 steps the last one is of first order, as its authors recommend for stability.
    Arguments, result and errors as for `ddim`.
    """
    steps = _steps(schedule, num_steps)
    x0_before, width_before = x, 0.0
    for step, t, previous in steps:
        abar, abar_previous = schedule.alpha_bar(t), schedule.alpha_bar(previous)
        x0 = _x0(x, _predict(denoise, x, t), abar)
        width = _half_log_snr(abar_previous) - _half_log_snr(abar)
        last = step == len(steps) - 1
        if step == 0 or (last and len(steps) < 15):
            direction = x0
        else:
            direction = x0 + (width / (2 * width_before)) * (x0 - x0_before)
        ratio = math.sqrt((1 - abar_previous) / (1 - abar))
        x = ratio * x - math.sqrt(abar_previous) * math.expm1(-width) * direction
        x0_before, width_before = x0, width
        if callback:
            callback(step, t, x0)
    return x


def _steps(schedule: NoiseSchedule, num_steps: int) -> list[tuple[int, int, int]]:
    """(number, timestep, next lower timestep) of every step; the last one goes down to timestep 0."""
    grid = timestep_grid(schedule, num_steps)
    _require_signal(schedule, grid[0])
    return [(step, t, previous) for step, (t, previous) in enumerate(zip(grid, [*grid[1:], 0]))]


def _require_signal(schedule: NoiseSchedule, timestep: int) -> None:
    """From pure noise the predicted noise says nothing about the clean latent."""
    if schedule.alpha_bar(timestep) <= 0.0:
        raise ValueError(
            f"sampling would start at timestep {timestep}, where zero_terminal_snr leaves no signal: "
            "use ddim with num_steps whose grid ends earlier (50 of 1000)"
        )


def _predict(denoise: Denoise, x: Tensor, timestep: int) -> Tensor:
    """The predicted noise in x's dtype, whatever the network computes in."""
    t = torch.full((x.shape[0],), timestep, dtype=torch.long, device=x.device)
    return denoise(x, t).to(x.dtype)


def _x0(x: Tensor, eps: Tensor, abar: float) -> Tensor:
    """The clean latent that x and its predicted noise imply."""
    return (x - math.sqrt(1 - abar) * eps) / math.sqrt(abar)


def _transfer(x: Tensor, eps: Tensor, abar: float, abar_previous: float) -> Tensor:
    """The deterministic step from one noise level to another (Liu et al. 2022, Eq. 9)."""
    return math.sqrt(abar_previous) * _x0(x, eps, abar) + math.sqrt(1 - abar_previous) * eps


def _adams_bashforth(eps: list[Tensor]) -> Tensor:
    """Linear multistep extrapolation of two to four predictions, newest last (Liu et al. 2022, Eq. 12)."""
    if len(eps) == 2:
        return (3 * eps[-1] - eps[-2]) / 2
    if len(eps) == 3:
        return (23 * eps[-1] - 16 * eps[-2] + 5 * eps[-3]) / 12
    return (55 * eps[-1] - 59 * eps[-2] + 37 * eps[-3] - 9 * eps[-4]) / 24


def _half_log_snr(abar: float) -> float:
    """lambda_t = log(sqrt(abar) / sqrt(1 - abar))."""
    return 0.5 * math.log(abar / (1 - abar))
