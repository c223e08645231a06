"""What models say of finished samples: how well a caption fits its picture (CLIP), how it looks (an aesthetic head).

Scores are computed shard by shard on a pool of actors and kept beside the shards in the making.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipelines.errors import UserError
from pipelines.shards.format import read_shard
from pipelines.stage import Progress
from pipelines.stages.pairs.artifact import decode_image, image_of
from pipelines.stages.pairs.config import Scoring
from pipelines.stages.pairs.shard.files import shard_name
from pipelines.stages.pairs.shard.staged import read_made
from pipelines.store.storage import Storage, sha256_file

if TYPE_CHECKING:
    from torch import Tensor

_CLIP_FILES = re.compile(r".*\.(json|txt|safetensors|bin)")


def digests(scoring: Scoring | None) -> dict[str, str]:
    """The files of the models by content."""
    if scoring is None:
        return {}
    folder = Path(scoring.clip)
    if not folder.is_dir():
        raise UserError(f"no folder {folder}: pairs.scoring.clip must be the folder of a CLIP model")
    files = [path for path in sorted(folder.iterdir()) if _CLIP_FILES.fullmatch(path.name)]
    found = {f"clip/{path.name}": sha256_file(path) for path in files}
    if scoring.aesthetic_head is not None:
        found["aesthetic_head"] = sha256_file(scoring.aesthetic_head)
    return found


def scores_name(shard: int) -> str:
    return f"{shard_name(shard)}.scores"


def read_scores(work: Storage, shard: int) -> dict[str, dict[str, float]]:
    """The scores of a shard's samples, by key and name."""
    scores: dict[str, dict[str, float]] = work.read_json(scores_name(shard))
    return scores


def score_shards(scoring: Scoring, work: Storage, shards: Sequence[int], progress: Progress) -> None:
    """Score every shard that has no scores yet.

    Args:
        work: the folder with the shards in the making.
    """
    from pipelines.compute.actor_pool import map_on_actors, pool_size

    found = set(work.names("*.scores"))
    items = [{"shard": shard} for shard in shards if scores_name(shard) not in found]
    size = pool_size(len(items), workers=scoring.workers, use_gpu=scoring.use_gpu)
    arguments = {"scoring": scoring, "work": work, "device": size.device}
    done = len(shards) - len(items)
    for _ in map_on_actors(items, Scorer, arguments=arguments, size=size):
        done += 1
        progress(done, len(shards), scored="shards")


class Scorer:
    """An actor that scores the samples of one shard after the other."""

    def __init__(self, *, scoring: Scoring, work: Storage, device: str) -> None:
        from ldm_core.metrics.networks.clip import load_clip
        from ldm_core.metrics.networks.weights import MetricUnavailableError
        from pipelines.compute.actor_pool import prepare_torch

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
        scores: dict[str, dict[str, float]] = {}
        made = read_made(self._work, item["shard"])
        for name in (file.name for file in made.files if file.name.endswith(".tar")):
            with made.folder.open(name) as file:
                for batch in _batches(read_shard(file), self._batch_size):
                    scores |= self._score(batch)
        self._work.write_json(scores_name(item["shard"]), scores)
        return {"samples": len(scores)}

    def _score(self, samples: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
        import torch
        from torch.nn.functional import normalize

        pixels = [_pixels(decode_image(image_of(sample))) for sample in samples]
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
    """Linear layers, one after the other, with nothing between them.

    Args:
        layers: (weight, bias) of each: (out, in) and (out,).
    """

    def __init__(self, layers: Sequence[tuple[Tensor, Tensor]]) -> None:
        self._layers = layers

    def __call__(self, embeddings: Tensor) -> Tensor:
        """(B, D) normalised embeddings -> (B,)."""
        from torch.nn.functional import linear

        for weight, bias in self._layers:
            embeddings = linear(embeddings, weight, bias)
        return embeddings[:, 0]


def load_head(path: Path, device: str) -> Head:
    """Read an aesthetic head; nothing in the file is executed.

    Raises:
        UserError: no file there, or not the weights of linear layers that end in one number.
    """
    from ldm_core.metrics.networks.weights import MetricUnavailableError, read_weights

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
    import torch

    from ldm_core.images import to_unit_range

    return to_unit_range(torch.from_numpy(image).permute(2, 0, 1)[None])


def _batches(samples: Iterable[dict[str, Any]], size: int) -> Iterator[list[dict[str, Any]]]:
    remaining = iter(samples)
    while batch := list(islice(remaining, size)):
        yield batch
