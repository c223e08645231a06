"""Read and decode a shard of pairs: the work of a task on a CPU."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.conditions.kind import Pair
from pipelines.conditions.kinds import kind_of
from pipelines.errors import UserError
from pipelines.shards.format import decode_json, read_shard
from pipelines.stages.latents.config import LatentsConfig
from pipelines.stages.latents.encoding.shards import DecodedShard
from pipelines.stages.latents.encoding.views import draw_view
from pipelines.stages.pairs.artifact import IMAGE_EXTENSIONS, damaged_pairs, decode_image, image_of, whole_shard
from pipelines.store.commits import ArtifactWriter
from pipelines.store.ledger import Artifact


class ReadShard:
    """Reads shards of pairs; encodes conditions that take neither pictures nor a network.

    Args:
        pairs: the finished artifact of the pairs.
        writer: the artifact of latents being made.
        config: the stage's section of the recipe.
    """

    def __init__(self, *, pairs: Artifact, writer: ArtifactWriter, config: LatentsConfig) -> None:
        self.pairs, self.writer, self.config = pairs, writer, config
        kind = kind_of(config.condition)
        self.condition = kind.encoder(writer.storage, "cpu", None) if kind.from_facts else None

    def __call__(self, item: dict[str, Any]) -> DecodedShard:
        """Read and decode one shard, unless its latents are in place.

        Args:
            item: `shard` (its name), `rows` and `sha256` (of the pairs shard, as committed), and what the latents are
                known by: `origin` and `content`.

        Raises:
            UserError: the pairs shard is missing or damaged, or its pictures differ in size.
        """
        # Looked up again: Ray repeats what a dead worker had finished.
        if self.writer.is_committed(item["shard"]):
            return DecodedShard(item)
        with whole_shard(self.pairs, item["shard"], item["sha256"]) as path:
            samples = list(read_shard(path))
        if len(samples) != item["rows"]:
            problem = f"holds {len(samples)} samples instead of {item['rows']}"
            raise damaged_pairs(self.pairs, item["shard"], problem)
        keys = [sample.pop("__key__") for sample in samples]
        facts = [sample.pop("json") for sample in samples]
        return DecodedShard(item, keys, self._pictures(samples, keys), facts, self._files(samples, keys, facts))

    def _pictures(self, samples: Sequence[dict[str, Any]], keys: Sequence[str]) -> NDArray[np.uint8]:
        views = self.config.views
        count = views.count if views else 1
        if not samples:
            return np.empty((count, 0, 0, 0, 3), np.uint8)
        first = decode_image(image_of(samples[0]))
        pictures = np.empty((count, len(samples), *first.shape), np.uint8)

        def decode(row: int) -> tuple[int, ...]:
            picture = decode_image(image_of(samples[row])) if row else first
            # The others are decoded all the same: a message that names all sizes is of more use.
            if picture.shape == first.shape:
                pictures[0, row] = picture
                for view in range(1, count):
                    assert views is not None
                    pictures[view, row] = draw_view(picture, view, views)
            return picture.shape

        with ThreadPoolExecutor(self.config.decode_threads) as threads:
            shapes = set(threads.map(decode, range(len(samples))))
        if len(shapes) > 1:
            raise UserError(
                f"pictures must have one size, but {keys[0]} and its neighbours have {sorted(shapes)}: "
                "set pairs.resize=center_crop"
            )
        return pictures

    def _files(
        self, samples: Sequence[dict[str, bytes]], keys: Sequence[str], facts: Sequence[bytes]
    ) -> list[dict[str, bytes]]:
        if self.condition is None:
            unneeded = {*IMAGE_EXTENSIONS, "txt"}
            return [{name: data for name, data in sample.items() if name not in unneeded} for sample in samples]
        pairs = [Pair(key, decode_json(each)) for key, each in zip(keys, facts, strict=True)]
        return self.condition.encode(pairs) if pairs else []
