"""The `diffusion` stage: the UNet and the network of its condition, trained together on cached latents.

Writes `model/model.safetensors` and `model/config.json` (averaged weights, first stage included), the tokenizer beside
them if the model takes captions, `history.json`, and `previews/step_NNNNNNNN.png`, pictures for fixed prompts and seeds
during training.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ldm_core.configs.parameter_count import unet_parameters
from pipelines.stage import Estimate, Section, Sections, Stage, StageContext
from pipelines.stages.diffusion.artifact import FOLDER, FORMAT_VERSION, STAGE_NAME
from pipelines.stages.diffusion.config import DiffusionConfig, SamplingConfig
from pipelines.stages.diffusion.mix import mixed_latents
from pipelines.store.ledger import Artifact
from pipelines.training.outputs import LOGS

FP32_BYTES = 4


# `work` and `section` are imported when they are called: a recipe or a plan needs neither torch nor matplotlib.
def _run(context: StageContext[DiffusionConfig]) -> dict[str, Any]:
    from pipelines.stages.diffusion import work

    return work.run(context)


def _section(artifact: Artifact) -> Section:
    from pipelines.stages.diffusion.section import section

    return section(artifact)


def _inputs(config: DiffusionConfig) -> dict[str, str]:
    # By what is in it: neither where it lies nor the key that it was made under counts.
    inputs = {f"mix/{number}": each.manifest.content for number, each in enumerate(mixed_latents(config))}
    if config.unet.dropout:
        # A dropout mask is drawn for a worker's share of a batch, so that their number changes what is trained.
        inputs["workers"] = str(config.training.workers)
    return inputs


def _configure(sections: Sections) -> DiffusionConfig:
    return DiffusionConfig(**dict(sections[STAGE_NAME]), condition=sections["condition"])


def _check(sections: Sections) -> None:
    """Raise ValueError if the UNet does not fit the pictures, the first stage or the condition."""
    config, first_stage = sections[STAGE_NAME], sections["autoencoder"].model
    size, factor, unet = sections["pairs"].image_size, first_stage.downsampling_factor, config.unet
    if size != unet.latent_size * factor:
        raise ValueError(
            f"pairs.image_size must be diffusion.unet.latent_size x the first stage's downsampling factor, "
            f"{unet.latent_size} x {factor}, got {size}"
        )
    if (pairs := sections["pairs"]).resize == "buckets":
        if pairs.buckets.step % (factor * unet.downsampling_factor):
            raise ValueError(
                f"pairs.buckets.step must be a multiple of the first stage's x the UNet's downsampling factor, "
                f"{factor} x {unet.downsampling_factor}, got {pairs.buckets.step}"
            )
        if config.mix:
            raise ValueError(
                "diffusion.mix takes latents of one size, and pairs.resize=buckets gives several: leave mix out, or "
                "set pairs.resize to center_crop or border"
            )
    if unet.in_channels != first_stage.embed_dim:
        raise ValueError(
            f"diffusion.unet.in_channels must be autoencoder.model.embed_dim, {first_stage.embed_dim}, "
            f"got {unet.in_channels}"
        )
    check_sampling(config.preview, sections, "diffusion.preview")
    condition = sections["condition"]
    condition.check_model(sections)
    condition.check_guidance(config.preview.guidance_scale, "diffusion.preview.guidance_scale")


def check_sampling(sampling: SamplingConfig, sections: Sections, field: str) -> None:
    """Raise ValueError if a sampler is to visit more timesteps than the noise schedule has, or has no eta with it."""
    schedule = sections[STAGE_NAME].schedule
    if sampling.num_steps > schedule.timesteps:
        raise ValueError(
            f"{field}.num_steps must be at most diffusion.schedule.timesteps, {schedule.timesteps}, "
            f"got {sampling.num_steps}"
        )
    if sampling.eta and schedule.is_flow:
        raise ValueError(f"{field}.eta must be 0 with diffusion.schedule.kind=rectified_flow, got {sampling.eta}")


def _estimate(sections: Sections, before: Mapping[str, Estimate]) -> Estimate:
    """Return the size of the weights in fp32, those of the first stage included."""
    parameters = unet_parameters(sections[STAGE_NAME].unet) + sections["condition"].parameters()
    return Estimate(rows=0, bytes=FP32_BYTES * parameters + (before["autoencoder"].bytes or 0))


STAGE = Stage(
    name=STAGE_NAME,
    format_version=FORMAT_VERSION,
    upstream=("autoencoder", "latents"),
    configure=_configure,
    run=_run,
    section=_section,
    inputs=_inputs,
    check=_check,
    estimate=_estimate,
    unit="steps",
    headlines=("final_loss", "held_out_loss", "images_per_s"),
    local_inputs=("mix.*.latents",),
    logs=LOGS,
    outputs={"checkpoint": FOLDER},
)
