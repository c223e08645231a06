"""Pixels against latents at the same UNet budget (paper, Table 6; LDM-1 and LDM-4 of Sec. 4.1): training throughput."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from ldm_core import presets
from ldm_core.configs.unet import UNetConfig
from tests.benchmarks.timing import Timing, interleaved
from tests.benchmarks.train_step import initial_unet, our_step, random_batch

PIXELS, LATENTS = "LDM-1 (pixels)", "LDM-4 (latents)"


def full_size() -> dict[str, UNetConfig]:
    """Return the class-conditional ImageNet models at 256 px: 397 M parameters at f=1, 401 M at f=4."""
    latent = presets.unet("class-imagenet-256-f4")
    return {PIXELS: _pixel_twin(latent, channel_mult=(1, 1, 2, 2, 4, 4)), LATENTS: latent}


def small() -> dict[str, UNetConfig]:
    """Return the same pair in little, for a CPU: 64 px, a third of the channels, 26 M parameters each."""
    latent = replace(presets.unet("class-imagenet-256-f4"), latent_size=16, model_channels=64, channel_mult=(1, 2, 4))
    return {PIXELS: _pixel_twin(latent, channel_mult=(1, 1, 2, 3, 3)), LATENTS: latent}


def throughput(
    configs: dict[str, UNetConfig], batch_sizes: dict[str, int], device: torch.device, *, rounds: int
) -> tuple[dict[str, Timing], dict[str, int]]:
    """Time a training step at each of the two; return the parameters of each UNet too."""
    steps: dict[str, Callable[[], object]] = {}
    parameters = {}
    for name, config in configs.items():
        unet = initial_unet(config, device)
        parameters[name] = sum(weight.numel() for weight in unet.parameters())
        batch = random_batch(config, batch_sizes[name], 1, device)
        steps[name] = our_step(unet.train(), batch, None)
    return interleaved(steps, device, rounds=rounds, warmup=1), parameters


def _pixel_twin(latent: UNetConfig, *, channel_mult: tuple[int, ...]) -> UNetConfig:
    """Return the UNet at f=1 with about as many parameters, and attention at the same resolutions in pixels."""
    return replace(
        latent,
        latent_size=4 * latent.latent_size,
        channel_mult=channel_mult,
        attention_downsampling=tuple(4 * factor for factor in latent.attention_downsampling),
    )
