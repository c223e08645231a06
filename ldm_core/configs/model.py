"""Configuration of a whole latent diffusion model, and config.json's content as configurations."""

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from ldm_core.configs import objective
from ldm_core.configs.conditioning import (
    ConditionerConfig,
    concat_channels,
    conditioner_from_dict,
    conditioner_to_dict,
    context_dim,
)
from ldm_core.configs.first_stage import FirstStageConfig
from ldm_core.configs.schedule import ScheduleConfig
from ldm_core.configs.text import FrozenConfig, TextTransformerConfig
from ldm_core.configs.unet import UNetConfig
from ldm_core.configs.values import check_keys, component

if TYPE_CHECKING:
    import torch

    from ldm_core.latent_diffusion import DiffusionNetwork, LatentDiffusion


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentDiffusionConfig:
    """Everything that decides what a model computes, apart from its weights.

    Args:
        first_stage: the autoencoder in whose latent space the diffusion runs.
        unet: the denoising network.
        conditioner: what the UNet is conditioned on, see `conditioning`; None for an unconditional model.
        schedule: the forward process.
        parameterization: what the UNet predicts, "eps", "v" or "x0"; with a rectified flow "flow" or "x0".
        loss: the loss it is trained with, "l1" or "l2".
        scale_factor: factor that latents are multiplied by before diffusion: 1 / their std (Sec. 4.3.2, Appendix G).

    Raises:
        ValueError: the parts do not fit each other.
    """

    # In a recipe, which pydantic reads, a misspelt setting is an error.
    __pydantic_config__: ClassVar = {"extra": "forbid"}

    first_stage: FirstStageConfig
    unet: UNetConfig
    conditioner: ConditionerConfig | None = None
    schedule: ScheduleConfig = dataclasses.field(default_factory=ScheduleConfig)
    parameterization: objective.Parameterization = "eps"
    loss: objective.LossKind = "l2"
    scale_factor: float = 1.0

    def __post_init__(self) -> None:
        objective.check_objective(self.schedule, parameterization=self.parameterization, loss=self.loss)
        if not (math.isfinite(self.scale_factor) and self.scale_factor > 0):
            raise ValueError(f"scale_factor must be a positive number, got {self.scale_factor}")
        latent_channels = self.first_stage.embed_dim
        wanted = latent_channels + concat_channels(self.conditioner, latent_channels)
        if (self.unet.in_channels, self.unet.out_channels) != (wanted, latent_channels):
            raise ValueError(
                f"the UNet must take the first stage's {latent_channels} latent channels and those of its conditioner, "
                f"{wanted} in all, and give {latent_channels}; got in_channels={self.unet.in_channels}, "
                f"out_channels={self.unet.out_channels}"
            )
        width = context_dim(self.conditioner)
        if self.unet.context_dim != width:
            raise ValueError(
                "the UNet's context_dim must be the conditioner's width (None without one), "
                f"got context_dim={self.unet.context_dim}, width={width}"
            )

    # The one arrow from the configurations up to the networks: imported on call, so that recipes need no torch.
    def build(self, device: "torch.device | str | None" = None) -> "LatentDiffusion":
        """Return the model with random weights; on device "meta" it takes no memory."""
        from ldm_core.latent_diffusion import build_model

        return build_model(self, device)

    def build_network(self, device: "torch.device | str | None" = None) -> "DiffusionNetwork":
        """Return the part that the diffusion stage trains (UNet and conditioner), with random weights."""
        from ldm_core.latent_diffusion import build_network

        return build_network(self, device)

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as a nested dict of plain values that JSON can hold."""
        values = dataclasses.asdict(self)
        if self.conditioner is not None:
            values["conditioner"] = conditioner_to_dict(self.conditioner)
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "LatentDiffusionConfig":
        """Build a configuration from the result of `to_dict`, also after a round trip through JSON.

        Raises:
            ValueError: a key is unknown or missing, or the values do not fit each other.
        """
        parts: dict[str, type] = {"first_stage": FirstStageConfig, "unet": UNetConfig, "schedule": ScheduleConfig}
        check_keys(cls, values, "model config")
        arguments = dict(values)
        if arguments.get("conditioner") is not None:
            arguments["conditioner"] = conditioner_from_dict(arguments["conditioner"])
        for name, kind in parts.items():
            if arguments.get(name) is not None:
                arguments[name] = component(kind, arguments[name], name)
        return cls(**arguments)


# What the config.json of a model folder describes: a whole model, or a first stage alone.
Config = LatentDiffusionConfig | FirstStageConfig


def config_to_dict(config: Config) -> dict[str, Any]:
    """Return the content of a config.json: plain values that `config_from_dict` reads."""
    return config.to_dict() if isinstance(config, LatentDiffusionConfig) else dataclasses.asdict(config)


def config_from_dict(values: Mapping[str, Any]) -> Config:
    """Build the configuration that the content of a config.json describes.

    Raises:
        ValueError: it describes neither a whole model nor a first stage; the setting is named.
    """
    if "regularization" in values:
        return component(FirstStageConfig, values, "first stage config")
    return LatentDiffusionConfig.from_dict(values)


def takes_captions(config: Config) -> bool:
    """Return whether a model is conditioned on captions, and so needs a tokenizer."""
    return isinstance(getattr(config, "conditioner", None), TextTransformerConfig | FrozenConfig)
