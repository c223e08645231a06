"""Sample pictures for prompts: shared by previews during training, the `evaluate` stage and `ldm sample`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from ldm_core import samplers
from ldm_core.images import to_uint8
from ldm_core.latent_diffusion import LatentDiffusion
from pipelines.stages.diffusion.config import SamplingConfig

if TYPE_CHECKING:
    from ldm_core.tokenizers.tokenizer import Tokenizer


def sample_prompts(
    model: LatentDiffusion,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    seeds: Sequence[int],
    sampling: SamplingConfig,
) -> NDArray[np.uint8]:
    """Sample one picture per prompt with classifier-free guidance (paper, Sec. 4.3.1).

    Picture i depends on the model, prompts[i] and seeds[i] alone, up to the last bit that a kernel may round
    differently for another batch size.

    Args:
        model: the model, on the device to sample on; its weights are used as they are.
        tokenizer: the tokenizer of the captions that the model was trained on.
        prompts: N captions, possibly empty ones.
        seeds: N integers.
        sampling: sampler, steps, guidance scale, eta, and pictures per forward pass.

    Returns:
        (N, H, W, 3) uint8 RGB.

    Raises:
        ValueError: the numbers of seeds and prompts differ, or there are no prompts.
    """
    if len(prompts) != len(seeds) or not prompts:
        raise ValueError(f"give one seed per prompt, at least one; got {len(prompts)} prompts and {len(seeds)} seeds")
    device = next(model.parameters()).device
    tokens = torch.from_numpy(tokenizer.encode(list(prompts)).astype(np.int64)).to(device)
    empty_tokens = torch.from_numpy(tokenizer.encode([""]).astype(np.int64)).to(device)
    pictures = []
    for start in range(0, len(prompts), sampling.batch_size):
        batch = slice(start, start + sampling.batch_size)
        images = model.sample(
            tokens[batch],
            unconditional=empty_tokens,
            seeds=list(seeds[batch]),
            num_steps=sampling.num_steps,
            guidance_scale=sampling.guidance_scale,
            eta=sampling.eta,
            sampler=getattr(samplers, sampling.sampler),
        )
        pictures.append(to_uint8(images).permute(0, 2, 3, 1).cpu().numpy())
    return np.concatenate(pictures)
