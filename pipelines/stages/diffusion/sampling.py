"""Pictures from prompts: what previews during training, the `evaluate` stage and `ldm sample` share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from ldm_core.latent_diffusion import LatentDiffusion
    from ldm_core.tokenizers.tokenizer import Tokenizer
    from pipelines.stages.diffusion.config import SamplingConfig


def sample_prompts(
    model: LatentDiffusion,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    seeds: Sequence[int],
    sampling: SamplingConfig,
) -> NDArray[np.uint8]:
    """Sample one picture a prompt by DDIM with classifier-free guidance (paper, Sec. 4.3.1).

    Picture i depends on the model, prompts[i] and seeds[i] alone, up to the last bit that a kernel may round
    differently for another batch size.

    Args:
        model: on the device that is to be used; its weights are taken as they are.
        tokenizer: of the captions that the model was trained on.
        prompts: N captions, possibly empty.
        seeds: N integers.
        sampling: steps, guidance scale, eta, and the pictures a forward pass.

    Returns:
        (N, H, W, 3) uint8 RGB.

    Raises:
        ValueError: not as many seeds as prompts, or no prompts.
    """
    import torch

    from ldm_core import samplers
    from ldm_core.images import to_uint8

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
