"""The UNets of the published models (paper, Tables 12-15, and the code release), and a tiny one for each kind."""

from __future__ import annotations

from collections.abc import Mapping

from ldm_core.configs.unet import UNetConfig

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


def _tiny_unet(in_channels: int, *, latent_size: int = 16, context_dim: int | None = None) -> UNetConfig:
    return UNetConfig(
        latent_size=latent_size,
        in_channels=in_channels,
        out_channels=4 if in_channels == 4 else 3,
        model_channels=64,
        channel_mult=(1, 2),
        attention_downsampling=(2, 1),
        num_heads=4,
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
    "tiny-txt2img": _tiny_unet(4, latent_size=8, context_dim=128),
    "tiny-sd": _tiny_unet(4, latent_size=8, context_dim=64),
    "tiny-class": _tiny_unet(3, context_dim=64),
    "tiny-uncond": _tiny_unet(3),
    "tiny-layout": _tiny_unet(3, context_dim=64),
    "tiny-semantic": _tiny_unet(6),
    "tiny-super-resolution": _tiny_unet(6),
    "tiny-inpainting": _tiny_unet(7),
}
