"""Choices of the objective (paper, Sec. 3.2), checked without torch: parameterization, loss, and timesteps drawn."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from ldm_core.configs.schedule import ScheduleConfig

Parameterization = Literal["eps", "v", "x0", "flow"]

LossKind = Literal["l1", "l2"]

# Of chains, and of rectified flows: v is the angular velocity on a circle that only chains move on.
PARAMETERIZATIONS: tuple[Parameterization, ...] = ("eps", "v", "x0")
FLOW_PARAMETERIZATIONS: tuple[Parameterization, ...] = ("flow", "x0")


@dataclass(frozen=True, kw_only=True)
class TimestepsConfig:
    """The distribution that a training's timesteps are drawn from; see `ldm_core.timesteps`.

    Args:
        kind: "uniform", or "logit_normal": t / T = sigmoid(mean + std n) with a standard normal n (Esser et al. 2024,
            Sec. 3.1), which favours the middle.
        mean, std: of the logit-normal distribution; a mean below 0 favours little noise.

    Raises:
        ValueError: for an unknown kind, a std that is not positive, numbers that are not finite, or a mean or std of
            uniform timesteps.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    kind: Literal["uniform", "logit_normal"] = "uniform"
    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in ("uniform", "logit_normal"):
            raise ValueError(f"timesteps must be uniform or logit_normal, got {self.kind!r}")
        if not (abs(self.mean) < float("inf") and 0.0 < self.std < float("inf")):
            raise ValueError(f"logit_normal needs a finite mean and a positive std, got {self.mean} and {self.std}")
        if self.kind == "uniform" and (self.mean, self.std) != (0.0, 1.0):
            raise ValueError("uniform timesteps have neither mean nor std: leave them out, or set kind: logit_normal")


def check_objective(
    schedule: ScheduleConfig,
    *,
    parameterization: str,
    loss: str = "l2",
    min_snr_gamma: float | None = None,
    vlb_weight: float = 0.0,
) -> None:
    """Raise ValueError for an unknown choice, or one that the schedule has not or cannot learn at its last timestep."""
    check_parameterization_name(parameterization)
    if loss not in ("l1", "l2"):
        raise ValueError(f"loss must be l1 or l2, got {loss!r}")
    if schedule.is_flow and parameterization not in FLOW_PARAMETERIZATIONS:
        raise ValueError(f"with a rectified_flow use parameterization flow (or x0), got {parameterization}")
    if not schedule.is_flow and parameterization == "flow":
        raise ValueError(f"only a rectified_flow has parameterization flow, got a schedule of kind {schedule.kind}")
    if parameterization == "eps" and schedule.zero_terminal_snr:
        raise ValueError("with zero_terminal_snr the last timestep teaches eps nothing: use parameterization v or x0")
    if min_snr_gamma is not None and not min_snr_gamma > 0:
        raise ValueError(f"min_snr_gamma must be positive or None, got {min_snr_gamma}")
    if min_snr_gamma is not None and schedule.ends_without_signal:
        which = "rectified_flow" if schedule.is_flow else "zero_terminal_snr schedule"
        raise ValueError(
            f"min_snr_gamma gives the last timestep of a {which} no weight, and sampling begins there: leave it None"
        )
    if not 0.0 <= vlb_weight < float("inf"):
        raise ValueError(f"vlb_weight must be a finite number of at least 0, got {vlb_weight}")
    if vlb_weight and schedule.is_flow:
        raise ValueError("the variational bound is that of a chain, which a rectified_flow is not: leave vlb_weight 0")


def check_parameterization_name(parameterization: str) -> None:
    """Raise ValueError for a parameterization that does not exist."""
    if parameterization not in (*PARAMETERIZATIONS, *FLOW_PARAMETERIZATIONS):
        raise ValueError(f"parameterization must be eps, v, x0 or flow, got {parameterization!r}")
