"""Which timesteps a few-step sampler visits."""

import itertools
from collections.abc import Sequence
from typing import Literal, NamedTuple

from ldm_core.schedule import NoiseSchedule

Spacing = Literal["leading", "trailing", "linspace"]


class Step(NamedTuple):
    """One step: its number, the timestep it leaves, the lower one it reaches, and abar at both."""

    number: int
    timestep: int
    next_timestep: int
    abar: float
    abar_next: float


def timestep_grid(schedule: NoiseSchedule, num_steps: int, spacing: Spacing = "leading") -> list[int]:
    """The timesteps that are visited, in descending order; the last step goes from the last of them to timestep 0.

    Args:
        schedule: forward process with T timesteps.
        num_steps: steps wanted.
        spacing: "leading" is the published grid, range(0, T, T // num_steps) + 1: where num_steps does not divide T
            it holds a few more steps than asked for, as in the code release, and where it runs off the chain (e.g.
            all 1000 of 1000 steps) it ends at T - 1. "trailing" counts down from T - 1 in steps of T / num_steps,
            "linspace" divides the way from T - 1 to 0 evenly; both start where the latent holds the least signal,
            as schedules with zero terminal SNR need (Lin et al. 2024, Table 2).

    Raises:
        ValueError: unless 1 <= num_steps <= T, or for an unknown spacing.
    """
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
    # A step from timestep 0 to timestep 0 would do nothing.
    return sorted(grid - {0}, reverse=True)


def plan_steps(
    schedule: NoiseSchedule, num_steps: int, spacing: Spacing, timesteps: Sequence[int] | None
) -> list[Step]:
    """The steps of a few-step sampler; `timesteps` are visited instead of a grid where they are given."""
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
