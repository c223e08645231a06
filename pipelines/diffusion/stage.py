"""The `diffusion` stage: the cross-attention UNet and the text transformer, trained together on cached latents.

Writes `model/model.safetensors`, `model/config.json`, `model/vocab.txt` (averaged weights, first stage included),
`history.json`, and `previews/step_NNNNNNNN.png`, pictures for fixed prompts and seeds during training.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pipelines.diffusion.artifact import FORMAT_VERSION, STAGE_NAME
from pipelines.diffusion.config import DiffusionConfig
from pipelines.errors import MisuseError, UserError
from pipelines.stage import Stage, StageContext

if TYPE_CHECKING:
    from ldm_core.latent_diffusion import LatentDiffusionConfig
    from pipelines.ledger import Artifact


def run(context: StageContext) -> dict[str, Any]:
    """Train what is not trained yet.

    Raises:
        MisuseError: a UNet or text transformer that does not fit the latents.
        UserError: latents of another first stage, a damaged shard, a loss that is not finite.
    """
    from pipelines.training.fit import finished, fit

    if (details := finished(context.writer)) is not None:
        return details
    from pipelines.diffusion.latents import Latents
    from pipelines.diffusion.learner import DiffusionTask

    config: DiffusionConfig = context.config
    latents, autoencoder = context.upstream["latents"], context.upstream["autoencoder"]
    model = model_config(config, latents, autoencoder)
    cache = Latents(latents)
    cache.reader.check_sizes()
    task = DiffusionTask(
        model=model,
        config=config,
        seed=context.seed,
        latents=latents,
        autoencoder=autoencoder,
        prompts=tuple(cache.captions(config.preview_prompts)),
    )
    cache.reader.close()
    return fit(task, config.training, context)


def model_config(config: DiffusionConfig, latents: Artifact, autoencoder: Artifact) -> LatentDiffusionConfig:
    """The whole model: what the recipe says, with what the latents fix (vocabulary, caption length, scale)."""
    from ldm_core.latent_diffusion import LatentDiffusionConfig
    from pipelines.autoencoder.artifact import first_stage_config

    first_stage = first_stage_config(autoencoder)
    facts = latents.details
    if facts["encoder_sha256"] != autoencoder.details["encoder_sha256"]:
        raise UserError(
            f"latents {latents.key} were made by encoder {facts['encoder_sha256'][:12]}, but autoencoder "
            f"{autoencoder.key} holds {autoencoder.details['encoder_sha256'][:12]}: run `ldm run RECIPE --from latents`"
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
            conditioner=config.text.build(vocabulary_size=facts["vocabulary_size"], max_length=facts["max_length"]),
            schedule=config.schedule,
            parameterization=config.parameterization,
            loss=config.loss,
            scale_factor=facts["scale_factor"],
        )
    except ValueError as error:
        raise MisuseError(f"diffusion: {error}") from error


STAGE = Stage(
    name=STAGE_NAME,
    format_version=FORMAT_VERSION,
    upstream=("autoencoder", "latents"),
    inputs=lambda config: {},
    run=run,
)
