"""Whole published models: first stage, UNet, conditioner, schedule (paper, Tables 12-15, and the code release)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from ldm_core.configs.conditioning import (
    ClassConfig,
    ConditionerConfig,
    LayoutConfig,
    LowResolutionConfig,
    MaskedImageConfig,
    SemanticMapConfig,
)
from ldm_core.configs.model import LatentDiffusionConfig
from ldm_core.configs.schedule import ScheduleConfig
from ldm_core.configs.text import ClipTextConfig, TextTransformerConfig
from ldm_core.presets.first_stages import FIRST_STAGE_CONFIGS
from ldm_core.presets.unets import UNET_CONFIGS

BERT_VOCABULARY_SIZE = 30_522


def _text(width: int, layers: int) -> TextTransformerConfig:
    return TextTransformerConfig(vocabulary_size=BERT_VOCABULARY_SIZE, width=width, layers=layers)


def _model(
    name: str,
    first_stage: str,
    *,
    betas: tuple[float, float],
    conditioner: ConditionerConfig | None = None,
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


# First and last variance of the forward process; sqrt(beta) rises linearly between them, over 1000 timesteps.
_BETAS = (0.00085, 0.012)
_BETAS_TO_155 = (0.0015, 0.0155)
_BETAS_TO_195 = (0.0015, 0.0195)
_BETAS_TO_205 = (0.0015, 0.0205)
_LANDSCAPES = SemanticMapConfig(classes=182, halvings=2)

MODEL_CONFIGS: Mapping[str, LatentDiffusionConfig] = {
    "txt2img-1p4b": _model("txt2img-1p4b", "kl-f8", betas=_BETAS, conditioner=_text(1280, 32), scale_factor=0.18215),
    "sd-v1": _model("sd-v1", "kl-f8", betas=_BETAS, conditioner=ClipTextConfig(), scale_factor=0.18215),
    "txt2img-256-f4": _model("txt2img-256-f4", "vq-f4", betas=_BETAS_TO_195, conditioner=_text(640, 32)),
    "class-imagenet-256-f4": _model(
        "class-imagenet-256-f4",
        "vq-f4",
        betas=_BETAS_TO_195,
        conditioner=ClassConfig(classes=1001, width=512, unconditional_class=True),
    ),
    "class-imagenet-256-f8": _model(
        "class-imagenet-256-f8", "vq-f8", betas=_BETAS_TO_195, conditioner=ClassConfig(classes=1000, width=512)
    ),
    "uncond-celebahq-256": _model("uncond-celebahq-256", "vq-f4", betas=_BETAS_TO_195),
    "uncond-ffhq-256": _model("uncond-ffhq-256", "vq-f4", betas=_BETAS_TO_195),
    "uncond-lsun-bedrooms-256": _model("uncond-lsun-bedrooms-256", "vq-f4", betas=_BETAS_TO_195),
    # Its scale factor (1 / std) was measured when training began and lies in its checkpoint; ours measures it anew.
    "uncond-lsun-churches-256": _model("uncond-lsun-churches-256", "kl-f8", betas=_BETAS_TO_155, loss="l1"),
    "layout-openimages-256": _model(
        "layout-openimages-256",
        "vq-f4",
        betas=_BETAS_TO_205,
        conditioner=LayoutConfig(width=512, layers=16),
        loss="l1",
    ),
    "semantic-landscapes-256": _model(
        "semantic-landscapes-256", "vq-f4", betas=_BETAS_TO_205, conditioner=_LANDSCAPES, loss="l1"
    ),
    "semantic-landscapes-512": _model(
        "semantic-landscapes-512", "vq-f4", betas=_BETAS_TO_205, conditioner=_LANDSCAPES, loss="l1"
    ),
    "super-resolution-bsr": _model(
        "super-resolution-bsr", "vq-f4", betas=_BETAS_TO_155, conditioner=LowResolutionConfig()
    ),
    "inpainting-big": _model(
        "inpainting-big", "vq-f4-noattn", betas=_BETAS_TO_205, conditioner=MaskedImageConfig(), loss="l1"
    ),
    "tiny-txt2img": _model(
        "tiny-txt2img",
        "tiny-kl-f8",
        betas=_BETAS,
        conditioner=TextTransformerConfig(vocabulary_size=1024, width=128, layers=2, heads=4, head_dim=32),
    ),
    "tiny-sd": _model(
        "tiny-sd",
        "tiny-kl-f8",
        betas=_BETAS,
        conditioner=ClipTextConfig(vocabulary_size=1024, width=64, layers=2, heads=4, feed_forward_width=128),
    ),
    "tiny-class": _model(
        "tiny-class",
        "tiny-vq-f4",
        betas=_BETAS_TO_195,
        conditioner=ClassConfig(classes=11, width=64, unconditional_class=True),
    ),
    "tiny-uncond": _model("tiny-uncond", "tiny-vq-f4", betas=_BETAS_TO_195),
    "tiny-layout": _model(
        "tiny-layout",
        "tiny-vq-f4",
        betas=_BETAS_TO_205,
        conditioner=LayoutConfig(width=64, layers=2, heads=4, head_dim=16, vocabulary_size=256, max_objects=5),
    ),
    "tiny-semantic": _model(
        "tiny-semantic", "tiny-vq-f4", betas=_BETAS_TO_205, conditioner=SemanticMapConfig(classes=12, halvings=2)
    ),
    "tiny-super-resolution": _model(
        "tiny-super-resolution", "tiny-vq-f4", betas=_BETAS_TO_155, conditioner=LowResolutionConfig()
    ),
    "tiny-inpainting": _model("tiny-inpainting", "tiny-vq-f4", betas=_BETAS_TO_205, conditioner=MaskedImageConfig()),
}
