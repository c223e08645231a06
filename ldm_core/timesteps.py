"""The timesteps that a training draws, from uniformly distributed random numbers; without torch, for data loaders.

Shapes: uniform, t: (B,).
Source: logit-normal timesteps and their shift, Esser et al. 2024, Sec. 3.1 and Eq. (23).
"""

from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ldm_core.configs.objective import TimestepsConfig
from ldm_core.configs.schedule import ScheduleConfig

# Half of the step between two random words of 32 bits: what is nearest to 0 and 1 that still has a finite quantile.
_HALF_STEP = 2.0**-33


def draw_timesteps(
    uniform: NDArray[np.float64], schedule: ScheduleConfig, config: TimestepsConfig
) -> NDArray[np.int64] | NDArray[np.float32]:
    """Return the timesteps that random numbers stand for: each number's own, whatever the others.

    Args:
        uniform: (B,) numbers in [0, 1).
        schedule: the forward process; a rectified flow's shift moves them.
        config: the distribution to draw from.

    Returns:
        (B,) int64 in [0, T) for a chain, each of T equal parts of the unit interval one timestep; float32 in [0, T] for
        a rectified flow.

    Raises:
        ValueError: for numbers outside [0, 1).
    """
    if uniform.size and not 0.0 <= uniform.min() <= uniform.max() < 1.0:
        raise ValueError(f"timesteps are drawn from numbers in [0, 1), got {uniform.min()} ... {uniform.max()}")
    time = uniform if config.kind == "uniform" else _logit_normal(uniform, config.mean, config.std)
    if schedule.is_flow:
        return (schedule.timesteps * shifted(time, schedule.shift)).astype(np.float32)
    return np.minimum(schedule.timesteps * time, schedule.timesteps - 1).astype(np.int64)


def shifted(time: Any, shift: float) -> Any:
    """Return alpha t / (1 + (alpha - 1) t), numbers or an array of t / T in [0, 1] (Esser et al. 2024, Eq. 23)."""
    # Written so that 0 and 1 stay exactly what they are, whatever the shift.
    return shift * time / (shift * time + (1.0 - time))


def _logit_normal(uniform: NDArray[np.float64], mean: float, std: float) -> NDArray[np.float64]:
    """Return the quantiles of the logit-normal distribution (Esser et al. 2024, Eq. 19)."""
    quantile = NormalDist(mean, std).inv_cdf
    normal = np.array([quantile(each) for each in np.clip(uniform, _HALF_STEP, 1.0 - _HALF_STEP).tolist()])
    return 1.0 / (1.0 + np.exp(-normal))
