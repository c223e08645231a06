"""The published models by name, as typed configurations (paper, Tables 8 and 12-15, and the code release).

`first_stage(name)` and `unet(name)` give the parts of every published model, `get(name)` a whole model; the
`tiny-*` ones are for tests and for machines without a GPU.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Literal, TypeVar

from ldm_core.autoencoder import FirstStageConfig
from ldm_core.latent_diffusion import LatentDiffusionConfig
from ldm_core.schedule import ScheduleConfig
from ldm_core.text_transformer import TextTransformerConfig
from ldm_core.unet import UNetConfig

BERT_VOCABULARY_SIZE = 30_522

T = TypeVar("T")


def _kl(channel_mult: tuple[int, ...], channels: int, attention: tuple[int, ...] = ()) -> FirstStageConfig:
    return FirstStageConfig(
        regularization="kl",
        base_channels=128,
        channel_mult=channel_mult,
        attention_resolutions=attention,
        z_channels=channels,
        embed_dim=channels,
    )


def _vq(
    channel_mult: tuple[int, ...],
    channels: int,
    codebook_size: int,
    attention: tuple[int, ...] = (),
    mid_attention: bool = True,
) -> FirstStageConfig:
    return FirstStageConfig(
        regularization="vq",
        base_channels=128,
        channel_mult=channel_mult,
        attention_resolutions=attention,
        mid_attention=mid_attention,
        z_channels=channels,
        embed_dim=channels,
        codebook_size=codebook_size,
    )


FIRST_STAGE_CONFIGS: Mapping[str, FirstStageConfig] = {
    "kl-f4": _kl((1, 2, 4), 3),
    "kl-f8": _kl((1, 2, 4, 4), 4),
    "kl-f16": _kl((1, 1, 2, 2, 4), 16, attention=(16,)),
    "kl-f32": _kl((1, 1, 2, 2, 4, 4), 64, attention=(16, 8)),
    "vq-f4": _vq((1, 2, 4), 3, 8192),
    "vq-f4-noattn": _vq((1, 2, 4), 3, 8192, mid_attention=False),
    "vq-f8": _vq((1, 2, 2, 4), 4, 16_384, attention=(32,)),
    "vq-f8-n256": _vq((1, 2, 2, 4), 4, 256, attention=(32,)),
    "vq-f16": _vq((1, 1, 2, 2, 4), 8, 16_384, attention=(16,)),
    "tiny-kl-f4": FirstStageConfig(
        regularization="kl",
        base_channels=32,
        channel_mult=(1, 1, 2),
        num_res_blocks=1,
        mid_attention=False,
        z_channels=3,
        embed_dim=3,
        trained_at_resolution=64,
    ),
    "tiny-kl-f8": FirstStageConfig(
        regularization="kl",
        base_channels=16,
        channel_mult=(1, 2, 4, 4),
        num_res_blocks=1,
        mid_attention=False,
        z_channels=4,
        embed_dim=4,
        trained_at_resolution=64,
        norm_groups=16,
    ),
    "tiny-vq-f4": FirstStageConfig(
        regularization="vq",
        base_channels=32,
        channel_mult=(1, 1, 2),
        num_res_blocks=1,
        mid_attention=False,
        z_channels=3,
        embed_dim=3,
        codebook_size=256,
        trained_at_resolution=64,
    ),
}

_UNCONDITIONAL_F4 = UNetConfig(
    latent_size=64,
    in_channels=3,
    out_channels=3,
    model_channels=224,
    channel_mult=(1, 2, 3, 4),
    attention_downsampling=(8, 4, 2),
    num_head_channels=32,
)


def _semantic(latent_size: int) -> UNetConfig:
    # These factors lie beyond the last level (4): only the middle has attention, as published.
    return UNetConfig(
        latent_size=latent_size,
        in_channels=6,
        out_channels=3,
        model_channels=128,
        channel_mult=(1, 4, 8),
        attention_downsampling=(32, 16, 8),
        num_heads=8,
    )


def _stable_diffusion_shape(latent_size: int, context_dim: int) -> UNetConfig:
    return UNetConfig(
        latent_size=latent_size,
        in_channels=4,
        out_channels=4,
        model_channels=320,
        channel_mult=(1, 2, 4, 4),
        attention_downsampling=(4, 2, 1),
        num_heads=8,
        context_dim=context_dim,
    )


UNET_CONFIGS: Mapping[str, UNetConfig] = {
    "txt2img-1p4b": _stable_diffusion_shape(32, 1280),
    "sd-v1": _stable_diffusion_shape(64, 768),
    "txt2img-256-f4": UNetConfig(
        latent_size=64,
        in_channels=3,
        out_channels=3,
        model_channels=192,
        channel_mult=(1, 2, 3, 5),
        attention_downsampling=(8, 4, 2),
        num_head_channels=32,
        context_dim=640,
    ),
    "class-imagenet-256-f4": UNetConfig(
        latent_size=64,
        in_channels=3,
        out_channels=3,
        model_channels=192,
        channel_mult=(1, 2, 3, 5),
        attention_downsampling=(8, 4, 2),
        num_heads=1,
        context_dim=512,
    ),
    "class-imagenet-256-f8": UNetConfig(
        latent_size=32,
        in_channels=4,
        out_channels=4,
        model_channels=256,
        channel_mult=(1, 2, 4),
        attention_downsampling=(4, 2, 1),
        num_head_channels=32,
        context_dim=512,
    ),
    "uncond-celebahq-256": _UNCONDITIONAL_F4,
    "uncond-ffhq-256": _UNCONDITIONAL_F4,
    "uncond-lsun-bedrooms-256": _UNCONDITIONAL_F4,
    "uncond-lsun-churches-256": UNetConfig(
        latent_size=32,
        in_channels=4,
        out_channels=4,
        model_channels=192,
        channel_mult=(1, 2, 2, 4, 4),
        attention_downsampling=(1, 2, 4, 8),
        num_heads=8,
        use_scale_shift_norm=True,
        resblock_up_down=True,
    ),
    "layout-openimages-256": UNetConfig(
        latent_size=64,
        in_channels=3,
        out_channels=3,
        model_channels=128,
        channel_mult=(1, 2, 3, 4),
        attention_downsampling=(8, 4, 2),
        num_head_channels=32,
        context_dim=512,
        transformer_depth=3,
    ),
    "semantic-landscapes-256": _semantic(64),
    "semantic-landscapes-512": _semantic(128),
    "super-resolution-bsr": UNetConfig(
        latent_size=64,
        in_channels=6,
        out_channels=3,
        model_channels=160,
        channel_mult=(1, 2, 2, 4),
        attention_downsampling=(16, 8),
        num_head_channels=32,
    ),
    "inpainting-big": UNetConfig(
        latent_size=64,
        in_channels=7,
        out_channels=3,
        model_channels=256,
        channel_mult=(1, 2, 3, 4),
        attention_downsampling=(8, 4, 2),
        num_heads=8,
        resblock_up_down=True,
    ),
    "tiny-txt2img": UNetConfig(
        latent_size=8,
        in_channels=4,
        out_channels=4,
        model_channels=64,
        channel_mult=(1, 2),
        attention_downsampling=(2, 1),
        num_heads=4,
        context_dim=128,
    ),
}


def _text(width: int, layers: int) -> TextTransformerConfig:
    return TextTransformerConfig(vocabulary_size=BERT_VOCABULARY_SIZE, width=width, layers=layers)


def _model(
    name: str,
    first_stage: str,
    *,
    betas: tuple[float, float],
    conditioner: TextTransformerConfig | None = None,
    loss: Literal["l1", "l2"] = "l2",
    scale_factor: float = 1.0,
) -> LatentDiffusionConfig:
    return LatentDiffusionConfig(
        first_stage=FIRST_STAGE_CONFIGS[first_stage],
        unet=UNET_CONFIGS[name],
        conditioner=conditioner,
        schedule=ScheduleConfig(kind="scaled_linear", beta_start=betas[0], beta_end=betas[1]),
        loss=loss,
        scale_factor=scale_factor,
    )


MODEL_CONFIGS: Mapping[str, LatentDiffusionConfig] = {
    "txt2img-1p4b": _model(
        "txt2img-1p4b", "kl-f8", betas=(0.00085, 0.012), conditioner=_text(1280, 32), scale_factor=0.18215
    ),
    "txt2img-256-f4": _model("txt2img-256-f4", "vq-f4", betas=(0.0015, 0.0195), conditioner=_text(640, 32)),
    "uncond-celebahq-256": _model("uncond-celebahq-256", "vq-f4", betas=(0.0015, 0.0195)),
    "uncond-ffhq-256": _model("uncond-ffhq-256", "vq-f4", betas=(0.0015, 0.0195)),
    "uncond-lsun-bedrooms-256": _model("uncond-lsun-bedrooms-256", "vq-f4", betas=(0.0015, 0.0195)),
    # Its scale factor was measured at the start of training (1 / std), and is measured anew by ours.
    "uncond-lsun-churches-256": _model("uncond-lsun-churches-256", "kl-f8", betas=(0.0015, 0.0155), loss="l1"),
    "tiny-txt2img": _model(
        "tiny-txt2img",
        "tiny-kl-f8",
        betas=(0.00085, 0.012),
        conditioner=TextTransformerConfig(vocabulary_size=1024, width=128, layers=2, heads=4, head_dim=32),
    ),
}


def names() -> list[str]:
    """Names that `get` knows, sorted."""
    return sorted(MODEL_CONFIGS)


def get(name: str) -> LatentDiffusionConfig:
    """The configuration of a whole model; `get(name).build()` makes one with random weights.

    Raises:
        ValueError: no such preset; the message names the nearest.
    """
    return _lookup(MODEL_CONFIGS, name, "model")


def first_stage(name: str) -> FirstStageConfig:
    """The configuration of a first stage by its name in the paper's Table 8.

    Raises:
        ValueError: no such preset; the message names the nearest.
    """
    return _lookup(FIRST_STAGE_CONFIGS, name, "first stage")


def unet(name: str) -> UNetConfig:
    """The configuration of a published model's UNet.

    Raises:
        ValueError: no such preset; the message names the nearest.
    """
    return _lookup(UNET_CONFIGS, name, "UNet")


def _lookup(table: Mapping[str, T], name: str, kind: str) -> T:
    if name not in table:
        nearest = difflib.get_close_matches(name, table, n=1, cutoff=0.0)[0]
        raise ValueError(f"unknown {kind} preset {name!r}; the nearest is {nearest!r}, all are {sorted(table)}")
    return table[name]
