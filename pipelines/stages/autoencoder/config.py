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

    Args:
        model: a preset's name (`kl-f8`), or its fields, or both: `{preset: kl-f8, base_channels: 64}`.
        weights: a folder or .safetensors file of a pretrained first stage; nothing is trained, and the file's sha256
            is part of the key.
        reconstruction_loss: mean absolute or mean squared difference of pixels in [-1, 1].
        kl_weight: weight of the KL term relative to the reconstruction term, both means over all elements (the
            paper's "slight KL-penalty", Sec. 3.1).
        training: optimisation; needed unless `weights` is given.
    """

    model: Annotated[FirstStageConfig, BeforeValidator(_expand)]
    weights: str | None = runtime(None)
    reconstruction_loss: Literal["l1", "l2"] = "l1"
    kl_weight: float = Field(1e-6, ge=0)
    training: TrainingConfig | None = None

    @model_validator(mode="after")
    def _weights_or_training(self) -> "AutoencoderConfig":
        if (self.weights is None) == (self.training is None):
            raise ValueError("give either `weights` (a pretrained first stage) or `training`, not both and not neither")
        return self
