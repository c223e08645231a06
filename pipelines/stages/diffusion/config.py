"""The `diffusion` section of a recipe."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from ldm_core import presets
from ldm_core.configs.schedule import ScheduleConfig
from ldm_core.configs.text import TextTransformerConfig
from ldm_core.configs.unet import UNetConfig
from pipelines.config import Config, expand_preset, runtime
from pipelines.training.config import TrainingConfig


def _unet(value: Any) -> Any:
    return expand_preset(value, presets.unet)


class TextConfig(Config):
    """Size of the jointly trained text transformer; its vocabulary and caption length are those of the latents."""

    width: int = Field(1280, ge=8)
    layers: int = Field(32, ge=1)
    heads: int = Field(8, ge=1)
    head_dim: int = Field(64, ge=8)
    embedding_std: float = Field(0.02, gt=0)

    def build(self, *, vocabulary_size: int, max_length: int) -> TextTransformerConfig:
        """Return the text transformer's configuration for a tokenizer."""
        return TextTransformerConfig(vocabulary_size=vocabulary_size, max_length=max_length, **self.model_dump())


class SamplingConfig(Config):
    """Sampling of pictures with classifier-free guidance; only DDIM has an `eta`."""

    sampler: Literal["ddim", "plms", "dpm_solver_pp_2m", "unipc"] = "ddim"
    num_steps: int = Field(50, ge=1)
    guidance_scale: float = Field(5.0, ge=0)
    eta: float = Field(0.0, ge=0)
    batch_size: int = Field(16, ge=1)

    @model_validator(mode="after")
    def _eta_is_ddims(self) -> "SamplingConfig":
        if self.eta and self.sampler != "ddim":
            raise ValueError(f"only ddim has an eta, got eta={self.eta} with sampler={self.sampler}: leave it 0")
        return self


class DiffusionConfig(Config):
    """The `diffusion` stage: the cross-attention UNet and the text transformer, trained together on cached latents.

    Args:
        unet: a preset's name (the UNet of that published model), or its fields, or both.
        text: size of the text transformer.
        schedule: the noise schedule.
        parameterization: what the network predicts: the noise, the velocity or the clean latent.
        loss: squared or absolute error.
        min_snr_gamma: clamp of the min-SNR loss weights (Hang et al. 2023); None weighs all timesteps equally.
        vlb_weight: weight of the variational lower bound beside the simple loss.
        caption_dropout: share of samples whose caption is replaced by the empty one, for classifier-free guidance.
        shuffle_window: number of shards whose samples are mixed with each other at a time, over all partitions of the
            training; each of them has at least one in use.
        training: optimisation.
        preview: how the preview grids during training are sampled.
        preview_prompts: number of captions that a preview shows.
    """

    unet: Annotated[UNetConfig, BeforeValidator(_unet)]
    text: TextConfig = TextConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    parameterization: Literal["eps", "v", "x0"] = "eps"
    loss: Literal["l1", "l2"] = "l2"
    min_snr_gamma: float | None = Field(None, gt=0)
    vlb_weight: float = Field(0.0, ge=0)
    caption_dropout: float = Field(0.1, ge=0, le=1)
    shuffle_window: int = Field(16, ge=1)
    training: TrainingConfig
    preview: SamplingConfig = runtime(SamplingConfig(num_steps=25))
    preview_prompts: int = runtime(8, ge=1)
