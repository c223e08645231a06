"""The training objective: what the network predicts, and the loss on it, Eq. (1) to (3) of the paper.

The network is a function (z_t, t) -> prediction of z_t's shape and knows none of this.
Shapes: z0, z_t, noise, prediction: (B, ...); t: (B,) timesteps.
Source: Eq. (1)-(3) and appendix B of the paper; v: Salimans & Ho 2022; flow: Liu et al. 2023; min-SNR-gamma: Hang et
al. 2023.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ldm_core.configs.objective import (
    LossKind,
    Parameterization,
    TimestepsConfig,
    check_objective,
    check_parameterization_name,
)
from ldm_core.schedule import NoiseSchedule
from ldm_core.timesteps import draw_timesteps


class Prediction(NamedTuple):
    """Both halves of z_t = signal x0 + sigma eps: the predicted noise and the predicted clean latent."""

    eps: Tensor
    x0: Tensor


def target(parameterization: Parameterization, schedule: NoiseSchedule, z0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Return what the network should answer at z_t = schedule.add_noise(z0, noise, t).

    Returns:
        noise for "eps", z0 for "x0", signal noise - sigma z0 for "v", noise - z0 for "flow"; of z0's shape.

    Raises:
        ValueError: for an unknown parameterization.
    """
    check_parameterization_name(parameterization)
    if parameterization == "eps":
        return noise
    if parameterization == "x0":
        return z0
    if parameterization == "flow":
        return noise - z0
    signal, sigma = schedule.levels(t, like=z0)
    return signal * noise - sigma * z0


def to_eps(
    parameterization: Parameterization, schedule: NoiseSchedule, prediction: Tensor, z_t: Tensor, t: Tensor
) -> Tensor:
    """Return the noise that a prediction at (z_t, t) implies, of z_t's shape. Raises ValueError as `target` does."""
    check_parameterization_name(parameterization)
    if parameterization == "eps":
        return prediction
    signal, sigma = schedule.levels(t, like=z_t)
    if parameterization == "x0":
        return (z_t - signal * prediction) / sigma
    if parameterization == "flow":
        # Put z0 = eps - flow into z_t = signal z0 + sigma eps, with signal + sigma = 1.
        return z_t + signal * prediction
    # v: put z0 = signal z_t - sigma v into the line above, with signal^2 + sigma^2 = 1.
    return signal * prediction + sigma * z_t


def to_x0(
    parameterization: Parameterization, schedule: NoiseSchedule, prediction: Tensor, z_t: Tensor, t: Tensor
) -> Tensor:
    """Return the clean latent that a prediction at (z_t, t) implies. Raises ValueError as `target` does."""
    check_parameterization_name(parameterization)
    if parameterization == "x0":
        return prediction
    signal, sigma = schedule.levels(t, like=z_t)
    if parameterization == "eps":
        return (z_t - sigma * prediction) / signal
    if parameterization == "flow":
        return z_t - sigma * prediction
    return signal * z_t - sigma * prediction


def to_prediction(
    parameterization: Parameterization, schedule: NoiseSchedule, prediction: Tensor, z_t: Tensor, t: Tensor
) -> Prediction:
    """Return noise and clean latent that a prediction at (z_t, t) implies, each of z_t's shape.

    Denoisers return it to samplers if the noise alone is not enough: at the last timestep of a rectified flow or of a
    zero-terminal-SNR schedule z_t is all noise, and only flow, v and x0 tell something about the clean latent.

    Raises:
        ValueError: for a parameterization that the schedule does not have, or "eps" with such a schedule.
    """
    check_objective(schedule.config, parameterization=parameterization)
    return Prediction(
        to_eps(parameterization, schedule, prediction, z_t, t), to_x0(parameterization, schedule, prediction, z_t, t)
    )


def vlb_weights(parameterization: Parameterization, schedule: NoiseSchedule) -> Tensor:
    """Return the weight of the squared error at each timestep in the variational bound, (T,) float32 (appendix B).

    If the reverse process has the posterior's variance, KL(q(z_{t-1} | z_t, z_0) || p(z_{t-1} | z_t)) is the squared
    distance of the means over twice that variance (Ho et al. 2020, Eq. 8 and 12).

    For "eps" the weights are the code release's `lvlb_weights`, beta^2 / (2 posterior_variance alpha (1 - abar)). For
    "x0" and "v" they give the same bound from the error of that quantity; the release's expression for x0 does not,
    and no published model uses it. The first timestep's variance is zero, and as in the release it takes the second
    one's weight.
    """
    abar = torch.tensor([schedule.alpha_bar(t) for t in range(schedule.timesteps)], dtype=torch.float64, device="cpu")
    previous = torch.cat([abar.new_ones(1), abar[:-1]])
    beta = 1.0 - abar / previous
    posterior_variance = beta * (1.0 - previous) / (1.0 - abar)
    # The coefficient of z_0 in the posterior's mean, squared (Ho et al. 2020, Eq. 7).
    of_x0 = previous * beta.square() / (1.0 - abar).square() / (2.0 * posterior_variance)
    # The squared error of x0 that a unit error of the predicted quantity implies: the slopes in `to_x0`, squared.
    x0_error = {"x0": torch.ones_like(abar), "v": 1.0 - abar, "eps": (1.0 - abar) / abar}
    weights = of_x0 * x0_error[parameterization]
    weights[0] = weights[1]
    return weights.float().to(schedule.betas.device)


class DiffusionObjective:
    """The reweighted denoising objective L_LDM of Eq. (2), conditional as Eq. (3), or flow matching.

    Args:
        schedule: forward process.
        parameterization: the quantity that the network predicts, "eps", "v" or "x0"; with a rectified flow its
            velocity "flow", or "x0".
        loss: "l2" (the paper's Eq. 2) or "l1" (several of its released models).
        min_snr_gamma: upper limit of the signal-to-noise ratio in the loss weight; None keeps the paper's unit weight.
        vlb_weight: factor of the variational bound that is added, `original_elbo_weight` in the code release, whose
            models are all trained with 0; see `vlb_weights`.
        timesteps: distribution that `timesteps` draws from.

    Raises:
        ValueError: for an unknown parameterization or loss, gamma <= 0, a negative or infinite vlb_weight, or what the
            schedule does not have: see `configs.objective.check_objective`.
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        *,
        parameterization: Parameterization = "eps",
        loss: LossKind = "l2",
        min_snr_gamma: float | None = None,
        vlb_weight: float = 0.0,
        timesteps: TimestepsConfig = TimestepsConfig(),  # noqa: B008 (frozen)
    ) -> None:
        check_objective(
            schedule.config,
            parameterization=parameterization,
            loss=loss,
            min_snr_gamma=min_snr_gamma,
            vlb_weight=vlb_weight,
        )
        self.schedule = schedule
        self.timesteps_config = timesteps
        self.parameterization = parameterization
        self.loss_kind = loss
        self.min_snr_gamma = min_snr_gamma
        self.vlb_weights = vlb_weight * vlb_weights(parameterization, schedule) if vlb_weight else None

    def timesteps(self, uniform: Tensor) -> Tensor:
        """Return the timesteps that uniformly distributed random numbers stand for.

        Args:
            uniform: (B,) numbers in [0, 1), of any source: whoever draws them again gets the same timesteps.

        Returns:
            (B,) timesteps: int64 of a chain, float32 of a rectified flow; on uniform's device.

        Raises:
            ValueError: for numbers outside [0, 1).
        """
        drawn = draw_timesteps(uniform.double().cpu().numpy(), self.schedule.config, self.timesteps_config)
        return torch.from_numpy(drawn).to(uniform.device)

    def loss(self, predict: Callable[[Tensor, Tensor], Tensor], z0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return the loss of each sample; the caller takes the mean over the batch.

        Args:
            predict: the network, (z_t, t) -> prediction, with its conditioning bound by the caller.
            z0: (B, ...) clean latents.
            noise: standard normal noise of z0's shape.
            t: (B,) timesteps.

        Returns:
            (B,) float32 losses, each the mean over a sample's elements.

        Raises:
            ValueError: if shapes do not agree.
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
        """Return the weight of each sample's error, (B,) or one number for all."""
        weight = 1.0 if self.min_snr_gamma is None else self._min_snr_weight(t, self.min_snr_gamma)
        return weight if self.vlb_weights is None else weight + self.vlb_weights.to(t.device)[t]

    def _min_snr_weight(self, t: Tensor, gamma: float) -> Tensor:
        """Return the min-SNR-gamma weights (Hang et al. 2023, Sec. 3.4), converted to the predicted quantity."""
        snr = self.schedule.snr(t)
        clipped = snr.clamp(max=gamma)
        # They weigh the error of x0. An error of eps is that of x0 times sqrt(snr), one of v times sqrt(snr + 1).
        if self.parameterization == "x0":
            return clipped
        return clipped / snr if self.parameterization == "eps" else clipped / (snr + 1.0)
