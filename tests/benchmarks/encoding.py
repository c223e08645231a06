"""Encoding images to latents, ours and diffusers': frozen kl-f8 at 256 px, as the latent cache is filled."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ldm_core.configs.first_stage import FirstStageConfig
from ldm_core.networks.autoencoder import AutoencoderKL, build_first_stage
from tests.benchmarks import peers
from tests.benchmarks.shapes import OURS, THEIRS, Call, Shape


def sides(config: FirstStageConfig, batch_size: int, device: torch.device) -> dict[str, Callable[[Shape], Call]]:
    """Build both sides' encoders with the same weights for the same images; ours alone without diffusers."""
    torch.manual_seed(0)
    x = torch.rand(batch_size, 3, config.trained_at_resolution, config.trained_at_resolution, device=device) * 2 - 1

    def ours(shape: Shape) -> Call:
        first_stage = initial_first_stage(config, device)
        shape.prepare(first_stage, "sampling")
        return torch.inference_mode()(lambda: first_stage.encode(x).mode())

    def theirs(shape: Shape) -> Call:
        first_stage = peers.diffusers_first_stage(initial_first_stage(config, device))
        for part in (first_stage.encoder, first_stage.quant_conv):
            shape.infer_theirs(part)
            shape.compile_theirs(part)
        images = x.to(shape.dtype).contiguous(memory_format=shape.memory_format)
        return torch.inference_mode()(lambda: first_stage.encode(images).latent_dist.mode())

    return {OURS: ours, THEIRS: theirs} if peers.available() else {OURS: ours}


def initial_first_stage(config: FirstStageConfig, device: torch.device) -> AutoencoderKL:
    """Build the first stage with the same random weights at every call."""
    torch.manual_seed(1)
    with device:
        first_stage = build_first_stage(config)
    assert isinstance(first_stage, AutoencoderKL)
    return first_stage
