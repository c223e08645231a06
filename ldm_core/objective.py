"""What the network is trained to predict, and the loss on it.

The network is a function (z_t, t) -> prediction of z_t's shape and knows none of this.
Shapes: z0, z_t, noise, prediction: (B, ...); t: (B,) integers.
Source: Eq. (1)-(3) and appendix B of the paper; v: Salimans & Ho 2022; min-SNR-gamma: Hang et al. 2023.
"""

from collections.abc import Callable
from typing import Literal

from torch import Tensor

from ldm_core.schedule import NoiseSchedule

Parameterization = Literal["eps", "v", "x0"]
LossKind = Literal["l1", "l2"]
PARAMETERIZATIONS: tuple[Parameterization, ...] = ("eps", "v", "x0")


def target(parameterization: Parameterization, schedule: NoiseSchedule, z0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """What the network should answer at z_t = schedule.add_noise(z0, noise, t).

    Returns:
        noise for "eps", z0 for "x0", sqrt(abar) noise - sqrt(1 - abar) z0 for "v"; of z0's shape.
    """
    if parameterization == "eps":
        return noise
    if parameterization == "x0":
        return z0
    signal, sigma = schedule.levels(t, like=z0)
    return signal * noise - sigma * z0


def to_eps(
    parameterization: Parameterization, schedule: NoiseSchedule, prediction: Tensor, z_t: Tensor, t: Tensor
) -> Tensor:
    """The noise that a prediction at (z_t, t) implies, of z_t's shape."""
    if parameterization == "eps":
        return prediction
    signal, sigma = schedule.levels(t, like=z_t)
    if parameterization == "x0":
        return (z_t - signal * prediction) / sigma
    return signal * prediction + sigma * z_t


def to_x0(
    parameterization: Parameterization, schedule: NoiseSchedule, prediction: Tensor, z_t: Tensor, t: Tensor
) -> Tensor:
    """The clean latent that a prediction at (z_t, t) implies, of z_t's shape."""
    if parameterization == "x0":
        return prediction
    signal, sigma = schedule.levels(t, like=z_t)
    if parameterization == "eps":
        return (z_t - sigma * prediction) / signal
    return signal * z_t - sigma * prediction


def check_parameterization(parameterization: str, loss: str, *, zero_terminal_snr: bool) -> None:
    """Raise ValueError for an unknown choice, or one that cannot learn at the schedule's last timestep."""
    if parameterization not in PARAMETERIZATIONS:
        raise ValueError(f"parameterization must be eps, v or x0, got {parameterization!r}")
    if loss not in ("l1", "l2"):
        raise ValueError(f"loss must be l1 or l2, got {loss!r}")
    if parameterization == "eps" and zero_terminal_snr:
        raise ValueError("with zero_terminal_snr the last timestep teaches eps nothing: use parameterization v or x0")


class DiffusionObjective:
    """The reweighted denoising objective L_LDM of Eq. (2), conditional as Eq. (3).

    Args:
        schedule: forward process.
        parameterization: what the network predicts.
        loss: "l2" (the paper's Eq. 2) or "l1" (several of its released models).
        min_snr_gamma: clip of the signal-to-noise ratio in the loss weight; None leaves the paper's unit
            weight.

    Raises:
        ValueError: for an unknown parameterization or loss, gamma <= 0, or eps with a zero-terminal-SNR
            schedule.
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        *,
        parameterization: Parameterization = "eps",
        loss: LossKind = "l2",
        min_snr_gamma: float | None = None,
    ) -> None:
        check_parameterization(parameterization, loss, zero_terminal_snr=schedule.config.zero_terminal_snr)
        if min_snr_gamma is not None and min_snr_gamma <= 0:
            raise ValueError(f"min_snr_gamma must be positive or None, got {min_snr_gamma}")
        self.schedule = schedule
        self.parameterization = parameterization
        self.loss_kind = loss
        self.min_snr_gamma = min_snr_gamma

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
        """Min-SNR-gamma weights (Hang et al. 2023, Sec. 3.4), expressed on the predicted quantity."""
        if self.min_snr_gamma is None:
            return 1.0
        snr = self.schedule.snr(t)
        clipped = snr.clamp(max=self.min_snr_gamma)
        if self.parameterization == "x0":
            return clipped
        return clipped / snr if self.parameterization == "eps" else clipped / (snr + 1.0)
