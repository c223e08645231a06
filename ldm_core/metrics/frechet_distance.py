"""Mean and covariance of features over a stream of images, and the Fréchet distance between two such pairs.

Shapes: features: (B, D) of one batch, (N, D) of a set.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """count of the images; mean: (D,) and unbiased covariance: (D, D), both float64."""

    count: int
    mean: Tensor
    covariance: Tensor


class MomentSums:
    """Sums in float64 from which mean and covariance follow: 32 MiB for the 2048 features of FID, however many images.

    Sums of parts add up to the sums of the whole, in any order, to the rounding of float64.
    """

    def __init__(self) -> None:
        self.count = 0
        self._sum: Tensor | None = None
        self._outer: Tensor | None = None

    def update(self, features: Tensor) -> None:
        """Add features (B, D) of any floating dtype."""
        x = features.detach().to("cpu", torch.float64)
        self._add(len(x), x.sum(dim=0), x.T @ x)

    def merge(self, other: "MomentSums") -> None:
        """Add what another worker has summed."""
        if other._sum is not None and other._outer is not None:
            self._add(other.count, other._sum, other._outer)

    def moments(self) -> Moments:
        """Mean and covariance of all that was added; the covariance of a single image is zero.

        Raises:
            ValueError: when nothing was added.
        """
        if self._sum is None or self._outer is None:
            raise ValueError("moments need at least one image, got none")
        mean = self._sum / self.count
        scatter = self._outer - self.count * torch.outer(mean, mean)
        return Moments(self.count, mean, scatter / max(self.count - 1, 1))

    def _add(self, count: int, total: Tensor, outer: Tensor) -> None:
        self.count += count
        if self._sum is None or self._outer is None:
            self._sum, self._outer = total.clone(), outer.clone()
        else:
            self._sum += total
            self._outer += outer


def frechet_distance(x: Moments, y: Moments) -> float:
    """Squared Fréchet distance of the Gaussians of two sets; FID of Inception features (Heusel et al. 2017, Eq. 6).

    Args:
        x, y: moments over at least two images each, of one width D.

    Returns:
        |mean_x - mean_y|^2 + Tr(C_x + C_y - 2 (C_x C_y)^(1/2)), never below zero.

    Raises:
        ValueError: when the widths differ or a set has fewer than two images.
    """
    if x.mean.shape != y.mean.shape:
        raise ValueError(f"moments must be of one width, got {len(x.mean)} and {len(y.mean)}: use one extractor")
    if min(x.count, y.count) < 2:
        raise ValueError(f"a covariance needs at least two images, got {x.count} and {y.count}")
    offset = (x.mean - y.mean).square().sum()
    # With C = L L', Tr (C_x C_y)^(1/2) is the sum of the singular values of L_x' L_y: real, whatever the rank.
    cross = torch.linalg.svdvals(_root(x.covariance).T @ _root(y.covariance)).sum()
    distance = offset + x.covariance.trace() + y.covariance.trace() - 2 * cross
    return max(distance.item(), 0.0)


def _root(covariance: Tensor) -> Tensor:
    """L (D, r) with L L' = covariance, without the directions that are rounding noise."""
    values, vectors = torch.linalg.eigh(covariance)
    kept = values > values[-1].clamp(min=0) * len(values) * torch.finfo(values.dtype).eps
    return vectors[:, kept] * values[kept].sqrt()
