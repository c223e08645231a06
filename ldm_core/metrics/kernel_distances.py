"""KID and CMMD: maximum mean discrepancies (MMD) between two sets of features.

KID has a polynomial kernel on features of Inception, CMMD a Gaussian kernel on embeddings of CLIP. Unlike FID, neither
assumes the features to be normally distributed.

Shapes: x, y: (N, D) and (M, D) features.
"""

from typing import NamedTuple

import torch
from torch import Tensor

# As in the published code of each.
SUBSETS = 100
SUBSET_SIZE = 1000
CMMD_SIGMA = 10.0
CMMD_SCALE = 1000.0
# Rows of the kernel matrix in memory at a time: 0.8 GB against 50,000 images.
BLOCK = 2048


class KernelDistance(NamedTuple):
    """Mean and standard deviation over subsets, with their number and the images in each."""

    mean: float
    std: float
    subsets: int
    subset_size: int


def kid(x: Tensor, y: Tensor, *, seed: int = 0) -> KernelDistance:
    """Return the Kernel Inception Distance (Binkowski et al. 2018, Eq. 4).

    The unbiased squared MMD under the kernel (x.y / D + 1)^3, averaged over 100 random subsets.

    Args:
        x: (N, D) features of generated images, N at least 2.
        y: (M, D) features of reference images, M at least 2.
        seed: seed of the subsets, each of 1000 images or of as many as the smaller set has.

    Returns:
        Mean and std over the subsets; a single subset if it would contain all images of both sets.

    Raises:
        ValueError: if the widths differ or a set has fewer than two images.
    """
    _check(x, y, minimum=2)
    size = min(SUBSET_SIZE, len(x), len(y))
    subsets = 1 if size == len(x) == len(y) else SUBSETS
    generator = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(subsets):
        chosen_x, chosen_y = (
            features[torch.randperm(len(features), generator=generator)[:size].to(features.device)].double()
            for features in (x, y)
        )
        values.append(_unbiased_polynomial_mmd(chosen_x, chosen_y))
    value = torch.stack(values)
    return KernelDistance(value.mean().item(), value.std(correction=0).item(), subsets, size)


def cmmd(x: Tensor, y: Tensor) -> float:
    """Return CMMD (Jayasumana et al. 2024): the squared MMD of CLIP embeddings under a Gaussian kernel, times 1000.

    Sigma is 10. The estimator is the minimum-variance one on embeddings of unit length, as in the published code.

    Args:
        x: (N, D) embeddings of generated images; normalised here.
        y: (M, D) embeddings of reference images; normalised here.

    Returns:
        The distance, zero for equal sets.

    Raises:
        ValueError: if the widths differ or a set is empty.
    """
    _check(x, y, minimum=1)
    x, y = (torch.nn.functional.normalize(features.double(), dim=1) for features in (x, y))
    distance = _mean_gaussian(x, x) + _mean_gaussian(y, y) - 2 * _mean_gaussian(x, y)
    return CMMD_SCALE * distance


def _unbiased_polynomial_mmd(x: Tensor, y: Tensor) -> Tensor:
    count, width = x.shape
    within = torch.zeros((), dtype=x.dtype, device=x.device)
    for features in (x, y):
        kernel = (features @ features.T / width + 1).pow(3)
        # Without the diagonal, an image's likeness to itself, the estimate is unbiased.
        within += (kernel.sum() - kernel.trace()) / (count * (count - 1))
    return (within - 2 * (x @ y.T / width + 1).pow(3).mean()).cpu()


def _mean_gaussian(x: Tensor, y: Tensor) -> float:
    """Return the mean of exp(-|x - y|^2 / (2 sigma^2)) over all pairs of unit vectors, a block of rows at a time."""
    total = 0.0
    for block in x.split(BLOCK):
        squared_distance = 2 - 2 * block @ y.T
        total += torch.exp(-squared_distance / (2 * CMMD_SIGMA**2)).sum().item()
    return total / (len(x) * len(y))


def _check(x: Tensor, y: Tensor, *, minimum: int) -> None:
    if x.dim() != 2 or y.dim() != 2 or x.shape[1] != y.shape[1]:
        raise ValueError(f"features must be (N, D) and (M, D), got {tuple(x.shape)} and {tuple(y.shape)}")
    if min(len(x), len(y)) < minimum:
        raise ValueError(f"the distance needs at least {minimum} images a set, got {len(x)} and {len(y)}")
