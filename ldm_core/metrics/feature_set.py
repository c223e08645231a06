"""Gather the features of a set of images, batch by batch and worker by worker.

Shapes: index: (B,) numbers of the images in the whole set; features: (B, D).
"""

import torch
from torch import Tensor

from ldm_core.metrics.frechet_distance import MomentSums
from ldm_core.metrics.statistics import ImageStatistics, Provenance


class IndexedRows:
    """Rows by the number of their image, so that their order does not depend on who measured them."""

    def __init__(self) -> None:
        self._index: list[Tensor] = []
        self._rows: list[Tensor] = []

    def update(self, index: Tensor, rows: Tensor) -> None:
        """Add rows (B, ...) for the images numbered by index (B,)."""
        self._index.append(index)
        self._rows.append(rows.detach().to("cpu", torch.float32, copy=True))

    def merge(self, other: "IndexedRows") -> None:
        """Add another worker's rows."""
        self._index += other._index
        self._rows += other._rows

    def __len__(self) -> int:
        return sum(len(index) for index in self._index)

    def rows(self) -> Tensor:
        """Return all rows in the order of their numbers, float32.

        Raises:
            ValueError: if there are none or an image was measured twice.
        """
        if not self._index:
            raise ValueError("metrics need at least one image, got none")
        index, order = torch.cat(self._index).sort()
        twice = index[1:][index.diff() == 0]
        if len(twice):
            raise ValueError(
                f"an image must be measured once, got number {twice[0].item()} twice: merge disjoint parts"
            )
        return torch.cat(self._rows)[order]


class FeatureSet:
    """Features of one network over one set of images: always their sums, and each image's if a metric needs them.

    Args:
        label: name of the features, for errors.
        keep_features: whether to keep the features of each image.
    """

    def __init__(self, label: str, *, keep_features: bool) -> None:
        self.label = label
        self.keep_features = keep_features
        self._sums = MomentSums()
        self._rows = IndexedRows()
        self._resolutions: set[str] = set()

    def update(self, index: Tensor, features: Tensor, resolution: tuple[int, int]) -> None:
        """Add the features (B, D) of images of one resolution (H, W), numbered by index (B,).

        Raises:
            ValueError: if a feature is not finite.
        """
        finite = features.isfinite().all(dim=1).cpu()
        if not finite.all():
            raise ValueError(
                f"{self.label} must be finite, got NaN or Inf for images {index[~finite][:8].tolist()}: "
                "check the network's weights"
            )
        self._resolutions.add("{}x{}".format(*resolution))
        self._sums.update(features)
        # The numbers are kept even if the features are not: they tell if an image was measured twice.
        self._rows.update(index, features if self.keep_features else torch.empty(len(features), 0))

    def merge(self, other: "FeatureSet") -> None:
        """Add another worker's part of the same set."""
        self._sums.merge(other._sums)
        self._rows.merge(other._rows)
        self._resolutions |= other._resolutions

    def __len__(self) -> int:
        return len(self._rows)

    def statistics(self, provenance: Provenance) -> ImageStatistics:
        """Sum up what was added.

        Args:
            provenance: provenance of the features.

        Raises:
            ValueError: if nothing was added or an image was added twice.
        """
        rows = self._rows.rows()
        return ImageStatistics(
            provenance=provenance,
            resolution=next(iter(self._resolutions)) if len(self._resolutions) == 1 else "various",
            moments=self._sums.moments(),
            features=rows if self.keep_features else None,
        )
