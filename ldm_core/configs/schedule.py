"""The forward process: variances of a chain (Sec. 3.2 and appendix B of the paper), or a rectified flow."""

from dataclasses import dataclass
from typing import ClassVar, Literal

ScheduleKind = Literal["scaled_linear", "linear", "cosine", "rectified_flow"]
KINDS: tuple[ScheduleKind, ...] = ("scaled_linear", "linear", "cosine", "rectified_flow")


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """The forward process.

    Args:
        timesteps: T, length of the chain; of a rectified flow, the timestep that the network is given at its end,
            where all is noise.
        kind: "scaled_linear" is linear in sqrt(beta), what the paper's code calls "linear"; "linear" is
            linear in beta (Ho et al. 2020); "cosine" is Nichol & Dhariwal 2021 and uses neither beta_start
            nor beta_end. These three are chains. "rectified_flow" is continuous, z_t = (1 - t / T) z_0 + t / T eps
            (Liu et al. 2023), and has neither betas nor zero_terminal_snr.
        beta_start: variance of the first step.
        beta_end: variance of the last step.
        zero_terminal_snr: rescale so that the last timestep holds no signal at all (Lin et al. 2024,
            Algorithm 1).
        shift: alpha of a rectified flow, which moves the timesteps that are drawn in training and visited in sampling
            towards noise (Esser et al. 2024, Eq. 23: the square root of how many times more pixels there are).

    Raises:
        ValueError: for fewer than two timesteps, an unknown kind, betas outside 0 < start <= end < 1, a shift that is
            not positive, or a setting that the kind does not have.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    timesteps: int = 1000
    kind: ScheduleKind = "scaled_linear"
    beta_start: float = 0.00085
    beta_end: float = 0.012
    zero_terminal_snr: bool = False
    shift: float = 1.0

    def __post_init__(self) -> None:
        if self.timesteps < 2:
            raise ValueError(f"a schedule needs at least 2 timesteps, got timesteps={self.timesteps}")
        if self.kind not in KINDS:
            raise ValueError(f"schedule kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        if not 0.0 < self.beta_start <= self.beta_end < 1.0:
            raise ValueError(
                "a schedule needs 0 < beta_start <= beta_end < 1, "
                f"got beta_start={self.beta_start}, beta_end={self.beta_end}"
            )
        if not 0.0 < self.shift < float("inf"):
            raise ValueError(f"shift must be a positive number, got {self.shift}")
        others = ("beta_start", "beta_end", "zero_terminal_snr") if self.is_flow else ("shift",)
        for name in others:
            if (value := getattr(self, name)) != getattr(type(self), name):
                raise ValueError(f"a schedule of kind {self.kind} has no {name}, got {value}: leave it out")

    @property
    def is_flow(self) -> bool:
        """Whether this is a rectified flow, whose timesteps are real numbers, and no chain."""
        return self.kind == "rectified_flow"

    @property
    def ends_without_signal(self) -> bool:
        """Whether the last timestep is all noise: sampling must begin there, and the noise alone tells nothing."""
        return self.is_flow or self.zero_terminal_snr
