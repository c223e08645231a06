"""Guidance rescale against diffusers'."""

import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

from ldm_core.guidance import combine


@pytest.mark.parametrize("rescale", [0.0, 0.7, 1.0])
def test_guidance_rescale_gives_what_diffusers_gives(rescale: float) -> None:
    conditional, unconditional = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))

    ours = combine(unconditional, conditional, 7.5, rescale=rescale)
    theirs = rescale_noise_cfg(unconditional + 7.5 * (conditional - unconditional), conditional, rescale)
    torch.testing.assert_close(ours, theirs)
