"""Encode one shard of pairs to one shard of latents: the work of an actor.

images: (B, 3, H, W) in [-1, 1]
moments: (B, 2, C, h, w) mean and log-variance, (B, 1, C, h, w) for VQ; fp16 as stored

What is cached of the condition beside them is for its kind to say (`pipelines.conditions`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ldm_core.images import to_unit_range
from pipelines.compute.actor_pool import prepare_torch
from pipelines.conditions.kind import Pair
from pipelines.conditions.kinds import kind_of
from pipelines.errors import UserError
from pipelines.shards.format import ShardWriter, decode_json, encode_npy, read_shard
from pipelines.shards.index import IndexBuilder
from pipelines.stages.autoencoder.artifact import load_first_stage
from pipelines.stages.latents.config import LatentsConfig
from pipelines.stages.latents.shard import Identity, ShardCommit, Written
from pipelines.stages.latents.statistics import ShardStatistics
from pipelines.stages.pairs.artifact import damaged_pairs, decode_image, image_of, whole_shard
from pipelines.store.commits import ArtifactWriter
from pipelines.store.ledger import Artifact

BATCHES_AHEAD = 3


@dataclass(frozen=True)
class _Pair:
    """A sample of a pairs shard, decoded. `image`: (H, W, 3) uint8."""

    key: str
    image: NDArray[np.uint8]
    files: dict[str, bytes]


class EncodeShard:
    """Holds the frozen first stage and what encodes conditions; encodes one shard per call.

    The bytes of a latents shard depend only on the pairs shard, the first stage, the condition and the config: batches
    are cut at fixed places within the shard, whichever actor encodes it.

    Args:
        pairs: the finished artifact of the pairs.
        first_stage: the finished artifact of the autoencoder.
        writer: the artifact of latents being made.
        config: the stage's section of the recipe.
        device: torch device of the first stage.
    """

    def __init__(
        self,
        *,
        pairs: Artifact,
        first_stage: Artifact,
        writer: ArtifactWriter,
        config: LatentsConfig,
        device: str,
    ) -> None:
        prepare_torch(device)
        self.pairs, self.writer, self.config, self.device = pairs, writer, config, device
        self.first_stage: Any = load_first_stage(first_stage, device)
        self.condition = kind_of(config.condition).encoder(writer.storage, device, self._encode_mode)

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        """Encode and commit one shard, its index and its statistics.

        Args:
            item: `shard` (its name), `rows` and `sha256` (of the pairs shard, as committed), and what the latents are
                known by: `origin` and `content`.

        Returns:
            `rows` of the pairs shard, `unencodable` keys of it, and `records` of the files committed.

        Raises:
            UserError: the pairs shard is missing or damaged, or its pictures do not fit the first stage.
        """
        identity = Identity(item.get("origin"), item.get("content"))
        commit = ShardCommit(self.pairs, self.writer, item["shard"], item["sha256"], item["rows"], identity)
        committed = commit(partial(self._write, item))
        return {
            "rows": item["rows"],
            "unencodable": list(committed.statistics.unencodable),
            "records": [record.model_dump() for record in committed.records],
        }

    def _write(self, item: dict[str, Any], path: Path) -> Written:
        """Write the encoded samples of a shard to a local file; return what is known of it."""
        index, statistics, rows = IndexBuilder(), ShardStatistics(), 0
        with whole_shard(self.pairs, item["shard"], item["sha256"]) as pairs_shard, ShardWriter(path, index) as tar:
            for pair, moments, condition in self._encoded_samples(pairs_shard):
                # As stored: a finite fp32 value beyond 65,504 is infinite in fp16.
                if np.isfinite(moments).all():
                    statistics.add(pair.key, moments)
                    files = {"latent.npy": encode_npy(moments), **condition, "json": pair.files["json"]}
                    tar.add(pair.key, files)
                else:
                    statistics.unencodable[pair.key] = rows
                rows += 1
        if rows != item["rows"]:
            raise damaged_pairs(self.pairs, item["shard"], f"holds {rows} samples instead of {item['rows']}")
        return Written(tar.sha256, index.index(), statistics)

    def _encoded_samples(self, shard: Path) -> Iterator[tuple[_Pair, NDArray[np.float16], dict[str, bytes]]]:
        for batch in self._decoded_batches(shard):
            moments = self._encode(batch)
            conditions = self.condition.encode(
                [Pair(pair.key, decode_json(pair.files["json"]), pair.image, pair.files) for pair in batch]
            )
            yield from zip(batch, moments, conditions, strict=True)

    def _decoded_batches(self, shard: Path) -> Iterator[list[_Pair]]:
        """Yield the shard's samples in batches, in order; threads decode the next ones while one is encoded."""
        waiting: deque[list[Future[_Pair]]] = deque()
        with ThreadPoolExecutor(self.config.decode_threads) as threads:
            samples = read_shard(shard)
            while batch := list(islice(samples, self.config.batch_size)):
                waiting.append([threads.submit(_decode, sample) for sample in batch])
                if len(waiting) > BATCHES_AHEAD:
                    yield [pair.result() for pair in waiting.popleft()]
            for futures in waiting:
                yield [pair.result() for pair in futures]

    def _encode_mode(self, images: Tensor) -> Tensor:
        latent: Tensor = self.first_stage.encode(images).mode()
        return latent

    def _encode(self, batch: list[_Pair]) -> NDArray[np.float16]:
        """Return the (B, 2 or 1, C, h, w) fp16 moments of the batch's pictures."""
        if len(shapes := {pair.image.shape for pair in batch}) > 1:
            raise UserError(
                f"pictures must have one size, but {batch[0].key} and its neighbours have {sorted(shapes)}: "
                "set pairs.resize=center_crop"
            )
        pixels = torch.from_numpy(np.stack([pair.image for pair in batch])).to(self.device)
        images = to_unit_range(pixels.permute(0, 3, 1, 2))
        autocast = torch.autocast(self.device, torch.bfloat16, enabled=self.config.precision == "bf16")
        with torch.inference_mode(), autocast:
            try:
                moments = self.first_stage.encode(images).moments
            except ValueError as error:
                raise UserError(f"{batch[0].key} does not fit the first stage: {error}") from error
        stored: NDArray[np.float16] = moments.half().cpu().numpy()
        return stored


def _decode(sample: dict[str, Any]) -> _Pair:
    return _Pair(
        sample["__key__"],
        decode_image(image_of(sample)),
        {name: data for name, data in sample.items() if name != "__key__"},
    )
