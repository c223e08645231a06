"""How many bits the model needs for a sample: the variational bound, in full (Ho et al. 2020, Eq. 5; appendix B).

Shapes: z0: (B, ...) clean latents or, for models at f=1, pixels.
"""

import math

import torch
from torch import Tensor

from ldm_core.objective import vlb_weights
from ldm_core.samplers import Denoise, NoiseSource
from ldm_core.samplers.steps import predict
from ldm_core.schedule import NoiseSchedule


@torch.no_grad()
def variational_bound(denoise: Denoise, z0: Tensor, schedule: NoiseSchedule, noise: NoiseSource) -> Tensor:
    """An upper bound on -log2 p(z0) for each dimension of z0, with the posterior's variance in every step.

    T evaluations of the model, each with noise of its own. z0 is taken as continuous: the bound may be negative. For
    8-bit pixels scaled to [-1, 1] add log2(127.5), which makes it bits of a pixel's colour.

    Args:
        denoise: predicts the noise, or noise and clean latent.
        z0: (B, ...) samples.
        schedule: forward process the network was trained on.
        noise: source of noise of z0's shape, drawn from T times.

    Returns:
        (B,) float32 bits per dimension.
    """
    last = schedule.timesteps - 1
    abar = schedule.alpha_bar(last)
    # L_T: what is left of z0 at the end of the chain, against the prior N(0, I).
    bound = _per_sample(0.5 * (abar * z0.square() - abar - math.log1p(-abar)))
    weights = vlb_weights("x0", schedule).tolist()
    for t in range(last, -1, -1):
        z_t = schedule.add_noise(z0, noise(), torch.full((len(z0),), t, dtype=torch.long, device=z0.device))
        squared_error = _per_sample((predict(denoise, z_t, t, schedule).x0 - z0).square())
        if t > 0:
            bound = bound + weights[t] * squared_error
        else:
            # L_0: the last step is a Gaussian of variance beta_0 around the prediction.
            variance = 1.0 - schedule.alpha_bar(0)
            bound = bound + 0.5 * (squared_error / variance + math.log(2.0 * math.pi * variance))
    return bound / math.log(2.0)


def _per_sample(values: Tensor) -> Tensor:
    """(B, ...) to (B,) float32 means."""
    return values.float().flatten(1).mean(dim=1)
