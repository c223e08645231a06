"""What is measured on which machine: the paper's models on a GPU, small ones on a CPU, tiny ones to try the code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ldm_core import presets
from ldm_core.configs.first_stage import FirstStageConfig
from ldm_core.configs.model import LatentDiffusionConfig
from ldm_core.configs.unet import UNetConfig
from tests.benchmarks import pixel_latent

PARTS = ("prepare", "train", "sample", "encode", "pixel", "sweep")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Models, batch sizes and rounds of every part; `model` is sampled and swept, its UNet trained."""

    model: LatentDiffusionConfig
    prepare_batch_sizes: tuple[int, ...]
    prepare_steps: int
    train_batch_sizes: tuple[int, ...]
    sample_batch_sizes: tuple[int, ...]
    sample_steps: int
    first_stage: FirstStageConfig
    encode_batch_sizes: tuple[int, ...]
    pixel_latent: dict[str, UNetConfig]
    pixel_latent_batch_sizes: dict[str, int]
    sweep_batch_sizes: tuple[int, ...]
    rounds: int

    @property
    def unet(self) -> UNetConfig:
        """What the training step trains."""
        return self.model.unet


def plan_for(device: torch.device, *, quick: bool, batch_sizes: Sequence[int] | None = None) -> Plan:
    """Return the plan for a device; `batch_sizes` replaces those of every part, at f=1 by an eighth of the largest."""
    plan = GPU if device.type == "cuda" else CPU
    if quick:
        plan = QUICK
    if not batch_sizes:
        return plan
    sizes = tuple(batch_sizes)
    return replace(
        plan,
        prepare_batch_sizes=sizes,
        train_batch_sizes=sizes,
        sample_batch_sizes=sizes,
        encode_batch_sizes=sizes,
        pixel_latent_batch_sizes=_batch_sizes(max(1, max(sizes) // 8), max(sizes)),
        sweep_batch_sizes=sizes,
    )


def _batch_sizes(pixels: int, latents: int) -> dict[str, int]:
    return {pixel_latent.PIXELS: pixels, pixel_latent.LATENTS: latents}


GPU = Plan(
    model=presets.get("txt2img-1p4b"),
    prepare_batch_sizes=(32,),
    prepare_steps=10,
    train_batch_sizes=(96, 256),
    sample_batch_sizes=(1, 8, 64),
    sample_steps=50,
    first_stage=presets.first_stage("kl-f8"),
    encode_batch_sizes=(64,),
    pixel_latent=pixel_latent.full_size(),
    pixel_latent_batch_sizes=_batch_sizes(8, 64),
    sweep_batch_sizes=(32, 64, 128, 256, 512),
    rounds=15,
)
CPU = Plan(
    model=presets.get("tiny-txt2img"),
    prepare_batch_sizes=(32,),
    prepare_steps=5,
    train_batch_sizes=(32,),
    sample_batch_sizes=(2,),
    sample_steps=50,
    first_stage=presets.first_stage("kl-f8"),
    encode_batch_sizes=(2,),
    pixel_latent=pixel_latent.small(),
    pixel_latent_batch_sizes=_batch_sizes(1, 8),
    sweep_batch_sizes=(16, 64),
    rounds=7,
)
_TINY_UNET = replace(
    presets.unet("tiny-txt2img"),
    model_channels=32,
    num_res_blocks=1,
    channel_mult=(1,),
    attention_downsampling=(1,),
    latent_size=4,
)
QUICK = Plan(
    model=replace(presets.get("tiny-txt2img"), unet=_TINY_UNET),
    prepare_batch_sizes=(2,),
    prepare_steps=2,
    train_batch_sizes=(2,),
    sample_batch_sizes=(1,),
    sample_steps=2,
    first_stage=presets.first_stage("tiny-kl-f8"),
    encode_batch_sizes=(1,),
    pixel_latent={
        name: replace(config, model_channels=32, latent_size=config.latent_size // 2)
        for name, config in pixel_latent.small().items()
    },
    pixel_latent_batch_sizes=_batch_sizes(1, 2),
    sweep_batch_sizes=(2, 4),
    rounds=2,
)
