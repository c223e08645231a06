"""The `autoencoder` section of a recipe."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from ldm_core import presets
from ldm_core.configs.first_stage import FirstStageConfig
from pipelines.config import Config, expand_preset, runtime
from pipelines.training.config import TrainingConfig


def _expand(value: Any) -> Any:
    return expand_preset(value, presets.first_stage)


class AutoencoderConfig(Config):
    """The `autoencoder` stage: train a first stage on the pairs, or take a pretrained one.

    The published first stages are taken in, not trained here: their loss has a perceptual and an adversarial term,
    ours has neither.

    Args:
        model: a preset's name (`kl-f8`), or its fields, or both: `{preset: kl-f8, base_channels: 64}`.
        weights: a folder or .safetensors file of a pretrained first stage; nothing is trained, and the file's sha256
            is part of the key.
        reconstruction_loss: mean absolute or mean squared difference of pixels in [-1, 1].
        kl_weight: weight of the KL term relative to the reconstruction term (the paper's "slight KL-penalty",
            Sec. 3.1), which is a mean over the picture's values.
        kl_reduction: "mean" over the latent's values; or "sum" over them divided by the number of the picture's, as
            in the code release, which sums both terms. Its weight of 1e-6 is meant so: as a mean the same number
            weighs 3 f^2 / C as much, 48 times for f=8 with 4 channels.
        training: optimisation; needed unless `weights` is given.
    """

    model: Annotated[FirstStageConfig, BeforeValidator(_expand)]
    weights: str | None = runtime(None)
    reconstruction_loss: Literal["l1", "l2"] = "l1"
    kl_weight: float = Field(1e-6, ge=0)
    kl_reduction: Literal["mean", "sum"] = "mean"
    training: TrainingConfig | None = None

    @model_validator(mode="after")
    def _weights_or_training(self) -> "AutoencoderConfig":
        if (self.weights is None) == (self.training is None):
            raise ValueError("give either `weights` (a pretrained first stage) or `training`, not both and not neither")
        return self
