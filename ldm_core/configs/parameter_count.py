"""Parameters of a network, from its configuration."""

from collections.abc import Callable
from typing import Any

from ldm_core.configs.first_stage import FirstStageConfig
from ldm_core.configs.text import TextTransformerConfig
from ldm_core.configs.unet import UNetConfig


def first_stage_parameters(config: FirstStageConfig) -> int:
    from ldm_core.networks.autoencoder import build_first_stage

    return _count(lambda: build_first_stage(config))


def unet_parameters(config: UNetConfig) -> int:
    from ldm_core.networks.unet import UNet

    return _count(lambda: UNet(config))


def text_transformer_parameters(config: TextTransformerConfig) -> int:
    from ldm_core.networks.text_transformer import TextTransformer

    return _count(lambda: TextTransformer(config))


def _count(build: Callable[[], Any]) -> int:
    import torch

    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build().parameters())
