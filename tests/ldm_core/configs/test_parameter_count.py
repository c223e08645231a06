"""Parameters counted from a configuration are those of the network that is built from it."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

from ldm_core import presets
from ldm_core.configs.first_stage import FirstStageConfig
from ldm_core.configs.parameter_count import first_stage_parameters, text_transformer_parameters, unet_parameters
from ldm_core.configs.text import TextTransformerConfig
from ldm_core.configs.unet import UNetConfig
from ldm_core.networks.autoencoder import build_first_stage
from ldm_core.networks.text_transformer import TextTransformer
from ldm_core.networks.unet import UNet

TEXT_PRESETS = [
    name for name, config in presets.MODEL_CONFIGS.items() if isinstance(config.conditioner, TextTransformerConfig)
]


@pytest.fixture(autouse=True)
def nothing_is_allocated() -> Any:
    with torch.device("meta"):
        yield


def parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize("name", presets.FIRST_STAGE_CONFIGS)
def test_a_published_first_stage_is_counted_right(name: str) -> None:
    config = presets.first_stage(name)
    assert first_stage_parameters(config) == parameters(build_first_stage(config))


@pytest.mark.parametrize("name", presets.UNET_CONFIGS)
def test_a_published_unet_is_counted_right(name: str) -> None:
    config = presets.unet(name)
    assert unet_parameters(config) == parameters(UNet(config))


@pytest.mark.parametrize("name", TEXT_PRESETS)
def test_a_published_text_transformer_is_counted_right(name: str) -> None:
    config = presets.get(name).conditioner
    assert isinstance(config, TextTransformerConfig)
    assert text_transformer_parameters(config) == parameters(TextTransformer(config))


@pytest.mark.parametrize(
    "changes",
    [
        {"channel_mult": (3,)},
        {"channel_mult": (2, 1, 3), "num_res_blocks": 3, "attention_resolutions": (64, 16)},
        {"attention_resolutions": (64, 32, 16), "mid_attention": False},
        {"in_channels": 1, "z_channels": 5, "embed_dim": 2, "norm_groups": 4},
        {"regularization": "vq", "codebook_size": 77, "z_channels": 5, "embed_dim": 2},
    ],
)
def test_an_odd_first_stage_is_counted_right(changes: dict[str, Any]) -> None:
    shape: dict[str, Any] = {"regularization": "kl", "base_channels": 32, "channel_mult": (1, 1, 2)}
    shape |= {"z_channels": 4, "embed_dim": 4, "trained_at_resolution": 64}
    config = FirstStageConfig(**(shape | changes))
    assert first_stage_parameters(config) == parameters(build_first_stage(config))


@pytest.mark.parametrize(
    "changes",
    [
        {"channel_mult": (1,), "attention_downsampling": ()},
        {"channel_mult": (2, 1, 3), "num_res_blocks": 3, "in_channels": 9, "out_channels": 1},
        {"context_dim": 7, "transformer_depth": 3},
        {"context_dim": 7, "resblock_up_down": True, "use_scale_shift_norm": True},
        {"resblock_up_down": True, "attention_downsampling": (1, 4)},
        {"use_scale_shift_norm": True, "num_heads": None, "num_head_channels": 8},
    ],
)
def test_an_odd_unet_is_counted_right(changes: dict[str, Any]) -> None:
    shape: dict[str, Any] = {"latent_size": 16, "in_channels": 4, "out_channels": 4, "model_channels": 32}
    shape |= {"channel_mult": (1, 2, 2), "attention_downsampling": (2,), "num_heads": 4}
    config = UNetConfig(**(shape | changes))
    assert unet_parameters(config) == parameters(UNet(config))


def test_heads_of_a_text_transformer_need_not_fill_its_width() -> None:
    config = TextTransformerConfig(vocabulary_size=11, max_length=5, width=24, layers=3, heads=2, head_dim=10)
    assert text_transformer_parameters(config) == parameters(TextTransformer(config))
    shallower = dataclasses.replace(config, layers=2)
    assert text_transformer_parameters(shallower) < text_transformer_parameters(config)
