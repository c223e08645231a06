"""Image-to-image and inpainting: sampling that starts from, or keeps parts of, a given latent, with any sampler.

z0, x: (B, C, h, w) clean and noisy latent; t: (B,) timesteps.
"""

import torch
from torch import Tensor

from ldm_core.images import to_bool
from ldm_core.objective import Prediction
from ldm_core.samplers.steps import Denoise, Spacing, same_timestep, timestep_grid
from ldm_core.schedule import NoiseSchedule


def img2img_start(
    z0: Tensor,
    noise: Tensor,
    schedule: NoiseSchedule,
    *,
    strength: float,
    num_steps: int = 50,
    spacing: Spacing | None = None,
) -> tuple[Tensor, list[float]]:
    """Noise a latent part of the way, to sample back from there: image-to-image (SDEdit, Meng et al. 2022).

        x, timesteps = img2img_start(z0, noise, schedule, strength=0.75)
        z = ddim(denoise, x, schedule, timesteps=timesteps)

    Args:
        z0: (B, C, h, w) scaled latent of the given images.
        noise: normal noise of z0's shape.
        schedule: forward process the network was trained on.
        strength: share of the grid's steps to take, from above 0 (little changes) to 1 (little is kept).
        num_steps, spacing: the whole grid, of which the last steps are taken; see `timestep_grid`.

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
    return schedule.add_noise(z0, noise, same_timestep(z0, timesteps[0])), timesteps


def masked(denoise: Denoise, schedule: NoiseSchedule, known: Tensor, mask: Tensor) -> Denoise:
    """Wrap a denoiser for masked sampling (inpainting): fill the mask, keep the rest. Any model will do.

    At every step the known region is the given latent at that step's noise level, as in the code release, which draws
    new noise for it each time. Here the wrapped denoiser answers that the clean latent is `known` there. Every sampler
    then moves the region along its exact trajectory without being told, with the noise that x began with (and the
    noise that DDPM and DDIM with eta > 0 add).

    Start from noise, or, for the exact noise level at an early timestep, from `img2img_start(known, ...)`. In the
    result the known region too has the noise level at which the sampler ends; `torch.where(mask, z, known)` removes it.

    Args:
        denoise: predicts the noise, or noise and clean latent.
        schedule: forward process the network was trained on.
        known: (B, C, h, w) or (1, C, h, w) scaled latent of the given images; its values under the mask are unused.
        mask: tensor that broadcasts to known's shape; 1 (or True) is filled, 0 is kept.

    Raises:
        ValueError: for a mask that holds anything but 0 and 1, or shapes that do not fit (x's when called).
    """
    fill = to_bool(mask)
    if not _broadcasts(mask, known):
        raise ValueError(f"the mask must broadcast to the known latent {tuple(known.shape)}, got {tuple(mask.shape)}")

    def filled(x: Tensor, t: Tensor) -> Tensor | Prediction:
        if not _broadcasts(known, x):
            raise ValueError(f"the known latent must have x's shape {tuple(x.shape)}, got {tuple(known.shape)}")
        signal, sigma = schedule.levels(t, like=x)
        # The noise in x if its clean latent is `known`: z_t = signal z_0 + sigma eps solved for eps.
        known_eps = (x - signal * known) / sigma
        answer = denoise(x, t)
        if isinstance(answer, Prediction):
            return Prediction(torch.where(fill, answer.eps, known_eps), torch.where(fill, answer.x0, known))
        return torch.where(fill, answer, known_eps)

    return filled


def _broadcasts(tensor: Tensor, to: Tensor) -> bool:
    """Return whether a tensor of as many dimensions can be expanded to another's shape."""
    return tensor.dim() == to.dim() and all(own in (1, size) for own, size in zip(tensor.shape, to.shape))
