"""The work of the `autoencoder` stage: train a first stage on the pairs, or take a pretrained one."""

from __future__ import annotations

import itertools
from typing import Any

import torch

from pipelines.errors import UserError
from pipelines.shards.buckets import buckets_of
from pipelines.stage import StageContext
from pipelines.stages.autoencoder.artifact import (
    commit_first_stage,
    load_weights,
    weights_file,
)
from pipelines.stages.autoencoder.config import AutoencoderConfig
from pipelines.stages.autoencoder.learner import AutoencoderTask
from pipelines.stages.autoencoder.reconstruction import SHOWN, ReconstructionTest
from pipelines.stages.pairs.artifact import Pictures, open_pairs
from pipelines.stages.pairs.held_out import held_out_places
from pipelines.training.fit import finished, fit


def run(context: StageContext[AutoencoderConfig]) -> dict[str, Any]:
    """Train, or import, what is not finished yet.

    Raises:
        UserError: no samples, a damaged shard, pictures that do not fit the model, weights that are not the
            model's, a loss that is not finite.
    """
    config = context.config
    if config.training is None:
        return {"trained": False, "steps": 0, **_import(context, config)}
    return {"trained": True, **_train(context, config)}


def _train(context: StageContext[AutoencoderConfig], config: AutoencoderConfig) -> dict[str, Any]:
    assert config.training is not None
    if (details := finished(context.writer)) is None:
        _checked_reader(context, config).close()
        task = AutoencoderTask(config=config, seed=context.seed, pairs=context.upstream["pairs"])
        details = fit(task, config.training, context)
    context.tracker.metrics({"reconstruction/psnr_db": details["psnr_db"]}, step=details["steps"])
    return details


def _import(context: StageContext[AutoencoderConfig], config: AutoencoderConfig) -> dict[str, Any]:
    assert config.weights is not None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    first_stage = load_weights(config.model, weights_file(config.weights), device)
    reader = _checked_reader(context, config)
    held_out = held_out_places(context.upstream["pairs"])
    places = ((shard, row) for shard, rows in enumerate(reader.rows_per_shard) for row in range(rows))
    others = list(itertools.islice((place for place in places if place not in held_out), SHOWN))
    buckets = buckets_of(context.upstream["pairs"].shards().names)
    test = ReconstructionTest(Pictures(reader), held_out, others, buckets)
    reader.close()
    details = commit_first_stage(context.writer, first_stage, test, device)
    context.tracker.metrics({"reconstruction/psnr_db": details["psnr_db"]}, step=0)
    # Recipes with other pairs share this artifact: a figure measured on these is none of its own, but says of which.
    check = {name: details.pop(name) for name in ("psnr_db", "psnr_pictures", "psnr_held_out")}
    return {**details, "import_check": {"pairs": context.upstream["pairs"].reference, **check}}


def _checked_reader(context: StageContext[AutoencoderConfig], config: AutoencoderConfig) -> Any:
    """Open the pairs, and refuse damaged ones and sizes that the model does not take before any worker starts."""
    reader = open_pairs(context.upstream["pairs"])
    first = next(shard for shard, rows in enumerate(reader.rows_per_shard) if rows)
    height, width, _ = Pictures(reader).get((first, 0)).shape
    factor = config.model.downsampling_factor
    if height % factor or width % factor:
        raise UserError(
            f"pictures of {width}x{height} pixels do not divide by the first stage's downsampling factor {factor}: "
            f"set pairs.image_size to a multiple of {factor} and pairs.resize=center_crop"
        )
    return reader
