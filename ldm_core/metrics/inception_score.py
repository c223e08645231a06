"""The Inception score, over a stream of logits (Salimans et al. 2016, Sec. 4).

Shapes: logits: (B, K) of K classes; index: (B,) numbers of the images.
"""

from typing import NamedTuple

import torch
from torch import Tensor

# As in the published code.
SPLITS = 10


class InceptionScore(NamedTuple):
    """Mean and standard deviation over the splits that hold images, their number, and the smallest one's images."""

    mean: float
    std: float
    splits: int
    smallest_split: int


class InceptionScoreSums:
    """Running sums from which the score of each split follows; image i is in split i mod 10, whoever measures it.

    The published code cuts the images into ten runs instead, which would need their number beforehand. For images in
    no particular order both are random splits.
    """

    def __init__(self) -> None:
        self.counts = torch.zeros(SPLITS, dtype=torch.int64)
        self._negative_entropy = torch.zeros(SPLITS, dtype=torch.float64)
        self._probabilities: Tensor | None = None

    def update(self, index: Tensor, logits: Tensor) -> None:
        """Add the logits (B, K) of images numbered by index (B,)."""
        log_p = logits.detach().to("cpu", torch.float64).log_softmax(dim=1)
        p, split = log_p.exp(), index.cpu() % SPLITS
        if self._probabilities is None:
            self._probabilities = torch.zeros(SPLITS, p.shape[1], dtype=torch.float64)
        self.counts += torch.bincount(split, minlength=SPLITS)
        self._negative_entropy.index_add_(0, split, (p * log_p).sum(dim=1))
        self._probabilities.index_add_(0, split, p)

    def merge(self, other: "InceptionScoreSums") -> None:
        """Add another worker's sums."""
        if other._probabilities is None:
            return
        if self._probabilities is None:
            self._probabilities = torch.zeros_like(other._probabilities)
        self.counts += other.counts
        self._negative_entropy += other._negative_entropy
        self._probabilities += other._probabilities

    def score(self) -> InceptionScore:
        """Return mean and std of exp(mean KL(p(y|x) || p(y))) over the splits that hold images.

        Raises:
            ValueError: if nothing was added.
        """
        if self._probabilities is None:
            raise ValueError("the Inception score needs at least one image, got none")
        held = self.counts > 0
        counts = self.counts[held]
        marginal = self._probabilities[held] / counts[:, None]
        # mean KL = mean of sum p(y|x) log p(y|x) - sum p(y) log p(y); xlogy takes 0 log 0 as 0.
        divergence = self._negative_entropy[held] / counts - torch.xlogy(marginal, marginal).sum(dim=1)
        scores = divergence.exp()
        return InceptionScore(
            scores.mean().item(), scores.std(correction=0).item(), len(counts), int(counts.min().item())
        )
