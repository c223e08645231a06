"""The work of the `diffusion` stage: check that model and latents fit, then train."""

from __future__ import annotations

from typing import Any

from ldm_core.configs.model import LatentDiffusionConfig
from pipelines.conditions.kinds import kind_of
from pipelines.errors import MisuseError, UserError
from pipelines.stage import StageContext
from pipelines.stages.autoencoder.artifact import first_stage_config
from pipelines.stages.diffusion.config import DiffusionConfig
from pipelines.stages.diffusion.learner import DiffusionTask
from pipelines.stages.latents.artifact import Latents
from pipelines.store.ledger import Artifact
from pipelines.training.fit import finished, fit


def run(context: StageContext[DiffusionConfig]) -> dict[str, Any]:
    """Train what is not trained yet.

    Raises:
        MisuseError: a UNet or conditioner that does not fit the latents.
        UserError: latents of another first stage or condition, a damaged shard, a loss that is not finite.
    """
    if (details := finished(context.writer)) is not None:
        return details
    config = context.config
    latents, autoencoder = context.upstream["latents"], context.upstream["autoencoder"]
    model = model_config(config, latents, autoencoder)
    cache, kind = Latents(latents), kind_of(config.condition)
    task = DiffusionTask(
        model=model,
        config=config,
        seed=context.seed,
        latents=latents,
        autoencoder=autoencoder,
        prompts=tuple(kind.preview_prompts(latents, cache.facts(), config.preview_prompts)),
    )
    cache.reader.close()
    return fit(task, config.training, context)


def model_config(config: DiffusionConfig, latents: Artifact, autoencoder: Artifact) -> LatentDiffusionConfig:
    """Return the whole model's configuration: the recipe's, with what the latents know of scale and condition."""
    first_stage = first_stage_config(autoencoder)
    facts = latents.details
    if facts["encoder_sha256"] != autoencoder.details["encoder_sha256"]:
        raise UserError(
            f"latents {latents.key} were made by encoder {facts['encoder_sha256'][:12]}, but autoencoder "
            f"{autoencoder.key} holds {autoencoder.details['encoder_sha256'][:12]}: run `ldm run RECIPE --from latents`"
        )
    if (kind := facts["condition"]["kind"]) != config.condition.kind:
        raise UserError(
            f"latents {latents.key} were made for condition {kind}, but the recipe's is {config.condition.kind}: "
            "run `ldm run RECIPE --from latents`"
        )
    _, height, width = facts["latent_shape"]
    if (height, width) != (config.unet.latent_size, config.unet.latent_size):
        raise MisuseError(
            f"diffusion.unet.latent_size is {config.unet.latent_size}, but the latents are {width}x{height}: "
            f"set it to pairs.image_size / {first_stage.downsampling_factor}"
        )
    try:
        return LatentDiffusionConfig(
            first_stage=first_stage,
            unet=config.unet,
            conditioner=kind_of(config.condition).conditioner(latents, config.unet),
            schedule=config.schedule,
            parameterization=config.parameterization,
            loss=config.loss,
            scale_factor=facts["scale_factor"],
        )
    except ValueError as error:
        raise MisuseError(f"diffusion: {error}") from error
