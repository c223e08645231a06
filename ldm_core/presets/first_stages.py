"""The published first stages (paper, Table 8, and the code release), and tiny ones of both kinds."""

from __future__ import annotations

from collections.abc import Mapping

from ldm_core.configs.first_stage import FirstStageConfig


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
