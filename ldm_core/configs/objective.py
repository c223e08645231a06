"""Names of parameterizations and losses (paper, Sec. 3.2), checked without torch."""

from typing import Literal

Parameterization = Literal["eps", "v", "x0"]

LossKind = Literal["l1", "l2"]

PARAMETERIZATIONS: tuple[Parameterization, ...] = ("eps", "v", "x0")


def check_parameterization(parameterization: str, loss: str, *, zero_terminal_snr: bool) -> None:
    """Raise ValueError for an unknown choice, or one that cannot learn at the schedule's last timestep."""
    check_parameterization_name(parameterization)
    if loss not in ("l1", "l2"):
        raise ValueError(f"loss must be l1 or l2, got {loss!r}")
    if parameterization == "eps" and zero_terminal_snr:
        raise ValueError("with zero_terminal_snr the last timestep teaches eps nothing: use parameterization v or x0")


def check_parameterization_name(parameterization: str) -> None:
    """Raise ValueError for a parameterization that does not exist."""
    if parameterization not in PARAMETERIZATIONS:
        raise ValueError(f"parameterization must be eps, v or x0, got {parameterization!r}")
