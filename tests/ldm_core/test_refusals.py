"""What would give a wrong number in silence is refused, and says so."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ldm_core import checkpoint, load, objective, presets
from ldm_core.configs.first_stage import FirstStageConfig
from ldm_core.configs.model import LatentDiffusionConfig
from ldm_core.configs.schedule import ScheduleConfig
from ldm_core.ema import EMA
from ldm_core.networks.posterior import DiagonalGaussian
from ldm_core.schedule import NoiseSchedule

SCHEDULE = NoiseSchedule(ScheduleConfig())
Z = torch.zeros(1, 4, 8, 8)


def noised(t: object, z0: torch.Tensor = Z) -> torch.Tensor:
    return SCHEDULE.add_noise(z0, Z, torch.tensor([t]))


REFUSED: dict[str, Callable[[], object]] = {
    r"timesteps must be in 0 \.\.\. 999, got -1": lambda: noised(-1),
    r"timesteps must be in 0 \.\.\. 999, got 1000": lambda: noised(1000),
    r"latents must be floating point, got torch\.int64": lambda: noised(0, Z.long()),
    "must be eps, v, x0 or flow, got 'epsilon'": lambda: objective.to_eps("epsilon", SCHEDULE, Z, Z, torch.tensor([1])),  # type: ignore[arg-type]
    "must be eps, v, x0 or flow, got 'sample'": lambda: objective.target("sample", SCHEDULE, Z, Z, torch.tensor([1])),  # type: ignore[arg-type]
    "min_snr_gamma gives the last timestep of a zero_terminal_snr schedule no weight": lambda: (
        objective.DiffusionObjective(
            NoiseSchedule(ScheduleConfig(zero_terminal_snr=True)), parameterization="v", min_snr_gamma=5.0
        )
    ),
    "min_snr_gamma must be positive": lambda: objective.DiffusionObjective(SCHEDULE, min_snr_gamma=float("nan")),
    "this module has none": lambda: EMA(nn.Identity()),
    r"moments must be \(B, 2, C, h, w\)": lambda: DiagonalGaussian.from_moments(torch.zeros(1, 1, 4, 8, 8)),
    r"must be sizes of feature maps, \[256, 128, 64\], got \[17\]": lambda: FirstStageConfig(
        regularization="kl",
        base_channels=32,
        channel_mult=(1, 1, 1),
        z_channels=3,
        embed_dim=3,
        attention_resolutions=(17,),
    ),
    "model config must set scale_factor, got null": lambda: LatentDiffusionConfig.from_dict(
        presets.get("tiny-uncond").to_dict() | {"scale_factor": None}
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_it_is_refused(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        REFUSED[message]()


def test_an_average_does_not_follow_weights_that_were_assigned_anew() -> None:
    network = nn.Linear(2, 2)
    ema = EMA(network)
    network.load_state_dict({name: value.clone() for name, value in network.state_dict().items()}, assign=True)
    with pytest.raises(ValueError, match="make a new EMA after assigning weights"):
        ema.update()


def test_weights_that_are_not_numbers_do_not_load(tmp_path: Path) -> None:
    checkpoint.save(presets.get("tiny-uncond").build(), tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["unet.conv_in.bias"][0] = torch.nan
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"1 of \d+ tensors hold NaN or infinity \(unet\.conv_in\.bias\)"):
        load(tmp_path)
