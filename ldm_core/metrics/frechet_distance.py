"""FID and CLIP-FD: the Fréchet distance between two sets of features, each summed up by its mean and covariance.

FID is the distance in the features of Inception (Heusel et al. 2017), CLIP-FD in those of CLIP, and reconstruction FID
is FID between images and their reconstructions by a first stage (R-FID in the paper's Table 8).

Shapes: features: (B, D) of one batch, (N, D) of a set.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """Mean and covariance of a set's features.

    Args:
        count: number of images.
        mean: (D,) float64.
        covariance: (D, D) float64, unbiased.
    """

    count: int
    mean: Tensor
    covariance: Tensor

    @cached_property
    def root(self) -> Tensor:
        """L (D, r) with L L' = covariance, r its rank; kept, as finding it is most of the cost of a distance."""
        values, vectors = torch.linalg.eigh(self.covariance)
        # Directions below the rounding error of the largest eigenvalue are noise, of either sign.
        kept = values > values[-1].clamp(min=0) * len(values) * torch.finfo(values.dtype).eps
        return vectors[:, kept] * values[kept].sqrt()


class MomentSums:
    """Running sums of features and their outer products, from which mean and covariance follow.

    float64: 32 MiB for the 2048 features of FID, however many images. The sums of parts add up to those of the whole,
    in any order, to the rounding of float64.
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
        """Add another worker's sums."""
        if other._sum is not None and other._outer is not None:
            self._add(other.count, other._sum, other._outer)

    def moments(self) -> Moments:
        """Return mean and covariance of all that was added; the covariance of a single image is zero.

        Raises:
            ValueError: if nothing was added.
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
    """Return the squared Fréchet distance of two Gaussians: FID, for features of Inception (Heusel et al., Eq. 6).

    Args:
        x, y: moments of the same D features, over at least two images each.

    Returns:
        |mean_x - mean_y|^2 + Tr(C_x + C_y - 2 (C_x C_y)^(1/2)), never below zero.

    Raises:
        ValueError: if the widths differ or a set has fewer than two images.
    """
    if x.mean.shape != y.mean.shape:
        raise ValueError(f"moments must be of one width, got {len(x.mean)} and {len(y.mean)}: use one extractor")
    if min(x.count, y.count) < 2:
        raise ValueError(f"a covariance needs at least two images, got {x.count} and {y.count}")
    offset = (x.mean - y.mean).square().sum()
    # With C = L L', Tr (C_x C_y)^(1/2) is the sum of the singular values of L_x' L_y. A matrix square root, as in
    # the published code, turns complex by rounding if there are fewer images than features.
    cross = torch.linalg.svdvals(x.root.T @ y.root).sum()
    distance = offset + x.covariance.trace() + y.covariance.trace() - 2 * cross
    return max(distance.item(), 0.0)
