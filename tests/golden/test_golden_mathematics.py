"""ldm_core computes what the papers and the release say, by golden values made without it; see `mathematics`."""

import itertools
import json
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from ldm_core import samplers
from ldm_core.configs.objective import LossKind, Parameterization
from ldm_core.configs.schedule import ScheduleConfig
from ldm_core.objective import DiffusionObjective
from ldm_core.schedule import NoiseSchedule
from tests.golden import mathematics
from tests.golden.mathematics import SLOPE_T, SLOPE_X

GOLDEN: dict[str, Any] = json.loads(mathematics.GOLDEN.read_text(encoding="utf-8"))


def schedule_of(name: str) -> NoiseSchedule:
    kind, start, end, zero_terminal_snr = mathematics.SCHEDULES[name]
    config: dict[str, Any] = {"kind": kind, "beta_start": start, "beta_end": end}
    return NoiseSchedule(ScheduleConfig(**config, zero_terminal_snr=zero_terminal_snr))


def network(x: Tensor, t: Tensor) -> Tensor:
    return torch.tanh(SLOPE_X * x + SLOPE_T * t.double().view(-1, *[1] * (x.ndim - 1)))


def test_the_script_gives_the_numbers_of_the_file() -> None:
    again, kept = mathematics.flat(mathematics.golden()), mathematics.flat(GOLDEN)
    assert again.keys() == kept.keys()
    # Logarithms and tangents of other libraries differ in their last digit.
    np.testing.assert_allclose(list(again.values()), list(kept.values()), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("name", mathematics.SCHEDULES)
def test_schedules_have_their_published_values(name: str) -> None:
    schedule, wanted = schedule_of(name), GOLDEN["schedules"][name]
    shown = list(mathematics.SHOWN_TIMESTEPS)
    abar = [schedule.alpha_bar(t) for t in shown]
    np.testing.assert_allclose(abar, wanted["alphas_cumprod"], rtol=1e-10, atol=1e-15)
    np.testing.assert_allclose(schedule.betas[shown].tolist(), wanted["betas"], rtol=1e-6)
    np.testing.assert_allclose(schedule.alphas_cumprod[shown].tolist(), wanted["alphas_cumprod"], rtol=1e-6)


@pytest.mark.parametrize("weighting", ["simple", "min_snr", "vlb"])
@pytest.mark.parametrize("kind", get_args(LossKind))
@pytest.mark.parametrize("parameterization", ["eps", "v", "x0"])
def test_losses_have_their_published_values(parameterization: Parameterization, kind: LossKind, weighting: str) -> None:
    weights: dict[str, Any] = {
        "simple": {},
        "min_snr": {"min_snr_gamma": mathematics.MIN_SNR_GAMMA},
        "vlb": {"vlb_weight": mathematics.VLB_WEIGHT},
    }
    objective = DiffusionObjective(
        schedule_of("release"), parameterization=parameterization, loss=kind, **weights[weighting]
    )
    z0, noise = (torch.from_numpy(each) for each in mathematics.loss_batch())
    t = torch.tensor(mathematics.LOSS_TIMESTEPS)
    found = objective.loss(network, z0=z0, noise=noise, t=t)
    np.testing.assert_allclose(found.tolist(), GOLDEN["losses"][f"{parameterization} {kind} {weighting}"], rtol=2e-6)


@pytest.mark.parametrize("num_steps", mathematics.NUM_STEPS)
@pytest.mark.parametrize("sampler", ["ddim, eta 0", "ddim, eta 1", "plms"])
def test_trajectories_are_the_published_ones(sampler: str, num_steps: int) -> None:
    wanted = GOLDEN["trajectories"][f"{sampler} {num_steps}"]
    timesteps: list[int] = []
    inputs: list[list[float]] = []

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        timesteps.append(int(t[0]))
        inputs.append(x[0].tolist())
        return network(x, t)

    steps = itertools.count()
    options: dict[str, Any] = {
        "ddim, eta 0": {},
        "ddim, eta 1": {"eta": 1.0, "noise": lambda: torch.from_numpy(mathematics.step_noise(next(steps)))[None]},
        "plms": {},
    }[sampler]
    run = samplers.plms if sampler == "plms" else samplers.ddim
    start = torch.tensor([mathematics.X_START], dtype=torch.float64)
    end = run(denoise, start, schedule_of("release"), num_steps=num_steps, **options)
    assert timesteps == wanted["timesteps"]
    np.testing.assert_allclose(inputs, wanted["inputs"], rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(end[0].tolist(), wanted["end"], rtol=1e-9, atol=1e-11)
