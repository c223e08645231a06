"""Histograms with fixed edges, which can be added."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


class Histogram:
    """Counts between fixed edges: histograms of two data sets can be compared, and those of parts added.

    Args:
        edges: counts[i] is of edges[i] <= value < edges[i + 1], the last one of everything from the last edge on.
        counts: counts to start from; None for zeros.
    """

    def __init__(self, edges: Sequence[float], counts: Sequence[int] | None = None) -> None:
        self._edges = edges
        self._counts = np.zeros(len(edges), np.int64) if counts is None else np.asarray(counts, np.int64)

    def add(self, values: NDArray[Any]) -> None:
        """Count values; each must be at least the first edge."""
        places = np.searchsorted(self._edges, values, side="right") - 1
        self._counts += np.bincount(places, minlength=len(self._edges))

    def merge(self, other: Histogram) -> None:
        """Add the counts of a histogram with the same edges."""
        self._counts += other._counts

    def as_dict(self) -> dict[str, list[Any]]:
        return {"edges": list(self._edges), "counts": self._counts.tolist()}
