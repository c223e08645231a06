"""The work of the `evaluate` stage: sample, draw grids, score."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipelines.compute.actor_pool import map_on_actors, pool_size
from pipelines.drawing.grids import encode_png, grid
from pipelines.stage import RateMeter, StageContext
from pipelines.stages.diffusion.artifact import FORMAT_VERSION as DIFFUSION_FORMAT
from pipelines.stages.diffusion.artifact import condition_of
from pipelines.stages.evaluate.batch import SampleBatch, read_images
from pipelines.stages.evaluate.config import EvaluateConfig
from pipelines.stages.evaluate.prompts import Prompt, load_prompts
from pipelines.stages.evaluate.shapes.scores import alignment_scores, require_expectations
from pipelines.stages.pairs.artifact import (
    PAIRS_FORMAT,
    CaptionedPicture,
    load_captioned_pictures,
    training_places,
)
from pipelines.stages.pairs.held_out import held_out_places
from pipelines.store.ledger import Artifact

GRID_COLUMNS = 8
GRID_PICTURES = 40
# Small pictures are enlarged in grids, so that a person can see them.
GRID_PIXELS = 128


def run(context: StageContext[EvaluateConfig]) -> dict[str, Any]:
    """Sample what is not yet committed, then make grids and scores; see `stage` for what is written.

    Raises:
        UserError: a prompts file that cannot be read, prompts that the detector cannot judge, or a damaged
            artifact.
    """
    config = context.config
    pairs = context.upstream["pairs"].require("pairs", PAIRS_FORMAT)
    model = context.upstream["diffusion"].require("diffusion", DIFFUSION_FORMAT)
    prompts = load_prompts(config)
    if config.detector:
        require_expectations(prompts)
    places = {
        "training": training_places(pairs, config.training_captions),
        "held_out": held_out_places(pairs)[: config.held_out_captions],
    }
    prompt_of = condition_of(model).prompt_of
    pictures = {name: load_captioned_pictures(pairs, found, prompt_of) for name, found in places.items() if found}
    captions = [prompt.text for prompt in prompts]
    captions += [picture.caption for found in pictures.values() for picture in found]
    shards = _sample(context, model, captions)
    images = read_images(context.writer.storage, shards)
    details: dict[str, Any] = {"samples": len(images), "prompts": captions[: min(len(prompts), GRID_PICTURES)]}
    if prompts:
        _write_grid(context, "grid", prompt_grid(prompts, images))
    start = len(prompts)
    for name, found in pictures.items():
        _write_grid(context, f"{name}_grid", comparison_grid(found, images[start : start + len(found)]))
        details[f"{name}_captions"] = [picture.caption for picture in found]
        start += len(found)
    return details | _write_scores(context, prompts, images[: len(prompts)])


def prompt_grid(prompts: list[Prompt], images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Draw the first pictures with their prompts as one picture."""
    shown = prompts[:GRID_PICTURES]
    return grid(images[: len(shown)], GRID_COLUMNS, [prompt.text for prompt in shown], scale=_scale(images.shape[2]))


def comparison_grid(pictures: list[CaptionedPicture], sampled: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Draw rows of real pictures, each above the row of what their captions give."""
    size = (sampled.shape[2], sampled.shape[1])
    real = np.stack([np.asarray(Image.fromarray(picture.image).resize(size)) for picture in pictures])
    columns = min(GRID_COLUMNS, len(pictures))
    rows = []
    for start in range(0, len(pictures), columns):
        row = slice(start, start + columns)
        captions = [picture.caption for picture in pictures[row]]
        for images, texts in ((real[row], None), (sampled[row], captions)):
            rows.append(grid(images, columns, texts, scale=_scale(size[0])))
    width = max(row.shape[1] for row in rows)
    padded = [np.pad(row, ((0, 0), (0, width - row.shape[1]), (0, 0)), constant_values=255) for row in rows]
    return np.concatenate(padded)


def _scale(width: int) -> int:
    return max(1, GRID_PIXELS // width)


def _sample(context: StageContext[EvaluateConfig], model: Artifact, captions: list[str]) -> list[str]:
    """Sample every caption; names of the shards that hold the pictures, in order. Picture i has seed `seed + i`."""
    config = context.config
    batch = config.sampling.batch_size
    items: list[dict[str, Any]] = [
        {
            "shard": f"samples/{number:06d}.tar",
            "start": start,
            "stop": min(start + batch, len(captions)),
        }
        for number, start in enumerate(range(0, len(captions), batch))
    ]
    committed = context.writer.committed()
    pending = [item for item in items if item["shard"] not in committed]
    if pending:
        context.writer.discard([item["shard"] for item in pending])
        size = pool_size(
            len(pending), workers=config.workers, use_gpu=config.use_gpu, who="evaluate", check=context.check
        )
        arguments = {
            "model": model,
            "writer": context.writer,
            "prompts": captions,
            "seed": context.seed,
            "sampling": config.sampling,
            "precision": None if config.precision == "auto" else config.precision,
            "device": size.device,
        }
        done = before = len(captions) - sum(item["stop"] - item["start"] for item in pending)
        meter = RateMeter()
        context.progress(done, len(captions))
        for result in map_on_actors(pending, SampleBatch, arguments=arguments, size=size, check=context.check):
            done += result["rows"]
            rate = meter.rate(done - before)
            context.progress(done, len(captions), images_per_s=f"{rate:.2f}")
            context.tracker.rate("throughput/images_per_s", rate, step=done)
    return [str(item["shard"]) for item in items]


def _write_grid(context: StageContext[EvaluateConfig], name: str, picture: NDArray[np.uint8]) -> None:
    context.tracker.image(f"evaluate/{name}", picture, step=0)
    _write(context, f"{name}.png", encode_png(picture))


def _write_scores(
    context: StageContext[EvaluateConfig], prompts: list[Prompt], images: NDArray[np.uint8]
) -> dict[str, Any]:
    if context.config.detector is None:
        _write(context, "scores.json", b"{}\n")
        return {}
    scores = alignment_scores(prompts, images)
    metrics = {"alignment/accuracy": scores["accuracy"], "alignment/samples": float(scores["samples"])}
    metrics |= {f"alignment/{name}": share for name, share in scores["attributes"].items()}
    context.tracker.metrics(metrics)
    _write(context, "scores.json", (json.dumps({"alignment": scores}, indent=1, sort_keys=True) + "\n").encode())
    return {
        "alignment_accuracy": scores["accuracy"],
        "alignment_samples": scores["samples"],
        "alignment_attributes": scores["attributes"],
        "alignment_groups": scores["groups"],
    }


def _write(context: StageContext[EvaluateConfig], name: str, data: bytes) -> None:
    context.writer.commit_once(name, lambda path: path.write_bytes(data))
