"""What is known of the latents of a shard, and of all: their scale factor, their channels, pictures without a latent.

moments: (2, C, h, w) mean and log-variance of a KL first stage, or (1, C, h, w) latent of a VQ one
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.errors import UserError


def statistics_name(shard: str) -> str:
    """Return the name of the file with what is known of a shard's latents: `stats/000000.json`."""
    return f"stats/{shard.removesuffix('.tar')}.json"


@dataclass(frozen=True)
class LatentSums:
    """Sums over latent elements z, a value for each channel, in float64.

    Attributes:
        count: elements of each channel.
        first: sums of E[z].
        second: sums of E[z^2].
        low, high: the smallest and the largest E[z].
    """

    count: int = 0
    first: tuple[float, ...] = ()
    second: tuple[float, ...] = ()
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()

    @classmethod
    def of(cls, moments: NDArray[np.float16]) -> LatentSums:
        """Return the sums over one sample's posterior as it is stored: E[z] = mean, E[z^2] = mean^2 + exp(logvar)."""
        # In C order: how an array lies in memory decides in which order its values are added up.
        mean = moments[0].astype(np.float64, order="C")
        second = np.square(mean)
        if len(moments) == 2:
            second += np.exp(moments[1].astype(np.float64, order="C"))
        channels = mean.reshape(len(mean), -1)
        return cls(
            channels.shape[1],
            tuple(channels.sum(axis=1).tolist()),
            tuple(second.reshape(channels.shape).sum(axis=1).tolist()),
            tuple(channels.min(axis=1).tolist()),
            tuple(channels.max(axis=1).tolist()),
        )

    def __add__(self, other: LatentSums) -> LatentSums:
        if not self.count or not other.count:
            return self if self.count else other
        return LatentSums(
            self.count + other.count,
            tuple(a + b for a, b in zip(self.first, other.first, strict=True)),
            tuple(a + b for a, b in zip(self.second, other.second, strict=True)),
            tuple(map(min, self.low, other.low)),
            tuple(map(max, self.high, other.high)),
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            "count": self.count,
            "sum": list(self.first),
            "sum_of_squares": list(self.second),
            "min": list(self.low),
            "max": list(self.high),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LatentSums:
        columns = (tuple(values[name]) for name in ("sum", "sum_of_squares", "min", "max"))
        return cls(values["count"], *columns)

    @property
    def elements(self) -> int:
        """Latent elements of all channels."""
        return self.count * len(self.first)

    @property
    def mean(self) -> float:
        return sum(self.first) / self.elements

    @property
    def std(self) -> float:
        """Standard deviation of z over all samples, positions and channels."""
        return _std(sum(self.first), sum(self.second), self.elements)

    def channels(self) -> dict[str, list[float]]:
        """Return mean and standard deviation of z, and the bounds of E[z], for each channel."""
        return {
            "mean": [first / self.count for first in self.first],
            "std": [_std(*sums, self.count) for sums in zip(self.first, self.second, strict=True)],
            "min": list(self.low),
            "max": list(self.high),
        }


def _std(first: float, second: float, count: int) -> float:
    return math.sqrt(max(second / count - (first / count) ** 2, 0.0))


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


@dataclass
class ShardStatistics:
    """What `stats/NNNNNN.json` says of a shard of latents.

    Attributes:
        shape: of one sample's moments; None if there is no sample.
        sums: over all samples, in their order.
        unencodable: the pictures without a latent, since theirs would not be finite in fp16: key and row in the pairs'
            shard.
    """

    shape: tuple[int, ...] | None = None
    sums: LatentSums = LatentSums()
    unencodable: dict[str, int] = field(default_factory=dict)

    def add(self, key: str, moments: NDArray[np.float16]) -> None:
        """Add a sample, or a view of one.

        Of what is stored, not of what was computed: the shard's bytes alone decide them.

        Raises:
            UserError: it has another shape than those before.
        """
        self.shape = self.shape or moments.shape
        if moments.shape != self.shape:
            raise UserError(
                f"latents must have one shape, but that of {key} has {moments.shape} and those before it {self.shape}: "
                "set pairs.resize=center_crop"
            )
        self.sums = self.sums + LatentSums.of(moments)

    def to_json(self) -> dict[str, Any]:
        shape = list(self.shape) if self.shape else None
        return {"shape": shape, "channels": self.sums.to_dict(), "unencodable": self.unencodable}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> ShardStatistics:
        shape = tuple(values["shape"]) if values["shape"] else None
        return cls(shape, LatentSums.from_dict(values["channels"]), dict(values["unencodable"]))
