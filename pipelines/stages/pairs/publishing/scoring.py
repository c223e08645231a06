"""Scores of staged samples: how well a caption fits its picture (CLIP), how pleasing it looks (an aesthetic head).

Scores are computed shard by shard on a pool of actors and kept beside the staged shards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear, normalize

from ldm_core.images import to_unit_range
from ldm_core.metrics.networks.clip import load_clip
from ldm_core.metrics.networks.weights import MetricUnavailableError, read_weights
from pipelines.compute.actor_pool import map_on_actors, pool_size, prepare_torch
from pipelines.errors import UserError
from pipelines.stage import Progress
from pipelines.stages.pairs.artifact import decode_image, image_of
from pipelines.stages.pairs.config import Scoring
from pipelines.stages.pairs.shard.staged import StagedShard, scored_shards
from pipelines.store.storage import Storage


def score_shards(
    scoring: Scoring,
    work: Storage,
    shards: Sequence[int],
    progress: Progress,
    check: Callable[[], None] = lambda: None,
) -> None:
    """Score every staged shard that has no scores yet.

    Args:
        scoring: the recipe's models and the size of their pool.
        work: the folder of staged shards.
        shards: the numbers of all staged shards.
        progress: is told how many of them have scores.
        check: called after every shard; whatever it raises ends the scoring.
    """
    found = set(scored_shards(work))
    items = [{"shard": shard} for shard in shards if shard not in found]
    if not items:
        return
    size = pool_size(len(items), workers=scoring.workers, use_gpu=scoring.use_gpu, who="pairs.scoring", check=check)
    arguments = {"scoring": scoring, "work": work, "device": size.device}
    done = len(shards) - len(items)
    for _ in map_on_actors(items, Scorer, arguments=arguments, size=size, check=check):
        done += 1
        progress(done, len(shards), scored="shards")


class Scorer:
    """An actor that scores the samples of one shard after the other.

    Args:
        scoring: the recipe's models.
        work: the folder of staged shards.
        device: `cuda` or `cpu`.
    """

    def __init__(self, *, scoring: Scoring, work: Storage, device: str) -> None:
        prepare_torch(device)
        try:
            self._clip = load_clip(Path(scoring.clip), device=device)
        except (MetricUnavailableError, ValueError) as error:
            raise UserError(f"pairs.scoring.clip: {error}") from None
        if self._clip.encode_text is None:
            raise UserError(
                f"pairs.scoring.clip: {scoring.clip} has no tokenizer: put tokenizer.json beside its weights"
            )
        self._head = load_head(Path(scoring.aesthetic_head), device) if scoring.aesthetic_head else None
        self._batch_size, self._work = scoring.batch_size, work

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        """Score the samples of the shard `item["shard"]`."""
        shard = StagedShard.open(self._work, item["shard"])
        scores: dict[str, dict[str, float]] = {}
        for tar in shard.tars:
            with shard.open_tar(tar) as samples:
                for batch in _batches(samples, self._batch_size):
                    scores |= self._score(batch)
        shard.write_scores(scores)
        return {"samples": len(scores)}

    def _score(self, samples: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
        pixels = [_pixels(decode_image(image_of(sample))) for sample in samples]
        # Pictures of several sizes cannot be one batch.
        same_size = len({picture.shape for picture in pixels}) == 1
        embeddings = [self._clip(batch) for batch in ([torch.cat(pixels)] if same_size else pixels)]
        pictures = normalize(torch.cat(embeddings), dim=-1)
        texts = normalize(self._clip.text([sample["txt"].decode() for sample in samples]), dim=-1)
        columns = {"clip_score": (pictures * texts).sum(dim=-1)}
        if self._head is not None:
            columns["aesthetic_score"] = self._head(pictures)
        return {
            sample["__key__"]: {name: round(float(values[index]), 5) for name, values in columns.items()}
            for index, sample in enumerate(samples)
        }


class Head:
    """An aesthetic predictor: linear layers with nothing between them.

    Args:
        layers: weight (out, in) and bias (out,) of each layer.
    """

    def __init__(self, layers: Sequence[tuple[Tensor, Tensor]]) -> None:
        self._layers = layers

    def __call__(self, embeddings: Tensor) -> Tensor:
        """Rate pictures by their normalised embeddings: (B, D) to (B,)."""
        for weight, bias in self._layers:
            embeddings = linear(embeddings, weight, bias)
        return embeddings[:, 0]


def load_head(path: Path, device: str) -> Head:
    """Read an aesthetic head; nothing in the file is executed.

    Raises:
        UserError: there is no such file, or it does not hold linear layers that end in one number.
    """
    try:
        tensors, _ = read_weights(path, content="the weights of linear layers")
    except (MetricUnavailableError, ValueError) as error:
        raise UserError(f"pairs.scoring.aesthetic_head: {error}") from None
    # `layers.10.weight` comes after `layers.2.weight`.
    names = sorted(
        (name.removesuffix("weight") for name in tensors if name.endswith("weight")),
        key=lambda name: [int(part) if part.isdigit() else -1 for part in name.split(".")],
    )
    if any(f"{name}bias" not in tensors for name in names):
        raise UserError(f"pairs.scoring.aesthetic_head: {path} must hold linear layers, each with a bias")
    layers = [
        (tensors[f"{name}weight"].float().to(device), tensors[f"{name}bias"].float().to(device)) for name in names
    ]
    fits = all(before[0].shape[0] == after[0].shape[1] for before, after in pairwise(layers))
    if not layers or not fits or layers[-1][0].shape[0] != 1:
        raise UserError(f"pairs.scoring.aesthetic_head: {path} must hold linear layers that end in one number")
    return Head(layers)


def _pixels(image: np.ndarray) -> Tensor:
    """Convert uint8 (H, W, 3) to float (1, 3, H, W) in [-1, 1]."""
    return to_unit_range(torch.from_numpy(image).permute(2, 0, 1)[None])


def _batches(samples: Iterable[dict[str, Any]], size: int) -> Iterator[list[dict[str, Any]]]:
    remaining = iter(samples)
    while batch := list(islice(remaining, size)):
        yield batch
