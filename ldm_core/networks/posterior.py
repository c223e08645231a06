"""What first stages encode images to: a distribution over latents, or one latent (paper, Sec. 3.1).

Shapes: mean, logvar, latent: (B, C, h, w); moments: (B, 1 or 2, C, h, w), as latents are cached.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class DiagonalGaussian:
    """Posterior q(z | x) of a KL first stage: mean and logvar are (B, C, h, w)."""

    mean: Tensor
    logvar: Tensor

    @classmethod
    def from_moments(cls, moments: Tensor) -> DiagonalGaussian:
        """Rebuild from `moments`, (B, 2, C, h, w) as the latent cache stores them; ValueError for another shape."""
        if moments.ndim != 5 or moments.shape[1] != 2:
            raise ValueError(f"moments must be (B, 2, C, h, w), mean and logvar, got shape {tuple(moments.shape)}")
        return cls(*moments.unbind(1))

    @property
    def moments(self) -> Tensor:
        """(B, 2, C, h, w): mean, logvar."""
        return torch.stack([self.mean, self.logvar], dim=1)

    def mode(self) -> Tensor:
        """(B, C, h, w) most likely latent."""
        return self.mean

    def sample(self, *, generator: torch.Generator | None = None, noise: Tensor | None = None) -> Tensor:
        """(B, C, h, w) mean + std * noise; noise of that shape is drawn from the generator unless given.

        Raises:
            ValueError: noise of another shape.
        """
        if noise is not None and noise.shape != self.mean.shape:
            raise ValueError(f"noise must have the latent's shape {tuple(self.mean.shape)}, got {tuple(noise.shape)}")
        if noise is None:
            device = self.mean.device if generator is None else generator.device
            noise = torch.randn(self.mean.shape, generator=generator, device=device, dtype=self.mean.dtype)
        return self.mean + torch.exp(0.5 * self.logvar) * noise.to(self.mean)

    def kl(self) -> Tensor:
        """(B,) Kullback-Leibler divergence from a standard normal in nats, summed over C, h, w."""
        return 0.5 * (self.mean.square() + self.logvar.exp() - 1.0 - self.logvar).flatten(1).sum(1)


@dataclass(frozen=True)
class PointPosterior:
    """What a VQ first stage encodes to: one latent (B, C, h, w), before quantization."""

    latent: Tensor

    @property
    def moments(self) -> Tensor:
        """(B, 1, C, h, w)."""
        return self.latent[:, None]

    def mode(self) -> Tensor:
        """(B, C, h, w)."""
        return self.latent

    def sample(self, *, generator: torch.Generator | None = None, noise: Tensor | None = None) -> Tensor:
        """(B, C, h, w), the mode: nothing is random here."""
        return self.latent


Posterior = DiagonalGaussian | PointPosterior
