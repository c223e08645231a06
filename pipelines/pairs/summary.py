"""What a finished pairs artifact says about itself: counts by status, and how captions and pictures are distributed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from pipelines.pairs.shard import OK
from pipelines.storage import Storage

CAPTION_WORD_EDGES = (0, 2, 4, 6, 8, 10, 12, 15, 20, 25, 30, 40, 60, 100)
ASPECT_EDGES = (0.0, 0.25, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.4, 1.6, 2.0, 2.5, 4.0)
SOURCE_SIZE_EDGES = (0, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 2048, 4096)
_EXAMPLES = 12
_EXAMPLE_CHARACTERS = 300


def summarise(storage: Storage, parquets: Iterable[str], *, image_size: int) -> dict[str, Any]:
    """Facts of a pairs artifact, from the tables beside its shards.

    Histograms are `{"edges": […], "counts": […]}`: counts[i] is of edges[i] <= value < edges[i + 1], the last one is of
    everything from the last edge on. They are over the samples: words of the first caption, width / height and shorter
    side (pixels) of the source's picture.

    Args:
        storage: the artifact's folder.
        parquets: names of its tables, in order.
        image_size: of the stored pictures.
    """
    import pyarrow.parquet as pq

    statuses: Counter[str] = Counter()
    words, aspect, size = Histogram(CAPTION_WORD_EDGES), Histogram(ASPECT_EDGES), Histogram(SOURCE_SIZE_EDGES)
    examples: list[dict[str, str]] = []
    failures: dict[str, dict[str, str]] = {}
    for name in parquets:
        with storage.open(name) as file:
            rows = pq.read_table(file, columns=["key", "status", "url", "caption", "width", "height"]).to_pylist()
        statuses.update(row["status"] for row in rows)
        good = [row for row in rows if row["status"] == OK]
        words.add([len(row["caption"].split()) for row in good])
        aspect.add([row["width"] / row["height"] for row in good])
        size.add([min(row["width"], row["height"]) for row in good])
        examples += [_example(row) for row in good[: _EXAMPLES - len(examples)]]
        for row in rows:
            if row["status"] != OK:
                failures.setdefault(row["status"], _example(row))
    return {
        "samples": statuses[OK],
        "input_rows": statuses.total(),
        "statuses": dict(sorted(statuses.items(), key=lambda item: (-item[1], item[0]))),
        "caption_words": words.as_dict(),
        "aspect": aspect.as_dict(),
        "source_size": size.as_dict(),
        "image_size": image_size,
        "examples": examples,
        "failures": dict(sorted(failures.items())),
    }


def _example(row: dict[str, Any]) -> dict[str, str]:
    values = {name: row[name] for name in ("key", "caption", "url")}
    return {name: value[:_EXAMPLE_CHARACTERS] for name, value in values.items() if value is not None}


class Histogram:
    """Counts between fixed edges, so that histograms of two data sets can be compared."""

    def __init__(self, edges: Sequence[float]) -> None:
        self._edges = edges
        self._counts = np.zeros(len(edges), dtype=np.int64)

    def add(self, values: Sequence[float]) -> None:
        """Count values; each must be at least the first edge."""
        places = np.searchsorted(self._edges, np.asarray(values, dtype=np.float64), side="right") - 1
        self._counts += np.bincount(places, minlength=len(self._edges))

    def as_dict(self) -> dict[str, list[Any]]:
        return {"edges": list(self._edges), "counts": self._counts.tolist()}
