"""Posteriors of first stages: a distribution over latents, or a single latent (paper, Sec. 3.1).

Shapes: mean, logvar, latent: (B, C, h, w); moments: (B, 1 or 2, C, h, w), the layout of the latent cache.
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
        """Rebuild a posterior from its `moments`, (B, 2, C, h, w). Raises ValueError for another shape."""
        if moments.ndim != 5 or moments.shape[1] != 2:
            raise ValueError(f"moments must be (B, 2, C, h, w), mean and logvar, got shape {tuple(moments.shape)}")
        return cls(*moments.unbind(1))

    @property
    def moments(self) -> Tensor:
        """Mean and logvar, (B, 2, C, h, w)."""
        return torch.stack([self.mean, self.logvar], dim=1)

    def mode(self) -> Tensor:
        """Return the most likely latent, (B, C, h, w)."""
        return self.mean

    def sample(self, *, generator: torch.Generator | None = None, noise: Tensor | None = None) -> Tensor:
        """Return mean + std * noise, (B, C, h, w); the noise is drawn from the generator unless it is given.

        Raises:
            ValueError: the noise has another shape than the latent.
        """
        if noise is not None and noise.shape != self.mean.shape:
            raise ValueError(f"noise must have the latent's shape {tuple(self.mean.shape)}, got {tuple(noise.shape)}")
        if noise is None:
            device = self.mean.device if generator is None else generator.device
            noise = torch.randn(self.mean.shape, generator=generator, device=device, dtype=self.mean.dtype)
        return self.mean + torch.exp(0.5 * self.logvar) * noise.to(self.mean)

    def kl(self) -> Tensor:
        """Return the Kullback-Leibler divergence from a standard normal, (B,) nats, summed over C, h, w.

        It is computed and returned in float32 at least: a sum of thousands is too much for half precision.
        """
        dtype = torch.promote_types(self.mean.dtype, torch.float32)
        mean, logvar = self.mean.to(dtype), self.logvar.to(dtype)
        return 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).flatten(1).sum(1)


@dataclass(frozen=True)
class PointPosterior:
    """Posterior of a VQ first stage: a single latent (B, C, h, w), before quantization."""

    latent: Tensor

    @property
    def moments(self) -> Tensor:
        """The latent, (B, 1, C, h, w)."""
        return self.latent[:, None]

    def mode(self) -> Tensor:
        """Return the latent, (B, C, h, w)."""
        return self.latent

    def sample(self, *, generator: torch.Generator | None = None, noise: Tensor | None = None) -> Tensor:
        """Return the latent, (B, C, h, w): nothing is random here."""
        return self.latent


Posterior = DiagonalGaussian | PointPosterior
