"""What the network is trained to predict, and the loss on it.

The network is a function (z_t, t) -> prediction of z_t's shape and knows none of this.
Shapes: z0, z_t, noise, prediction: (B, ...); t: (B,) integers.
Source: Eq. (1)-(3) and appendix B of the paper; v: Salimans & Ho 2022; min-SNR-gamma: Hang et al. 2023.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ldm_core.configs.objective import LossKind, Parameterization, _check_known, check_parameterization
from ldm_core.schedule import NoiseSchedule


class Prediction(NamedTuple):
    """Both halves of z_t = sqrt(abar) x0 + sqrt(1 - abar) eps: the predicted noise and the predicted clean latent."""

    eps: Tensor
    x0: Tensor


def target(parameterization: Parameterization, schedule: NoiseSchedule, z0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """What the network should answer at z_t = schedule.add_noise(z0, noise, t).

    Returns:
        noise for "eps", z0 for "x0", sqrt(abar) noise - sqrt(1 - abar) z0 for "v"; of z0's shape.

    Raises:
        ValueError: for an unknown parameterization.
    """
    _check_known(parameterization)
    if parameterization == "eps":
        return noise
    if parameterization == "x0":
        return z0
    signal, sigma = schedule.levels(t, like=z0)
    return signal * noise - sigma * z0


def to_eps(
    parameterization: Parameterization, schedule: NoiseSchedule, prediction: Tensor, z_t: Tensor, t: Tensor
) -> Tensor:
    """The noise that a prediction at (z_t, t) implies, of z_t's shape. Raises ValueError as `target`."""
    _check_known(parameterization)
    if parameterization == "eps":
        return prediction
    signal, sigma = schedule.levels(t, like=z_t)
    if parameterization == "x0":
        return (z_t - signal * prediction) / sigma
    return signal * prediction + sigma * z_t


def to_x0(
    parameterization: Parameterization, schedule: NoiseSchedule, prediction: Tensor, z_t: Tensor, t: Tensor
) -> Tensor:
    """The clean latent that a prediction at (z_t, t) implies, of z_t's shape. Raises ValueError as `target`."""
    _check_known(parameterization)
    if parameterization == "x0":
        return prediction
    signal, sigma = schedule.levels(t, like=z_t)
    if parameterization == "eps":
        return (z_t - sigma * prediction) / signal
    return signal * z_t - sigma * prediction


def to_prediction(
    parameterization: Parameterization, schedule: NoiseSchedule, prediction: Tensor, z_t: Tensor, t: Tensor
) -> Prediction:
    """Noise and clean latent that a prediction at (z_t, t) implies, each of z_t's shape.

    What a denoiser gives to samplers where the noise alone is not enough: at the last timestep of a zero-terminal-SNR
    schedule z_t is all noise, and only v and x0 say something about the clean latent.

    Raises:
        ValueError: for "eps" with such a schedule.
    """
    check_parameterization(parameterization, "l2", zero_terminal_snr=schedule.config.zero_terminal_snr)
    return Prediction(
        to_eps(parameterization, schedule, prediction, z_t, t), to_x0(parameterization, schedule, prediction, z_t, t)
    )


def vlb_weights(parameterization: Parameterization, schedule: NoiseSchedule) -> Tensor:
    """What the squared error at each timestep weighs in the variational bound, (T,) float32 (appendix B).

    For the posterior's variance, KL(q(z_{t-1} | z_t, z_0) || p(z_{t-1} | z_t)) is half of the squared distance of the
    means over that variance (Ho et al. 2020, Eq. 8 and 12). For "eps" these are the code release's `lvlb_weights`,
    beta^2 / (2 posterior_variance alpha (1 - abar)); "x0" and "v" weigh the same error of their own quantity
    alike (the release's expression for x0 is not that, and no published model uses it). The first timestep's
    variance is zero; as in the release it takes the second one's weight.
    """
    abar = torch.tensor([schedule.alpha_bar(t) for t in range(schedule.timesteps)], dtype=torch.float64, device="cpu")
    previous = torch.cat([abar.new_ones(1), abar[:-1]])
    beta = 1.0 - abar / previous
    posterior_variance = beta * (1.0 - previous) / (1.0 - abar)
    # The coefficient of z_0 in the posterior's mean, squared (Ho et al. 2020, Eq. 7).
    of_x0 = previous * beta.square() / (1.0 - abar).square() / (2.0 * posterior_variance)
    # The squared error of x0 that goes with one of the predicted quantity.
    x0_error = {"x0": torch.ones_like(abar), "v": 1.0 - abar, "eps": (1.0 - abar) / abar}
    weights = of_x0 * x0_error[parameterization]
    weights[0] = weights[1]
    return weights.float().to(schedule.betas.device)


class DiffusionObjective:
    """The reweighted denoising objective L_LDM of Eq. (2), conditional as Eq. (3).

    Args:
        schedule: forward process.
        parameterization: what the network predicts.
        loss: "l2" (the paper's Eq. 2) or "l1" (several of its released models).
        min_snr_gamma: clip of the signal-to-noise ratio in the loss weight; None leaves the paper's unit
            weight.
        vlb_weight: share of the variational bound added to it, `original_elbo_weight` in the code release, whose
            models all train with 0; see `vlb_weights`.

    Raises:
        ValueError: for an unknown parameterization or loss, gamma <= 0, a negative or infinite vlb_weight, or eps
            with a zero-terminal-SNR schedule.
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        *,
        parameterization: Parameterization = "eps",
        loss: LossKind = "l2",
        min_snr_gamma: float | None = None,
        vlb_weight: float = 0.0,
    ) -> None:
        check_parameterization(parameterization, loss, zero_terminal_snr=schedule.config.zero_terminal_snr)
        if min_snr_gamma is not None and not min_snr_gamma > 0:
            raise ValueError(f"min_snr_gamma must be positive or None, got {min_snr_gamma}")
        if not 0.0 <= vlb_weight < math.inf:
            raise ValueError(f"vlb_weight must be a finite number of at least 0, got {vlb_weight}")
        self.schedule = schedule
        self.parameterization = parameterization
        self.loss_kind = loss
        self.min_snr_gamma = min_snr_gamma
        self.vlb_weights = vlb_weight * vlb_weights(parameterization, schedule) if vlb_weight else None

    def loss(self, predict: Callable[[Tensor, Tensor], Tensor], z0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Loss of every sample; the mean over the batch is the caller's.

        Args:
            predict: the network, (z_t, t) -> prediction; its conditioning is bound by the caller.
            z0: (B, ...) clean latents.
            t: (B,) integer timesteps.
            noise: standard normal noise of z0's shape.

        Returns:
            (B,) float32 losses, each the mean over a sample's elements.

        Raises:
            ValueError: when shapes do not agree.
        """
        z_t = self.schedule.add_noise(z0, noise, t)
        prediction = predict(z_t, t)
        if prediction.shape != z0.shape:
            raise ValueError(
                "the prediction must have the latent's shape, "
                f"got {tuple(prediction.shape)} for {tuple(z0.shape)}: check the network's out_channels"
            )
        # float32 whatever the autocast: thousands of small squares are summed.
        error = prediction.float() - target(self.parameterization, self.schedule, z0, noise, t).float()
        elementwise = error.square() if self.loss_kind == "l2" else error.abs()
        return elementwise.flatten(1).mean(dim=1) * self._weight(t)

    def _weight(self, t: Tensor) -> Tensor | float:
        """What a sample's error at its timestep weighs."""
        weight = 1.0 if self.min_snr_gamma is None else self._min_snr_weight(t, self.min_snr_gamma)
        return weight if self.vlb_weights is None else weight + self.vlb_weights.to(t.device)[t]

    def _min_snr_weight(self, t: Tensor, gamma: float) -> Tensor:
        """Min-SNR-gamma weights (Hang et al. 2023, Sec. 3.4), expressed on the predicted quantity."""
        snr = self.schedule.snr(t)
        clipped = snr.clamp(max=gamma)
        if self.parameterization == "x0":
            return clipped
        return clipped / snr if self.parameterization == "eps" else clipped / (snr + 1.0)
