"""The `autoencoder` stage: train a first stage on the pairs, or take a pretrained one.

Writes `first_stage/model.safetensors`, `first_stage/config.json`, `reconstructions.png` (originals above
reconstructions), and if it trains `history.json` and `previews/step_NNNNNNNN.png`.

An imported first stage is its weights and its model: recipes with other pairs, seeds or losses share one artifact.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ldm_core.configs.parameter_count import first_stage_parameters
from pipelines.config import identity_of
from pipelines.stage import Estimate, Section, Sections, Stage, StageContext
from pipelines.stages.autoencoder.artifact import FORMAT_VERSION, RECONSTRUCTIONS, STAGE_NAME, weights_file
from pipelines.stages.autoencoder.config import AutoencoderConfig
from pipelines.store.ledger import Artifact
from pipelines.store.storage import sha256_file
from pipelines.training.outputs import LOGS

FP32_BYTES = 4


# `work` and `section` are imported when they are called: a recipe or a plan needs neither torch nor matplotlib.
def _run(context: StageContext[AutoencoderConfig]) -> dict[str, Any]:
    from pipelines.stages.autoencoder import work

    return work.run(context)


def _section(artifact: Artifact) -> Section:
    from pipelines.stages.autoencoder.section import section

    return section(artifact)


def _inputs(config: AutoencoderConfig) -> dict[str, str]:
    return {"weights": sha256_file(weights_file(config.weights))} if config.weights is not None else {}


def _self_contained(config: AutoencoderConfig) -> dict[str, Any] | None:
    """Return the model of a first stage that is imported: whatever else a recipe says, its weights stay the same."""
    return {"model": identity_of(config.model)} if config.weights is not None else None


def _estimate(sections: Sections, before: Mapping[str, Estimate]) -> Estimate:
    """Return the size of the weights in fp32."""
    return Estimate(rows=0, bytes=FP32_BYTES * first_stage_parameters(sections[STAGE_NAME].model))


def check_sides(sections: Sections) -> None:
    """Raise ValueError if the first stage cannot halve the pictures as often as it must."""
    pairs, factor = sections["pairs"], sections[STAGE_NAME].model.downsampling_factor
    in_buckets = pairs.resize == "buckets"
    field, side = ("buckets.step", pairs.buckets.step) if in_buckets else ("image_size", pairs.image_size)
    if pairs.resize in ("center_crop", "border", "buckets") and side % factor:
        raise ValueError(
            f"pairs.{field} must be a multiple of the first stage's downsampling factor, {factor}, got {side}"
        )


STAGE = Stage(
    name=STAGE_NAME,
    format_version=FORMAT_VERSION,
    upstream=("pairs",),
    run=_run,
    section=_section,
    check=check_sides,
    inputs=_inputs,
    self_contained=_self_contained,
    estimate=_estimate,
    unit="steps",
    headlines=("final_loss", "psnr_db"),
    local_inputs=("weights",),
    # The picture of an import is of the pairs that happened to be there first.
    logs=(*LOGS, RECONSTRUCTIONS),
)
