"""What samplers ask of a denoiser, and how they read its answer.

abar: share of the variance at a timestep that is signal, see schedule.py.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ldm_core.objective import Prediction
from ldm_core.schedule import NoiseSchedule

# (x (B, ...), t (B,) integers) -> the predicted noise of x's shape, or noise and clean latent.
Denoise = Callable[[Tensor, Tensor], Tensor | Prediction]
# callback(step, timestep, x0): after each step, with its number and its prediction of the clean latent.
Callback = Callable[[int, int, Tensor], None]


def predict(denoise: Denoise, x: Tensor, timestep: int, schedule: NoiseSchedule) -> Prediction:
    """Noise and clean latent predicted at x (B, ...), in x's dtype whatever the network computes in.

    Raises:
        ValueError: at a timestep without signal when only the noise is predicted; for integers, or an answer of another
            shape.
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
    """The clean latent that x and its noise imply."""
    return (x - math.sqrt(1 - abar) * eps) / math.sqrt(abar)


def half_log_snr(abar: float) -> float:
    """lambda_t = log(sqrt(abar) / sqrt(1 - abar)); -inf without signal."""
    return 0.5 * math.log(abar / (1 - abar)) if abar > 0.0 else -math.inf
