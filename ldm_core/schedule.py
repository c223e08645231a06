"""The forward process: how much signal and how much noise a latent has at each timestep.

Shapes: z0, z_t, noise: (B, ...) latents; t: (B,) timesteps.
A chain has T variances, those of the timesteps 0 ... T - 1. Between two of them signal and noise are interpolated
linearly, and divided by sqrt(signal^2 + sigma^2), which must stay 1. A rectified flow is defined at all t in [0, T].
Source: Sec. 3.2 and appendix B of the paper; betas as in its code release; rectified flow: Liu et al. 2023.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ldm_core.configs.schedule import ScheduleConfig


class Level(NamedTuple):
    """How much signal and noise z_t = signal z_0 + sigma eps holds, as float64 numbers."""

    signal: float
    sigma: float

    @property
    def half_log_snr(self) -> float:
        """lambda = log(signal / sigma); -inf without signal, inf without noise."""
        if self.signal <= 0.0 or self.sigma <= 0.0:
            return -math.inf if self.signal <= 0.0 else math.inf
        return math.log(self.signal / self.sigma)


# The clean latent.
CLEAN = Level(1.0, 0.0)


class NoiseSchedule:
    """The forward process q(z_t | z_0) = N(signal_t z_0, sigma_t^2 I).

    For a chain signal_t = sqrt(abar_t) and sigma_t = sqrt(1 - abar_t), for a rectified flow 1 - t / T and t / T.

    Args:
        config: kind of process, and its settings.
        device: device to put the tables on.

    Attributes (of chains alone: computed in float64, kept as float32 tensors of shape (T,) on one device):
        betas: variance added by each step.
        alphas_cumprod: abar_t, the share of the variance that is still signal.
        signal_level: sqrt(abar_t).
        noise_level: sqrt(1 - abar_t).
    """

    def __init__(self, config: ScheduleConfig, *, device: torch.device | str = "cpu") -> None:
        self.config = config
        self._alphas_cumprod: list[float] = []
        self._elsewhere: dict[torch.device, NoiseSchedule] = {}
        if config.is_flow:
            return
        # A model that is built on the meta device, to load its weights later, needs real tables all the same.
        with torch.device("cpu"):
            alphas_cumprod = _alphas_cumprod(config)
            previous = torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod[:-1]])
            betas = 1.0 - alphas_cumprod / previous
        self._alphas_cumprod = alphas_cumprod.tolist()
        self.betas = betas.float().to(device)
        self.alphas_cumprod = alphas_cumprod.float().to(device)
        # 1 - abar in float64: near t = 0, where abar is close to 1, float32 would lose four digits of the noise level.
        self.signal_level = alphas_cumprod.sqrt().float().to(device)
        self.noise_level = (1.0 - alphas_cumprod).sqrt().float().to(device)

    @property
    def timesteps(self) -> int:
        """T, the length of the chain, or the timestep at which a rectified flow is all noise."""
        return self.config.timesteps

    @property
    def last_timestep(self) -> int:
        """The timestep with the most noise: T - 1 of a chain, T of a rectified flow."""
        return self.timesteps if self.config.is_flow else self.timesteps - 1

    def to(self, device: torch.device | str) -> "NoiseSchedule":
        """Return the same schedule with its tables on another device."""
        return NoiseSchedule(self.config, device=device)

    def alpha_bar(self, timestep: int) -> float:
        """Return abar_t of a chain as a float64 number; 1 before the first step (t = -1).

        Raises:
            ValueError: for a rectified flow, which has no steps.
        """
        if self.config.is_flow:
            raise ValueError(
                "a rectified_flow is no chain of steps, as DDPM and the variational bound need: take another sampler"
            )
        return 1.0 if timestep < 0 else self._alphas_cumprod[timestep]

    def at(self, timestep: float) -> Level:
        """Return signal and noise at one timestep as float64 numbers, for samplers' coefficients."""
        if self.config.is_flow:
            return Level(1.0 - timestep / self.timesteps, timestep / self.timesteps)
        low = min(int(timestep), self.timesteps - 2)
        below, above = (Level(math.sqrt(abar), math.sqrt(1.0 - abar)) for abar in self._alphas_cumprod[low : low + 2])
        if timestep in (low, low + 1):
            return below if timestep == low else above
        signal, sigma = (a + (timestep - low) * (b - a) for a, b in zip(below, above))
        return Level(signal / math.hypot(signal, sigma), sigma / math.hypot(signal, sigma))

    def add_noise(self, z0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Draw from q(z_t | z_0): z_t = signal_t z_0 + sigma_t noise (Sec. 3.2, appendix B).

        Args:
            z0: (B, ...) clean latents.
            noise: standard normal noise, of z0's shape.
            t: (B,) timesteps, see `levels`.

        Returns:
            z_t of z0's shape and dtype.

        Raises:
            ValueError: if the shapes do not agree, z0 is not floating point, or timesteps are out of range.
        """
        if not z0.is_floating_point():
            raise ValueError(f"latents must be floating point, got {z0.dtype}: noise would be rounded away")
        if noise.shape != z0.shape or t.shape != z0.shape[:1]:
            raise ValueError(
                "noise must have z0's shape and t one timestep a sample, "
                f"got z0 {tuple(z0.shape)}, noise {tuple(noise.shape)}, t {tuple(t.shape)}"
            )
        signal, sigma = self.levels(t, like=z0)
        return (signal * z0 + sigma * noise).to(z0.dtype)

    def levels(self, t: Tensor, *, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return signal and sigma, each (B, 1, ..., 1), to scale `like` (B, ...) by.

        They are of like's dtype, but float32 at least: in bf16 a noise level would be off by 0.4 percent.

        Args:
            t: (B,) timesteps, integer or floating: of a chain from 0 to T - 1, of a rectified flow from 0 to T.
            like: what is to be scaled.

        Raises:
            ValueError: if timesteps are out of range; that is checked on the CPU only, since reading them from a GPU
                would have to wait for it.
        """
        shape = (-1,) + (1,) * (like.dim() - 1)
        dtype = torch.promote_types(like.dtype, torch.float32)
        signal, sigma = self._levels(t)
        return signal.to(dtype).view(shape), sigma.to(dtype).view(shape)

    def snr(self, t: Tensor) -> Tensor:
        """Return the signal-to-noise ratio (signal / sigma)^2, (B,). Raises ValueError as `levels` does."""
        signal, sigma = self._levels(t)
        return (signal / sigma).square()

    def _levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return signal and sigma, each (B,)."""
        self._check(t)
        if self.config.is_flow:
            return 1.0 - t / self.timesteps, t / self.timesteps
        tables = self._on(t.device)
        if not t.is_floating_point():
            return tables.signal_level[t], tables.noise_level[t]
        low = t.long().clamp(max=self.timesteps - 2)
        signal, sigma = (
            table[low] + (t - low) * (table[low + 1] - table[low])
            for table in (tables.signal_level, tables.noise_level)
        )
        length = torch.hypot(signal, sigma)
        return signal / length, sigma / length

    def _check(self, t: Tensor) -> None:
        readable = t.device.type == "cpu" and t.numel() > 0 and not torch.compiler.is_compiling()
        if readable and not 0 <= t.min() <= t.max() <= self.last_timestep:
            raise ValueError(
                f"timesteps must be in 0 ... {self.last_timestep}, got {t.min().item()} ... {t.max().item()}"
            )

    def _on(self, device: torch.device) -> "NoiseSchedule":
        """Return this schedule with its tables on a device, moved there once and not at every step."""
        if device == self.betas.device:
            return self
        if device not in self._elsewhere:
            self._elsewhere[device] = self.to(device)
        return self._elsewhere[device]


def _alphas_cumprod(config: ScheduleConfig) -> Tensor:
    """Return abar_t, (T,) float64."""
    if config.kind == "cosine":
        betas = _cosine_betas(config.timesteps)
    elif config.kind == "linear":
        betas = torch.linspace(config.beta_start, config.beta_end, config.timesteps, dtype=torch.float64)
    else:
        # "scaled_linear": linear in sqrt(beta), which the code release calls "linear".
        start, end = math.sqrt(config.beta_start), math.sqrt(config.beta_end)
        betas = torch.linspace(start, end, config.timesteps, dtype=torch.float64).square()
    alphas_cumprod = torch.cumprod(1.0 - betas, dim=0)
    return _without_terminal_signal(alphas_cumprod) if config.zero_terminal_snr else alphas_cumprod


def _cosine_betas(timesteps: int) -> Tensor:
    """Return the betas of Nichol & Dhariwal 2021, Eq. (17), with their offset 0.008, clipped at 0.999."""
    offset = 0.008
    time = torch.arange(timesteps + 1, dtype=torch.float64) / timesteps
    alphas_cumprod = torch.cos((time + offset) / (1.0 + offset) * math.pi / 2).square()
    return (1.0 - alphas_cumprod[1:] / alphas_cumprod[:-1]).clamp(0.0, 0.999)


def _without_terminal_signal(alphas_cumprod: Tensor) -> Tensor:
    """Shift and scale sqrt(abar): the first value stays, the last is zero (Lin et al. 2024, Algorithm 1)."""
    root = alphas_cumprod.sqrt()
    return ((root - root[-1]) * (root[0] / (root[0] - root[-1]))).square()
