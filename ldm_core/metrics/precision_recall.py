"""Improved precision and recall (Kynkäänniemi et al. 2019).

A set's manifold is estimated by balls around its images, each as large as the distance to the third nearest neighbour.

Shapes: generated: (N, D), reference: (M, D) features.
"""

from typing import NamedTuple

import torch
from torch import Tensor

NEIGHBOURS = 3
# Rows of the distance matrix in memory at a time: 0.4 GB against 50,000 images.
BLOCK = 1024


class PrecisionRecall(NamedTuple):
    """precision: share of generated images that look real; recall: share of real images that can be generated."""

    precision: float
    recall: float


def precision_recall(generated: Tensor, reference: Tensor) -> PrecisionRecall:
    """Return the share of each set that lies in the other's manifold, Eq. (1) and (2).

    Args:
        generated: (N, D) features of generated images, N at least 4.
        reference: (M, D) features of real images, M at least 4.

    Returns:
        Precision and recall from 0 to 1.

    Raises:
        ValueError: if the widths differ or a set is too small for a third neighbour.
    """
    if generated.dim() != 2 or reference.dim() != 2 or generated.shape[1] != reference.shape[1]:
        raise ValueError(
            f"features must be (N, D) and (M, D), got {tuple(generated.shape)} and {tuple(reference.shape)}"
        )
    if min(len(generated), len(reference)) <= NEIGHBOURS:
        raise ValueError(
            f"precision and recall need more than {NEIGHBOURS} images a set, got {len(generated)} and {len(reference)}"
        )
    # float64: |x|^2 + |y|^2 - 2 x.y loses half the digits, and what is left decides whether an image is inside.
    generated, reference = generated.double(), reference.double()
    return PrecisionRecall(
        precision=_share_inside(generated, reference, _radii(reference)),
        recall=_share_inside(reference, generated, _radii(generated)),
    )


def _radii(features: Tensor) -> Tensor:
    """Return the (N,) squared distances of each image to its third neighbour, itself not counted."""
    radii = []
    for start in range(0, len(features), BLOCK):
        distances = _squared_distances(features[start : start + BLOCK], features)
        rows = torch.arange(len(distances), device=features.device)
        distances[rows, rows + start] = torch.inf
        radii.append(distances.kthvalue(NEIGHBOURS, dim=1).values)
    return torch.cat(radii)


def _share_inside(queries: Tensor, centres: Tensor, radii: Tensor) -> float:
    """Return the share of queries that lie in at least one ball; radii are squared."""
    inside = [(_squared_distances(block, centres) <= radii).any(dim=1) for block in queries.split(BLOCK)]
    return torch.cat(inside).double().mean().item()


def _squared_distances(x: Tensor, y: Tensor) -> Tensor:
    return (x.square().sum(dim=1)[:, None] + y.square().sum(dim=1) - 2 * x @ y.T).clamp(min=0)
