"""Sample one batch of prompts to one shard of pictures: the work of an actor."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ldm_core.prepare import Precision, prepare
from pipelines.compute.actor_pool import prepare_torch
from pipelines.drawing.grids import encode_png
from pipelines.shards.format import read_shard, write_shard
from pipelines.stages.diffusion.artifact import load_model
from pipelines.stages.diffusion.config import SamplingConfig
from pipelines.stages.diffusion.sampling import sample_prompts
from pipelines.stages.pairs.artifact import decode_image
from pipelines.store.commits import ArtifactWriter
from pipelines.store.ledger import Artifact
from pipelines.store.storage import Storage


class SampleBatch:
    """Holds the model; samples one batch per call into `samples/NNNNNN.tar`: KEY.png, KEY.txt, KEY.json (its seed).

    Args:
        model: the diffusion artifact.
        writer: the artifact of the evaluation being made.
        prompts: all captions to sample; picture i has seed `seed + i`.
        seed: the seed of the first picture.
        sampling: sampler, steps and guidance.
        precision: of the network; None for what the device is fast in.
        device: torch device of the model.
    """

    def __init__(
        self,
        *,
        model: Artifact,
        writer: ArtifactWriter,
        prompts: list[str],
        seed: int,
        sampling: SamplingConfig,
        precision: Precision | None,
        device: str,
    ) -> None:
        prepare_torch(device)
        self.writer, self.prompts, self.seed, self.sampling = writer, prompts, seed, sampling
        self.model, self.reader = load_model(model, device)
        self.prepared = prepare(self.model, for_="sampling", precision=precision)

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        """Sample and commit one shard: `item` has its name `shard`, and `start` and `stop`, its pictures' numbers."""
        numbers = range(item["start"], item["stop"])
        prompts, seeds = self.prompts[item["start"] : item["stop"]], [self.seed + number for number in numbers]
        # Filled up to the size of the others, for which the network is compiled.
        fill = min(self.sampling.batch_size, len(self.prompts)) - len(prompts) if self.prepared.compiled else 0
        images = sample_prompts(
            self.model, self.reader, prompts + prompts[-1:] * fill, seeds + seeds[-1:] * fill, self.sampling
        )[: len(prompts)]
        samples = [
            (
                f"{number:06d}",
                {
                    "png": encode_png(image),
                    "txt": prompt.encode("utf-8", "replace"),
                    "json": json.dumps({"seed": seed}).encode(),
                },
            )
            for number, image, prompt, seed in zip(numbers, images, prompts, seeds, strict=True)
        ]
        self.writer.storage.write_once(item["shard"], lambda path: write_shard(path, samples))
        self.writer.commit(item["shard"], rows=len(samples))
        return {"rows": len(samples)}


def read_images(storage: Storage, shards: list[str]) -> NDArray[np.uint8]:
    """Return the pictures of sample shards in order, (N, H, W, 3) uint8."""
    images = []
    for shard in shards:
        with storage.open(shard) as file:
            images += [decode_image(sample["png"]) for sample in read_shard(file)]
    return np.stack(images)
