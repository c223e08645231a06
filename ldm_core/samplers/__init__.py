"""Samplers: from noise to latents with any function that predicts the noise.

`denoise(x, t) -> eps` takes x (B, ...) and t (B,), integers of a chain and real numbers of a rectified flow. It returns
the predicted noise of x's shape, or `Prediction(eps, x0)` if the noise alone does not determine the clean latent: at a
timestep without signal, with which every rectified flow begins.
Samplers know neither networks nor conditioning. Whatever changes what is sampled wraps `denoise`, and so works with
every sampler: `guidance.classifier_free`, `guidance.image_guidance`, and `masked` of this package.

    solvers   ddpm, ddim, plms, euler, heun, dpm_solver_pp_2m, unipc
    steps     timestep_grid: the timesteps that a few-step sampler visits; plan_steps and predict: what a sampler of
              one's own needs, the steps with their noise levels, and both halves of what a denoiser answers
    noise     seeded_noise: sample i depends on its own seed alone
    editing   img2img_start: image-to-image; masked: inpainting with any model

All are convolutional (Sec. 4.3.2): the latent may have any height and width that the network takes.
"""

from collections.abc import Callable

from torch import Tensor

from ldm_core.objective import Prediction
from ldm_core.samplers.editing import img2img_start, masked
from ldm_core.samplers.noise import NoiseSource, initial_noise, seeded_noise
from ldm_core.samplers.solvers import ddim, ddpm, dpm_solver_pp_2m, euler, heun, plms, unipc
from ldm_core.samplers.steps import (
    Callback,
    Denoise,
    Final,
    Spacing,
    Step,
    default_spacing,
    plan_steps,
    predict,
    timestep_grid,
)

# (denoise, x, schedule, **options) -> clean latents of x's shape. The few-step samplers share their options, but for
# DDIM's eta and noise and UniPC's order. DDPM visits every timestep of a chain.
Sampler = Callable[..., Tensor]

__all__ = [
    "Callback",
    "Denoise",
    "Final",
    "NoiseSource",
    "Prediction",
    "Sampler",
    "Spacing",
    "Step",
    "ddim",
    "ddpm",
    "default_spacing",
    "dpm_solver_pp_2m",
    "euler",
    "heun",
    "img2img_start",
    "initial_noise",
    "masked",
    "plan_steps",
    "plms",
    "predict",
    "seeded_noise",
    "timestep_grid",
    "unipc",
]
