"""Sample pictures for prompts: shared by previews during training, the `evaluate` stage and `ldm sample`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ldm_core import samplers
from ldm_core.images import to_uint8
from ldm_core.latent_diffusion import LatentDiffusion
from pipelines.conditions.kind import Prompts
from pipelines.errors import UserError
from pipelines.stages.diffusion.config import SamplingConfig


def sample_prompts(
    model: LatentDiffusion,
    reader: Prompts,
    prompts: Sequence[str],
    seeds: Sequence[int],
    sampling: SamplingConfig,
) -> NDArray[np.uint8]:
    """Sample one picture per prompt with classifier-free guidance (paper, Sec. 4.3.1).

    Picture i depends on the model, prompts[i] and seeds[i] alone, up to the last bit that a kernel may round
    differently for another batch size.

    Args:
        model: the model, on the device to sample on; its weights are used as they are.
        reader: makes the model's input from prompts.
        prompts: N prompts, possibly empty ones.
        seeds: N integers.
        sampling: sampler, steps, guidance scale, eta, and pictures per forward pass.

    Returns:
        (N, H, W, 3) uint8 RGB.

    Raises:
        UserError: a prompt that the model cannot be asked for, or a model that cannot be guided.
        ValueError: the numbers of seeds and prompts differ, or there are no prompts.
    """
    if len(prompts) != len(seeds) or not prompts:
        raise ValueError(f"give one seed per prompt, at least one; got {len(prompts)} prompts and {len(seeds)} seeds")
    # Guided by nothing, an unconditional model is as it is, whatever the scale.
    guidance_scale = sampling.guidance_scale if reader.guided else 1.0
    unconditional = reader.unconditional()
    if guidance_scale != 1 and unconditional is None:
        raise UserError(
            "this model was trained without dropping its condition and cannot be guided: set the guidance scale to 1, "
            f"got {guidance_scale}"
        )
    pictures = []
    for start in range(0, len(prompts), sampling.batch_size):
        batch = slice(start, start + sampling.batch_size)
        images = model.sample(
            reader.inputs(prompts[batch]),
            unconditional=unconditional,
            seeds=list(seeds[batch]),
            num_steps=sampling.num_steps,
            guidance_scale=guidance_scale,
            eta=sampling.eta,
            sampler=getattr(samplers, sampling.sampler),
        )
        pictures.append(to_uint8(images).permute(0, 2, 3, 1).cpu().numpy())
    return np.concatenate(pictures)
