"""The forward process: how much signal and how much noise a latent has at each timestep.

Shapes: z0, z_t, noise: (B, ...) latents; t: (B,) integers in [0, timesteps).
Source: Sec. 3.2 and appendix B of the paper; betas as in its code release.
"""

import math

import torch
from torch import Tensor

from ldm_core.configs.schedule import ScheduleConfig


class NoiseSchedule:
    """Tables of the forward process q(z_t | z_0) = N(sqrt(abar_t) z_0, (1 - abar_t) I).

    Computed in float64, kept as float32 tensors of shape (T,) on one device.

    Args:
        config: number of timesteps and variances.
        device: device to put the tables on.

    Attributes:
        betas: variance added by each step.
        alphas_cumprod: abar_t, the share of the variance that is still signal.
        signal_level: sqrt(abar_t).
        noise_level: sqrt(1 - abar_t).
    """

    def __init__(self, config: ScheduleConfig, *, device: torch.device | str = "cpu") -> None:
        self.config = config
        # A model that is built on the meta device, to load its weights later, needs real tables all the same.
        with torch.device("cpu"):
            alphas_cumprod = _alphas_cumprod(config)
            previous = torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod[:-1]])
            betas = 1.0 - alphas_cumprod / previous
        self._alphas_cumprod: list[float] = alphas_cumprod.tolist()
        self.betas = betas.float().to(device)
        self.alphas_cumprod = alphas_cumprod.float().to(device)
        # 1 - abar in float64: near t = 0, where abar is close to 1, float32 would lose four digits of the noise level.
        self.signal_level = alphas_cumprod.sqrt().float().to(device)
        self.noise_level = (1.0 - alphas_cumprod).sqrt().float().to(device)
        self._elsewhere: dict[torch.device, NoiseSchedule] = {}

    @property
    def timesteps(self) -> int:
        """T, the length of the chain."""
        return self.config.timesteps

    def to(self, device: torch.device | str) -> "NoiseSchedule":
        """Return the same schedule with its tables on another device."""
        return NoiseSchedule(self.config, device=device)

    def alpha_bar(self, timestep: int) -> float:
        """Return abar_t as a float64 number, for samplers' coefficients; 1 before the first step (t = -1)."""
        return 1.0 if timestep < 0 else self._alphas_cumprod[timestep]

    def add_noise(self, z0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Draw from q(z_t | z_0): z_t = sqrt(abar_t) z_0 + sqrt(1 - abar_t) noise (Sec. 3.2, appendix B).

        Args:
            z0: (B, ...) clean latents.
            noise: standard normal noise, of z0's shape.
            t: (B,) integer timesteps in [0, T).

        Returns:
            z_t of z0's shape and dtype.

        Raises:
            ValueError: if the shapes do not agree, z0 is not floating point, or timesteps are not on the chain.
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
        """Return sqrt(abar_t) and sqrt(1 - abar_t), each (B, 1, ..., 1), to scale `like` (B, ...) by.

        They are of like's dtype, but float32 at least: in bf16 a noise level would be off by 0.4 percent.

        Raises:
            ValueError: if timesteps are not integers, or not in [0, T); the range is checked on the CPU only, since
                reading them from a GPU would have to wait for it.
        """
        self._check(t)
        shape = (-1,) + (1,) * (like.dim() - 1)
        tables = self._on(t.device)
        dtype = torch.promote_types(like.dtype, torch.float32)
        return tables.signal_level[t].to(dtype).view(shape), tables.noise_level[t].to(dtype).view(shape)

    def snr(self, t: Tensor) -> Tensor:
        """Return the signal-to-noise ratio abar_t / (1 - abar_t), (B,) float32. Raises ValueError as `levels` does."""
        self._check(t)
        tables = self._on(t.device)
        return (tables.signal_level[t] / tables.noise_level[t]).square()

    def _check(self, t: Tensor) -> None:
        if t.is_floating_point():
            raise ValueError(f"timesteps must be integers, got {t.dtype}")
        readable = t.device.type == "cpu" and t.numel() > 0 and not torch.compiler.is_compiling()
        if readable and not 0 <= int(t.min()) <= int(t.max()) < self.timesteps:
            raise ValueError(f"timesteps must be in 0 ... {self.timesteps - 1}, got {int(t.min())} ... {int(t.max())}")

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
