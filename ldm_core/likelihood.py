"""Likelihood: the full variational bound in bits per dimension (Ho et al. 2020, Eq. 5; appendix B of the paper).

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
    """Return an upper bound on -log2 p(z0), divided by z0's dimensions; each step has the posterior's variance.

    It costs T evaluations of the model, each with new noise. z0 is taken as continuous, so that the bound may be
    negative; for 8-bit pixels scaled to [-1, 1] add log2(127.5) to get bits per colour value.

    Args:
        denoise: predicts the noise, or noise and clean latent.
        z0: (B, ...) samples.
        schedule: forward process the network was trained on.
        noise: source of noise of z0's shape, which is drawn from T times.

    Returns:
        (B,) float32 bits per dimension.

    Raises:
        ValueError: for a rectified flow, which is no chain.
    """
    last = schedule.timesteps - 1
    abar = schedule.alpha_bar(last)
    # L_T: KL(q(z_T | z_0) || N(0, I)), from what is left of z0 at the end of the chain.
    bound = _per_sample(0.5 * (abar * z0.square() - abar - math.log1p(-abar)))
    weights = vlb_weights("x0", schedule).tolist()
    for t in range(last, -1, -1):
        z_t = schedule.add_noise(z0, noise(), torch.full((len(z0),), t, dtype=torch.long, device=z0.device))
        squared_error = _per_sample((predict(denoise, z_t, t, schedule).x0 - z0).square())
        if t > 0:
            # L_{t-1}: KL of two Gaussians of the same variance.
            bound = bound + weights[t] * squared_error
        else:
            # L_0: minus the log density of z0 under a Gaussian of variance beta_0 around the prediction.
            variance = 1.0 - schedule.alpha_bar(0)
            bound = bound + 0.5 * (squared_error / variance + math.log(2.0 * math.pi * variance))
    return bound / math.log(2.0)


def _per_sample(values: Tensor) -> Tensor:
    """Return the mean of each sample, (B, ...) -> (B,) float32."""
    return values.float().flatten(1).mean(dim=1)
