"""Latents of other artifacts that are trained on, too; imported without torch."""

from __future__ import annotations

from pipelines.stages.diffusion.config import DiffusionSettings
from pipelines.stages.latents.artifact import FORMAT_VERSION
from pipelines.store.ledger import Artifact, artifact_at


def mixed_latents(config: DiffusionSettings) -> list[Artifact]:
    """Return the artifacts that the run's own latents are mixed with, in the order of the recipe.

    Raises:
        UserError: one is missing, not finished, of another stage or of another format version.
    """
    return [artifact_at(each.latents, "latents").require("latents", FORMAT_VERSION) for each in config.mix]


def weights(config: DiffusionSettings) -> list[int]:
    """Return the shares of all latents in millionths, the run's own first."""
    return [config.own_millionths, *(each.millionths for each in config.mix)]
