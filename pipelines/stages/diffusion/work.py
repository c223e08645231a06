"""The work of the `diffusion` stage: check that model and latents fit, then train."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from ldm_core.configs.model import LatentDiffusionConfig
from pipelines.conditions.kind import Kind
from pipelines.conditions.kinds import kind_of
from pipelines.errors import MisuseError, UserError
from pipelines.notices import tell
from pipelines.stage import StageContext
from pipelines.stages.autoencoder.artifact import first_stage_config
from pipelines.stages.diffusion.config import MILLION, DiffusionConfig
from pipelines.stages.diffusion.learner import DiffusionTask
from pipelines.stages.diffusion.mix import mixed_latents
from pipelines.stages.latents.artifact import Latents, shown_shapes
from pipelines.store.ledger import Artifact
from pipelines.training.fit import finished, fit


def run(context: StageContext[DiffusionConfig]) -> dict[str, Any]:
    """Train what is not trained yet.

    Raises:
        MisuseError: a UNet or conditioner that does not fit the latents.
        UserError: latents of another first stage or condition, a damaged shard, a loss that is not finite.
    """
    mixed = mixed_latents(context.config)
    details = finished(context.writer) or _train(context, mixed)
    return {**details, "mix": _facts(context.config, mixed)} if mixed else details


def _train(context: StageContext[DiffusionConfig], mixed: Sequence[Artifact]) -> dict[str, Any]:
    config = context.config
    latents, autoencoder = context.upstream["latents"], context.upstream["autoencoder"]
    model = model_config(config, latents, autoencoder)
    cache, kind = Latents(latents), kind_of(config.condition)
    for each in mixed:
        _require_alike(each, latents, kind)
        each.check_sizes()
    if mixed:
        tell(
            "diffusion: of each of the mixed latents its own held-out pictures are left out; if they share pictures, "
            "some that evaluate takes as held out may be trained on"
        )
    task = DiffusionTask(
        model=model,
        config=config,
        seed=context.seed,
        latents=latents,
        autoencoder=autoencoder,
        mixed=tuple(mixed),
        prompts=tuple(kind.preview_prompts(latents, cache.facts(), config.preview_prompts)),
    )
    cache.reader.close()
    return fit(task, config.training, context)


def _require_alike(mixed: Artifact, own: Artifact, kind: Kind) -> None:
    """Refuse latents that one model cannot be trained on together with the run's own."""
    for what, of in _ALIKE.items():
        if (found := of(mixed, kind)) != (wanted := of(own, kind)):
            raise UserError(
                f"{mixed.storage.url} cannot be mixed with latents {own.key}: its {what} is {found}, not {wanted}; "
                "encode it by a recipe with the same first stage, image size and condition (of captions, the same "
                "condition.tokenizer.vocabulary), or take it out of diffusion.mix"
            )


# What must be the same of all latents that are trained on, from an artifact and the kind of the recipe's condition.
_ALIKE: dict[str, Callable[[Artifact, Kind], str]] = {
    "encoder": lambda latents, kind: latents.details["encoder_sha256"][:12],
    "latent shape": lambda latents, kind: shown_shapes(latents.details, "x"),
    "condition": lambda latents, kind: json.dumps(latents.details["condition"], sort_keys=True),
    "digest of what the condition caches": lambda latents, kind: kind.digest(latents.storage)[:12],
}


def _facts(config: DiffusionConfig, mixed: Sequence[Artifact]) -> list[dict[str, Any]]:
    """Return what the manifest says of the latents that the run's own were mixed with."""
    return [
        {
            "stage": each.stage,
            "key": each.key,
            "content": each.manifest.content,
            "weight": setting.millionths / MILLION,
            "samples": each.manifest.rows,
        }
        for setting, each in zip(config.mix, mixed, strict=True)
    ]


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
