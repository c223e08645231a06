"""The scale factor of the latents, exact over all cached samples, from the sums over each shard.

moments: (2, C, h, w) mean and log-variance of a KL first stage, or (1, C, h, w) latent of a VQ one
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


def statistics_name(shard: str) -> str:
    """Return the name of the file with the sums over a shard's latents: `stats/000000.json`."""
    return f"stats/{shard.removesuffix('.tar')}.json"


@dataclass(frozen=True)
class LatentSums:
    """Number of latent elements z, and the sums of E[z] and of E[z^2] over them, in float64."""

    elements: int = 0
    first: float = 0.0
    second: float = 0.0

    @classmethod
    def of(cls, moments: NDArray[np.float16]) -> LatentSums:
        """Return the sums over one sample's posterior as it is stored: E[z] = mean, E[z^2] = mean^2 + exp(logvar)."""
        mean = moments[0].astype(np.float64)
        second = np.square(mean)
        if len(moments) == 2:
            second += np.exp(moments[1].astype(np.float64))
        return cls(mean.size, float(mean.sum()), float(second.sum()))

    def __add__(self, other: LatentSums) -> LatentSums:
        return LatentSums(self.elements + other.elements, self.first + other.first, self.second + other.second)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LatentSums:
        return cls(values["elements"], values["first"], values["second"])

    @property
    def mean(self) -> float:
        return self.first / self.elements

    @property
    def std(self) -> float:
        """Standard deviation of z over all samples, positions and channels."""
        return math.sqrt(max(self.second / self.elements - self.mean**2, 0.0))


def total(sums: Iterable[LatentSums]) -> LatentSums:
    """Add up in the order given. In the order of the shards, the last bit is always the same."""
    result = LatentSums()
    for part in sums:
        result = result + part
    return result


def scale_factor(sums: LatentSums) -> float:
    """Return 1 / std of the latents (paper, Sec. 4.3.2 and appendix G: rescale z by its component-wise std).

    The published code measures the std of the first batch; this is the same quantity over the whole set.

    Raises:
        ValueError: there are no latents, or all are the same because the encoder has collapsed.
    """
    if not sums.elements or not sums.std > 0:
        raise ValueError(f"latents must vary to have a scale, got {sums.elements} elements with std 0")
    return 1.0 / sums.std
