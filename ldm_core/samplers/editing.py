"""Sampling that begins with, or keeps parts of, a given latent; works with every sampler.

z0, x: (B, C, h, w) clean and noisy latent; t: (B,) integer timesteps.
"""

import torch
from torch import Tensor

from ldm_core.objective import Prediction
from ldm_core.samplers.steps import Denoise, Spacing, timestep_grid
from ldm_core.schedule import NoiseSchedule


def img2img_start(
    z0: Tensor,
    noise: Tensor,
    schedule: NoiseSchedule,
    *,
    strength: float,
    num_steps: int = 50,
    spacing: Spacing = "leading",
) -> tuple[Tensor, list[int]]:
    """Image-to-image (SDEdit, Meng et al. 2022): noise a latent part of the way, and sample back from there.

        x, timesteps = img2img_start(z0, noise, schedule, strength=0.75)
        z = ddim(denoise, x, schedule, timesteps=timesteps)

    Args:
        z0: (B, C, h, w) scaled latent of the given images.
        noise: normal noise of z0's shape.
        schedule: forward process the network was trained on.
        strength: share of the grid's steps that are taken, above 0 (hardly changed) to 1 (hardly kept).
        num_steps, spacing: the whole grid, see `timestep_grid`.

    Returns:
        The latent to start from, of z0's shape, and the timesteps to visit.

    Raises:
        ValueError: unless 0 < strength <= 1 and at least one step is left.
    """
    grid = timestep_grid(schedule, num_steps, spacing)
    taken = int(strength * len(grid)) if 0.0 < strength <= 1.0 else 0
    if taken == 0:
        raise ValueError(
            f"strength must be above 0, at most 1, and leave at least one of {len(grid)} steps, got {strength}: "
            "raise strength or num_steps"
        )
    timesteps = grid[-taken:]
    t = torch.full((len(z0),), timesteps[0], dtype=torch.long, device=z0.device)
    return schedule.add_noise(z0, noise, t), timesteps


def masked(denoise: Denoise, schedule: NoiseSchedule, known: Tensor, mask: Tensor) -> Denoise:
    """Masked sampling (inpainting) with any model, trained for it or not: fill the mask, keep the rest.

    At every step the known region is the given latent at that step's noise level, as in the code release, which draws
    its noise anew each time. No sampler needs to be told: the wrapped denoiser answers that the clean latent is
    `known` there, so that each of them moves the region along its own exact trajectory, with the noise that x began
    with (and the noise that DDPM and DDIM with eta > 0 add). Start from noise, or for the exact noise level at an early
    timestep from `img2img_start(known, ...)`. The result keeps the noise level of timestep 0 in the known region too;
    `torch.where(mask, z, known)` removes it.

    Args:
        denoise: predicts the noise, or noise and clean latent.
        schedule: forward process the network was trained on.
        known: (B, C, h, w) or (1, C, h, w) scaled latent of the given images; its values under the mask are unused.
        mask: of a shape that broadcasts to known's; 1 (or True) is to be filled, 0 is kept.

    Raises:
        ValueError: for a mask that holds anything but 0 and 1, or shapes that do not fit (on call: x's).
    """
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError(
            "a mask must hold only 1 (to be filled) and 0 (kept), got values between "
            f"{mask.min().item():.3g} and {mask.max().item():.3g}: threshold it after resizing"
        )
    if not _broadcasts(mask, known):
        raise ValueError(f"the mask must broadcast to the known latent {tuple(known.shape)}, got {tuple(mask.shape)}")
    fill = mask.bool()

    def filled(x: Tensor, t: Tensor) -> Tensor | Prediction:
        if not _broadcasts(known, x):
            raise ValueError(f"the known latent must have x's shape {tuple(x.shape)}, got {tuple(known.shape)}")
        signal, sigma = schedule.levels(t, like=x)
        known_eps = (x - signal * known) / sigma
        answer = denoise(x, t)
        if isinstance(answer, Prediction):
            return Prediction(torch.where(fill, answer.eps, known_eps), torch.where(fill, answer.x0, known))
        return torch.where(fill, answer, known_eps)

    return filled


def _broadcasts(tensor: Tensor, to: Tensor) -> bool:
    """Whether a tensor can be expanded to another's shape."""
    return tensor.dim() == to.dim() and all(own in (1, size) for own, size in zip(tensor.shape, to.shape))
