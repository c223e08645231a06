"""Golden values of schedules, losses and sampling trajectories, computed without ldm_core.

Everything is float64 and numpy, written from the formulas of the papers and from what the paper's code release says of
itself (its configurations, the order in which its samplers visit timesteps); a different way to the same number is
taken wherever there is one, so that an error in ldm_core is not repeated here:

schedules   beta: the release's "linear" is linear in sqrt(beta), Ho et al. 2020 is linear in beta, Nichol & Dhariwal
            2021 is a cosine in abar (Eq. 17, betas at most 0.999). abar: the running product. Zero terminal SNR: Lin et
            al. 2024, Algorithm 1, on sqrt(abar).
losses      targets: noise, v (Salimans & Ho 2022, appendix D) and x0 at z_t = sqrt(abar) z_0 + sqrt(1 - abar) noise.
            min-SNR-5: Hang et al. 2023, min(SNR, 5) on the error of x0, that is over SNR for eps, over SNR + 1 for v.
            Variational bound: (SNR(t - 1) - SNR(t)) / 2 on the squared error of x0 (Kingma et al. 2021, Eq. 14), with
            the second timestep's for the first, as in the release; added with a factor of 1e-3.
grids       the release's "uniform" steps, range(0, T, T // n) + 1: 50 of them for n = 50, 31 for n = 30.
ddim        Song et al. 2021, Eq. (12) and (16), down to the abar of timestep 0 (the release's alphas_prev); eta 0, and
            eta 1 with noise that a formula gives.
plms        Liu et al. 2022: Eq. (11) to move between noise levels; the first step is the improved Euler step, the next
            two are of lower order, as in the release (their appendix, and Eq. 12).

The "network" is eps = tanh(a x + b t), which is smooth, nonlinear and depends on both. Rewrite the file with

    python -m tests.golden.mathematics
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

GOLDEN = Path(__file__).with_name("golden_mathematics.json")

Array = NDArray[np.float64]

T = 1000
# kind, beta_start, beta_end, zero_terminal_snr
SCHEDULES: dict[str, tuple[str, float, float, bool]] = {
    "release": ("scaled_linear", 0.00085, 0.012, False),
    "release, zero terminal SNR": ("scaled_linear", 0.00085, 0.012, True),
    "release, betas of its unconditional models": ("scaled_linear", 0.0015, 0.0195, False),
    "ho": ("linear", 1e-4, 0.02, False),
    "cosine": ("cosine", 1e-4, 0.02, False),
}
SHOWN_TIMESTEPS = (0, 1, 2, 10, 100, 250, 500, 750, 900, 990, 998, 999)

SLOPE_X, SLOPE_T = 0.7, 0.001
LOSS_TIMESTEPS = (0, 1, 400, 999)
MIN_SNR_GAMMA, VLB_WEIGHT = 5.0, 1e-3

X_START = (0.9, -1.7)
NUM_STEPS = (50, 30)


def network(x: Array, t: float | Array) -> Array:
    """Return tanh(a x + b t), the stand-in for a network."""
    answer: Array = np.tanh(SLOPE_X * x + SLOPE_T * t)
    return answer


def betas_and_alpha_bars(kind: str, start: float, end: float, zero_terminal_snr: bool) -> tuple[Array, Array]:
    """Return beta_t and abar_t of all timesteps."""
    share = np.arange(T) / (T - 1)
    if kind == "scaled_linear":
        betas = ((1 - share) * np.sqrt(start) + share * np.sqrt(end)) ** 2
    elif kind == "linear":
        betas = (1 - share) * start + share * end
    else:
        level = [np.cos((i / T + 0.008) / 1.008 * np.pi / 2) ** 2 for i in range(T + 1)]
        betas = np.array([min(1 - level[i + 1] / level[i], 0.999) for i in range(T)])
    abar = np.exp(np.cumsum(np.log1p(-betas)))
    if zero_terminal_snr:
        # Algorithm 1: shift so that the last is zero, scale so that the first is as it was.
        root = np.sqrt(abar)
        root = (root - root[-1]) * root[0] / (root[0] - root[-1])
        abar = root**2
        betas = 1 - abar / np.concatenate([[1.0], abar[:-1]])
    return betas, abar


def loss_batch() -> tuple[Array, Array]:
    """Return z_0 and noise, a row of three numbers for each of LOSS_TIMESTEPS."""
    index = np.arange(3.0 * len(LOSS_TIMESTEPS)).reshape(len(LOSS_TIMESTEPS), 3)
    return np.sin(1.0 + 2.0 * index), 1.5 * np.cos(3.0 * index)


def losses(parameterization: str, kind: str, weighting: str) -> list[float]:
    """Return the loss of each sample of `loss_batch` under the release's schedule."""
    _, abar = betas_and_alpha_bars(*SCHEDULES["release"])
    z0, noise = loss_batch()
    found = []
    for clean, eps, t in zip(z0, noise, LOSS_TIMESTEPS, strict=True):
        signal, sigma = np.sqrt(abar[t]), np.sqrt(1 - abar[t])
        wanted = {"eps": eps, "x0": clean, "v": signal * eps - sigma * clean}[parameterization]
        error = network(signal * clean + sigma * eps, t) - wanted
        # An error of x0 is this many times the error of what is predicted, squared.
        of_x0 = {"x0": 1.0, "eps": sigma**2 / signal**2, "v": sigma**2}[parameterization]
        weight = 1.0
        if weighting == "min_snr":
            weight = min(_snr(abar, t), MIN_SNR_GAMMA) * of_x0
        elif weighting == "vlb":
            after = max(t, 1)
            share = {"x0": 1.0, "eps": 1 / _snr(abar, after), "v": 1 - abar[after]}[parameterization]
            weight = 1.0 + VLB_WEIGHT * (_snr(abar, after - 1) - _snr(abar, after)) / 2 * share
        found.append(float(weight * np.mean(error**2 if kind == "l2" else np.abs(error))))
    return found


def _snr(abar: Array, t: int) -> float:
    return float(abar[t] / (1 - abar[t]))


def grid(num_steps: int) -> list[int]:
    """Return the timesteps that the release visits, highest first."""
    return sorted((each + 1 for each in range(0, T, T // num_steps)), reverse=True)


def step_noise(step: int) -> Array:
    """Return the noise that DDIM adds in a step with eta 1."""
    return np.sqrt(2.0) * np.sin(12.9898 * (step + 1) + 78.233 * np.arange(1.0, 1.0 + len(X_START)))


class Calls:
    """The network, which writes down what it was asked."""

    def __init__(self) -> None:
        self.timesteps: list[int] = []
        self.inputs: list[list[float]] = []

    def __call__(self, x: Array, t: int) -> Array:
        self.timesteps.append(t)
        self.inputs.append(x.tolist())
        return network(x, t)


def ddim(num_steps: int, eta: float) -> dict[str, Any]:
    """Return every call of the network, and the end."""
    _, abar = betas_and_alpha_bars(*SCHEDULES["release"])
    calls, x, visited = Calls(), np.array(X_START), grid(num_steps)
    for step, (t, following) in enumerate(zip(visited, [*visited[1:], 0], strict=True)):
        eps = calls(x, t)
        x0 = (x - np.sqrt(1 - abar[t]) * eps) / np.sqrt(abar[t])
        sigma = eta * np.sqrt((1 - abar[following]) / (1 - abar[t])) * np.sqrt(1 - abar[t] / abar[following])
        direction = np.sqrt(1 - abar[following] - sigma**2) * eps
        x = np.sqrt(abar[following]) * x0 + direction + sigma * step_noise(step)
    return {"timesteps": calls.timesteps, "inputs": calls.inputs, "end": x.tolist()}


def plms(num_steps: int) -> dict[str, Any]:
    """Return every call of the network, and the end."""
    _, abar = betas_and_alpha_bars(*SCHEDULES["release"])
    calls, x, visited = Calls(), np.array(X_START), grid(num_steps)
    past: list[Array] = []
    rules = {1: (3 / 2, -1 / 2), 2: (23 / 12, -16 / 12, 5 / 12), 3: (55 / 24, -59 / 24, 37 / 24, -9 / 24)}
    for t, following in zip(visited, [*visited[1:], 0], strict=True):
        now = calls(x, t)
        if past:
            newest_first = [now, *reversed(past[-3:])]
            eps = sum(weight * each for weight, each in zip(rules[len(newest_first) - 1], newest_first, strict=True))
        else:
            eps = (now + calls(_moved(x, now, abar[t], abar[following]), following)) / 2
        past.append(now)
        x = _moved(x, eps, abar[t], abar[following])
    return {"timesteps": calls.timesteps, "inputs": calls.inputs, "end": x.tolist()}


def _moved(x: Array, eps: Any, abar: float, abar_next: float) -> Array:
    """Return phi of Liu et al. 2022, Eq. (11): x at another noise level, by its increment."""
    of_x = x / (np.sqrt(abar) * (np.sqrt(abar_next) + np.sqrt(abar)))
    of_eps = eps / (np.sqrt(abar) * (np.sqrt((1 - abar_next) * abar) + np.sqrt((1 - abar) * abar_next)))
    moved: Array = x + (abar_next - abar) * (of_x - of_eps)
    return moved


def golden() -> dict[str, Any]:
    """Return all golden values."""
    schedules = {}
    for name, setting in SCHEDULES.items():
        betas, abar = betas_and_alpha_bars(*setting)
        shown = list(SHOWN_TIMESTEPS)
        schedules[name] = {"betas": betas[shown].tolist(), "alphas_cumprod": abar[shown].tolist()}
    return {
        "schedules": schedules,
        "losses": {
            f"{parameterization} {kind} {weighting}": losses(parameterization, kind, weighting)
            for parameterization in ("eps", "v", "x0")
            for kind in ("l1", "l2")
            for weighting in ("simple", "min_snr", "vlb")
        },
        "trajectories": {
            f"{name} {num_steps}": run(num_steps) for num_steps in NUM_STEPS for name, run in _SAMPLERS.items()
        },
    }


_SAMPLERS: dict[str, Callable[[int], dict[str, Any]]] = {
    "ddim, eta 0": lambda num_steps: ddim(num_steps, 0.0),
    "ddim, eta 1": lambda num_steps: ddim(num_steps, 1.0),
    "plms": plms,
}


def flat(values: Any, place: str = "") -> dict[str, float]:
    """Return every number of nested containers by its place."""
    if isinstance(values, dict):
        items: Sequence[tuple[Any, Any]] = list(values.items())
    elif isinstance(values, list):
        items = list(enumerate(values))
    else:
        return {place: values}
    return {inner: number for key, value in items for inner, number in flat(value, f"{place}/{key}").items()}


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(golden(), indent=1) + "\n", encoding="utf-8")
