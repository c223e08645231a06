"""UniPC (Zhao et al. 2023): a multistep predictor, corrected by the evaluation that the next step makes anyway.

x, x0: (B, ...) noisy latent and predicted clean latent; abar: see schedule.py; lambda: half of the log SNR.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ldm_core.samplers.grid import Spacing, plan_steps
from ldm_core.samplers.steps import Callback, Denoise, half_log_snr, predict
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
