"""Convolutional building blocks shared by the first stage and the UNet.

Shapes: x, h: (B, C, H, W) feature map; embedding: (B, E) timestep embedding; t: (B,) timesteps.
Source: Rombach et al. 2022, Appendix E; residual blocks as in Ho et al. 2020 and Dhariwal & Nichol 2021.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """Switch autocast off; devices without it, such as meta, are as they are."""
    available = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if available else nullcontext()


def zero_init(module: nn.Conv2d) -> nn.Conv2d:
    """Zero a convolution's weights, so that the residual branch it ends starts as the identity."""
    nn.init.zeros_(module.weight)
    if module.bias is not None:
        nn.init.zeros_(module.bias)
    return module


def activate(normalized: Tensor) -> Tensor:
    """Apply SiLU to the output of a norm; in place if no gradients are recorded, which saves a pass over memory."""
    return F.silu(normalized, inplace=not torch.is_grad_enabled())


def repeat_to_batch(x: Tensor, batch: int) -> Tensor:
    """Repeat x, (B, ...) -> (batch, ...), for several contexts that share it; return x itself if batch is B."""
    return x if x.shape[0] == batch else x.repeat(batch // x.shape[0], *[1] * (x.ndim - 1))


def sinusoidal_embedding(t: Tensor, channels: int, *, max_period: float = 10_000.0) -> Tensor:
    """Embed timesteps by sinusoids, cosines first (Vaswani et al. 2017; Ho et al. 2020).

    Args:
        t: (B,) timesteps, integer or floating.
        channels: width of the embedding, even.
        max_period: period of the slowest wave, in timesteps.

    Returns:
        (B, channels) float32.
    """
    half = channels // 2
    # Multiplied, then divided, as published: the other order differs in the last bits of float32.
    frequencies = torch.exp(-math.log(max_period) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    phases = t.float()[:, None] * frequencies
    return torch.cat([phases.cos(), phases.sin()], dim=1)


class TimestepEmbedding(nn.Module):
    """Sinusoids of t, a two-layer perceptron of four times the width, and the SiLU that every block starts with."""

    def __init__(self, model_channels: int) -> None:
        super().__init__()
        self.model_channels = model_channels
        self.linear1 = nn.Linear(model_channels, 4 * model_channels)
        self.linear2 = nn.Linear(4 * model_channels, 4 * model_channels)

    def forward(self, t: Tensor) -> Tensor:
        """(B,) timesteps -> (B, 4 * model_channels) in the dtype of the weights."""
        waves = sinusoidal_embedding(t, self.model_channels).to(self.linear1.weight.dtype)
        # In full precision under autocast, too: neighbouring timesteps lie close, and it costs next to nothing.
        with full_precision(t.device):
            return F.silu(self.linear2(F.silu(self.linear1(waves))))


class Downsample(nn.Module):
    """Halve height and width by a strided 3x3 convolution.

    The UNet pads both sides; the first stage pads right and bottom only (`asymmetric`), as its published
    weights expect.
    """

    def __init__(self, channels: int, *, asymmetric: bool = False) -> None:
        super().__init__()
        self.asymmetric = asymmetric
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=0 if asymmetric else 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H/2, W/2)."""
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.asymmetric else x)


class Upsample(nn.Module):
    """Double height and width by nearest neighbours, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, 2H, 2W)."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class ResidualBlock(nn.Module):
    """GroupNorm-SiLU-conv twice with a shortcut; optionally modulated by a timestep embedding, optionally resampling.

    Args:
        in_channels, out_channels: channels before and after; if they differ, the shortcut is a 1x1 convolution.
        embedding_channels: width E of the timestep embedding; None for the first stage, which has none.
        scale_shift: modulate the second norm by (1 + scale, shift) instead of adding to its input.
        resample: "up" or "down" changes the resolution by two inside the block (nearest / average pooling).
        dropout: probability before the last convolution.
        eps: epsilon of the group norms (1e-5 in the UNet, 1e-6 in the first stage).
        groups: number of groups of the group norms.
        zero_output: start the last convolution at zero, as the UNet does.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        embedding_channels: int | None = None,
        scale_shift: bool = False,
        resample: Literal["up", "down"] | None = None,
        dropout: float = 0.0,
        eps: float = 1e-5,
        groups: int = 32,
        zero_output: bool = True,
    ) -> None:
        super().__init__()
        self.scale_shift = scale_shift
        self.resample = resample
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.embedding: nn.Linear | None = None
        if embedding_channels is not None:
            self.embedding = nn.Linear(embedding_channels, out_channels * (2 if scale_shift else 1))
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=eps)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if zero_output:
            zero_init(self.conv2)
        self.shortcut = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        """(B, C_in, H, W), (B, E) -> (B, C_out, H', W')."""
        h = self._resample(activate(self.norm1(x)))
        h = self.conv1(h)
        if self.embedding is None:
            h = self.norm2(h)
        else:
            assert embedding is not None
            h = self._modulate(h, repeat_to_batch(self.embedding(embedding), x.shape[0])[:, :, None, None])
        h = self.conv2(self.dropout(activate(h)))
        return h.add_(self.shortcut(self._resample(x)))

    def _modulate(self, h: Tensor, modulation: Tensor) -> Tensor:
        if not self.scale_shift:
            return self.norm2(h + modulation)
        scale, shift = modulation.chunk(2, dim=1)
        return self.norm2(h) * (1 + scale) + shift

    def _resample(self, x: Tensor) -> Tensor:
        if self.resample == "up":
            return F.interpolate(x, scale_factor=2.0, mode="nearest")
        if self.resample == "down":
            return F.avg_pool2d(x, 2)
        return x
