"""Guidance rescale against diffusers'."""

import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from torch import Tensor

from ldm_core.guidance import classifier_free


@pytest.mark.parametrize("rescale", [0.0, 0.7, 1.0])
def test_guidance_rescale_gives_what_diffusers_gives(rescale: float) -> None:
    x, conditional, unconditional = torch.randn(3, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))

    def denoise(x: Tensor, t: Tensor, *, context: Tensor | None = None, concat: Tensor | None = None) -> Tensor:
        return torch.cat([unconditional, conditional])

    context = torch.zeros(1, 1, 1)
    ours = classifier_free(denoise, context, context, 7.5, rescale=rescale)(x, torch.zeros(2, dtype=torch.long))
    theirs = rescale_noise_cfg(unconditional + 7.5 * (conditional - unconditional), conditional, rescale)
    torch.testing.assert_close(ours, theirs)
