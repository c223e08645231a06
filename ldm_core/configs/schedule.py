"""The variances of the forward process (Sec. 3.2 and appendix B of the paper; betas as in its code release)."""

from dataclasses import dataclass
from typing import ClassVar, Literal

ScheduleKind = Literal["scaled_linear", "linear", "cosine"]


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Variances of the forward process.

    Args:
        timesteps: T, length of the chain.
        kind: "scaled_linear" is linear in sqrt(beta), what the paper's code calls "linear"; "linear" is
            linear in beta (Ho et al. 2020); "cosine" is Nichol & Dhariwal 2021 and uses neither beta_start
            nor beta_end.
        beta_start: variance of the first step.
        beta_end: variance of the last step.
        zero_terminal_snr: rescale so that the last timestep holds no signal at all (Lin et al. 2024,
            Algorithm 1).

    Raises:
        ValueError: for fewer than two timesteps, an unknown kind or betas outside 0 < start <= end < 1.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    timesteps: int = 1000
    kind: ScheduleKind = "scaled_linear"
    beta_start: float = 0.00085
    beta_end: float = 0.012
    zero_terminal_snr: bool = False

    def __post_init__(self) -> None:
        if self.timesteps < 2:
            raise ValueError(f"a schedule needs at least 2 timesteps, got timesteps={self.timesteps}")
        if self.kind not in ("scaled_linear", "linear", "cosine"):
            raise ValueError(f"schedule kind must be scaled_linear, linear or cosine, got {self.kind!r}")
        if not 0.0 < self.beta_start <= self.beta_end < 1.0:
            raise ValueError(
                "a schedule needs 0 < beta_start <= beta_end < 1, "
                f"got beta_start={self.beta_start}, beta_end={self.beta_end}"
            )
