"""The `diffusion` section of a recipe."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from ldm_core import presets
from ldm_core.configs.objective import LossKind, Parameterization, TimestepsConfig, check_objective
from ldm_core.configs.schedule import ScheduleConfig
from ldm_core.configs.unet import UNetConfig
from pipelines.conditions.config import Condition
from pipelines.config import Config, expand_preset, runtime
from pipelines.training.config import TrainingConfig

# Shares are counted in millionths: in whole numbers, so that the order of samples is the same on every machine.
MILLION = 1_000_000


SamplerName = Literal["ddim", "plms", "euler", "heun", "dpm_solver_pp_2m", "unipc"]


def _unet(value: Any) -> Any:
    return expand_preset(value, presets.unet)


class SamplingConfig(Config):
    """Sampling of pictures with classifier-free guidance, if there is a condition; only DDIM has an `eta`."""

    sampler: SamplerName = "ddim"
    num_steps: int = Field(50, ge=1)
    guidance_scale: float = Field(5.0, ge=0)
    eta: float = Field(0.0, ge=0)
    batch_size: int = Field(16, ge=1)

    @model_validator(mode="after")
    def _eta_is_ddims(self) -> "SamplingConfig":
        if self.eta and self.sampler != "ddim":
            raise ValueError(f"only ddim has an eta, got eta={self.eta} with sampler={self.sampler}: leave it 0")
        return self


class MixedLatents(Config):
    """Latents of another artifact to train on, too.

    Args:
        latents: folder of the finished artifact, ROOT/latents/KEY, of this root or another. It is identified by its
            content and may move.
        weight: its share of the samples that are trained on, in steps of a millionth.
    """

    latents: str = runtime(min_length=1)
    weight: float = Field(ge=1 / MILLION, lt=1)

    @property
    def millionths(self) -> int:
        """The weight as a whole number."""
        return round(self.weight * MILLION)


class DiffusionSettings(Config):
    """The `diffusion` stage: the UNet and the network of its condition, trained together on cached latents.

    Args:
        unet: a preset's name (the UNet of that published model), or its fields, or both.
        schedule: the noise schedule, or a rectified flow.
        parameterization: what the network predicts: the noise, v or the clean latent; with a rectified flow its
            velocity ("flow") or the clean latent.
        timesteps: the distribution that timesteps are drawn from.
        loss: squared or absolute error.
        min_snr_gamma: clamp of the min-SNR loss weights (Hang et al. 2023); None weighs all timesteps equally.
        vlb_weight: weight of the variational lower bound beside the simple loss.
        shuffle_window: number of shards whose samples are mixed with each other at a time, over all partitions of the
            training; each of them has at least one in use. Of mixed latents, for each artifact.
        mix: latents of other artifacts to train on, each with its share; the run's own have what is left of 1.
        training: optimisation.
        preview: how the preview grids during training are sampled.
        preview_prompts: number of prompts that a preview shows.
    """

    unet: Annotated[UNetConfig, BeforeValidator(_unet)]
    schedule: ScheduleConfig = ScheduleConfig()
    parameterization: Parameterization = "eps"
    timesteps: TimestepsConfig = TimestepsConfig()
    loss: LossKind = "l2"
    min_snr_gamma: float | None = Field(None, gt=0)
    vlb_weight: float = Field(0.0, ge=0)
    shuffle_window: int = Field(16, ge=1)
    mix: tuple[MixedLatents, ...] = ()
    training: TrainingConfig
    preview: SamplingConfig = runtime(SamplingConfig(num_steps=25))
    preview_prompts: int = runtime(8, ge=1)

    @property
    def own_millionths(self) -> int:
        """The share of the run's own latents."""
        return MILLION - sum(each.millionths for each in self.mix)

    @model_validator(mode="after")
    def _learnable(self) -> "DiffusionSettings":
        check_objective(
            self.schedule,
            parameterization=self.parameterization,
            loss=self.loss,
            min_snr_gamma=self.min_snr_gamma,
            vlb_weight=self.vlb_weight,
        )
        return self

    @model_validator(mode="after")
    def _own_share(self) -> "DiffusionSettings":
        if self.own_millionths < 1:
            total = sum(each.weight for each in self.mix)
            raise ValueError(
                f"the weights in mix must add up to less than 1, which is left to the run's own latents, got {total:g}"
            )
        return self


class DiffusionConfig(DiffusionSettings):
    """All that the stage goes by: its section of a recipe, and the recipe's condition."""

    condition: Condition
