"""Samplers against diffusers' schedulers: from the same noise they end at the same latent."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from ldm_core import samplers
from ldm_core.configs.schedule import ScheduleConfig
from ldm_core.objective import to_prediction
from ldm_core.samplers import Prediction, Spacing
from ldm_core.schedule import NoiseSchedule

SCHEDULE = NoiseSchedule(ScheduleConfig())
BETAS: dict[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


@pytest.fixture
def denoise() -> samplers.Denoise:
    """Return a fixed nonlinear stand-in for a network, bounded like the noise that it predicts."""
    kernel = torch.randn(4, 4, 3, 3, generator=torch.Generator().manual_seed(1)) / 6

    def predict(x: Tensor, t: Tensor) -> Tensor:
        hidden = torch.nn.functional.conv2d(x, kernel, padding=1)
        return 2 * torch.tanh(hidden + 0.001 * t.view(-1, 1, 1, 1) + 0.5 * x)

    return predict


@pytest.fixture
def x() -> Tensor:
    return samplers.initial_noise([0, 1], (4, 8, 8))


def assert_same_end(ours: Tensor, theirs: Tensor) -> None:
    scale = theirs.abs().max()
    assert ((ours - theirs).abs().max() / scale).item() <= 1e-4


def run_scheduler(scheduler: Any, denoise: samplers.Denoise, x: Tensor, **step_arguments: Any) -> Tensor:
    for timestep in scheduler.timesteps:
        eps = denoise(x, torch.full((len(x),), int(timestep)))
        x = scheduler.step(eps, timestep, x, **step_arguments).prev_sample
    return x


def draws(seeds: list[int]) -> Callable[[], Tensor]:
    return samplers.seeded_noise(seeds, (4, 8, 8))


@pytest.mark.parametrize("num_steps", [1, 20, 50, 250])
def test_ddim_ends_where_diffusers_ddim_ends(denoise: samplers.Denoise, x: Tensor, num_steps: int) -> None:
    scheduler: Any = DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    scheduler.set_timesteps(num_steps)
    ours = samplers.ddim(denoise, x, SCHEDULE, num_steps=num_steps)
    assert_same_end(ours, run_scheduler(scheduler, denoise, x))


@pytest.mark.parametrize("num_steps", [5, 20, 50])
def test_ddim_with_v_prediction_from_pure_noise_ends_where_diffusers_does(
    denoise: samplers.Denoise, x: Tensor, num_steps: int
) -> None:
    schedule = NoiseSchedule(ScheduleConfig(zero_terminal_snr=True))
    scheduler: Any = DDIMScheduler(
        **BETAS,
        clip_sample=False,
        set_alpha_to_one=False,
        timestep_spacing="trailing",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
    )
    scheduler.set_timesteps(num_steps)

    def predict(x: Tensor, t: Tensor) -> Prediction:
        return to_prediction("v", schedule, denoise(x, t), x, t)  # type: ignore[arg-type]

    ours = samplers.ddim(predict, x, schedule, num_steps=num_steps, spacing="trailing")
    assert_same_end(ours, run_scheduler(scheduler, denoise, x))


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_ddim_with_eta_ends_where_diffusers_does_with_the_same_draws(
    denoise: samplers.Denoise, x: Tensor, eta: float
) -> None:
    scheduler: Any = DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    scheduler.set_timesteps(50)
    noise = draws([5, 6])
    theirs = x
    for timestep in scheduler.timesteps:
        eps = denoise(theirs, torch.full((2,), int(timestep)))
        theirs = scheduler.step(eps, timestep, theirs, eta=eta, variance_noise=noise()).prev_sample
    ours = samplers.ddim(denoise, x, SCHEDULE, num_steps=50, eta=eta, noise=draws([5, 6]))
    assert_same_end(ours, theirs)


def test_ddpm_ends_where_diffusers_ddpm_ends_with_the_same_draws(
    denoise: samplers.Denoise, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler: Any = DDPMScheduler(**BETAS, clip_sample=False)
    scheduler.set_timesteps(1000)
    noise = draws([5, 6])
    # The scheduler draws its own noise and accepts none, so its source is replaced by ours.
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *args, **kwargs: noise())
    theirs = run_scheduler(scheduler, denoise, x)
    assert_same_end(samplers.ddpm(denoise, x, SCHEDULE, noise=draws([5, 6])), theirs)


@pytest.mark.parametrize("num_steps", [5, 20, 50])
def test_plms_ends_where_diffusers_pndm_without_runge_kutta_ends(
    denoise: samplers.Denoise, x: Tensor, num_steps: int
) -> None:
    scheduler: Any = PNDMScheduler(**BETAS, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1)
    scheduler.set_timesteps(num_steps)
    ours = samplers.plms(denoise, x, SCHEDULE, num_steps=num_steps)
    assert_same_end(ours, run_scheduler(scheduler, denoise, x))


@pytest.mark.parametrize("num_steps", [8, 20, 50])
def test_dpm_solver_pp_2m_ends_where_diffusers_does_on_the_published_grid(
    denoise: samplers.Denoise, x: Tensor, num_steps: int
) -> None:
    scheduler: Any = DPMSolverMultistepScheduler(**BETAS, final_sigmas_type="sigma_min")
    # None of its own grids is the published one, so that is given to it.
    scheduler.set_timesteps(timesteps=samplers.timestep_grid(SCHEDULE, num_steps))
    ours = samplers.dpm_solver_pp_2m(denoise, x, SCHEDULE, num_steps=num_steps)
    assert_same_end(ours, run_scheduler(scheduler, denoise, x))


@pytest.mark.parametrize("num_steps", [8, 20])
@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
def test_dpm_solver_pp_2m_ends_where_diffusers_does_on_its_own_grids(
    denoise: samplers.Denoise, x: Tensor, num_steps: int, spacing: Spacing
) -> None:
    scheduler: Any = DPMSolverMultistepScheduler(**BETAS, final_sigmas_type="sigma_min", timestep_spacing=spacing)
    scheduler.set_timesteps(num_steps)
    assert scheduler.timesteps.tolist() == samplers.timestep_grid(SCHEDULE, num_steps, spacing)
    ours = samplers.dpm_solver_pp_2m(denoise, x, SCHEDULE, num_steps=num_steps, spacing=spacing)
    assert_same_end(ours, run_scheduler(scheduler, denoise, x))


@pytest.mark.parametrize("num_steps", [1, 3, 8, 20, 50])
@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipc_ends_where_diffusers_unipc_ends(
    denoise: samplers.Denoise, x: Tensor, order: int, spacing: Spacing, num_steps: int
) -> None:
    scheduler: Any = UniPCMultistepScheduler(
        **BETAS, solver_order=order, final_sigmas_type="sigma_min", timestep_spacing=spacing
    )
    scheduler.set_timesteps(num_steps)
    assert scheduler.timesteps.tolist() == samplers.timestep_grid(SCHEDULE, num_steps, spacing)
    ours = samplers.unipc(denoise, x, SCHEDULE, num_steps=num_steps, order=order, spacing=spacing)
    assert_same_end(ours, run_scheduler(scheduler, denoise, x))


@pytest.mark.parametrize("num_steps", [10, 25, 50])
def test_unipc_ends_where_diffusers_does_on_the_published_grid(
    denoise: samplers.Denoise, x: Tensor, num_steps: int
) -> None:
    scheduler: Any = UniPCMultistepScheduler(
        **BETAS, final_sigmas_type="sigma_min", timestep_spacing="leading", steps_offset=1
    )
    scheduler.set_timesteps(num_steps)
    # It neither has this grid (its stride is T // (n + 1)) nor accepts one, so the grid is set from outside.
    grid = samplers.timestep_grid(SCHEDULE, num_steps)
    scheduler.timesteps = torch.tensor(grid)
    abar = SCHEDULE.alphas_cumprod[[*grid, 0]].double()
    scheduler.sigmas = ((1 - abar) / abar).sqrt().float()
    ours = samplers.unipc(denoise, x, SCHEDULE, num_steps=num_steps)
    assert_same_end(ours, run_scheduler(scheduler, denoise, x))


@pytest.mark.parametrize("num_steps", [7, 30, 300])
def test_leading_n_is_the_grid_of_diffusers(denoise: samplers.Denoise, x: Tensor, num_steps: int) -> None:
    scheduler: Any = DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    scheduler.set_timesteps(num_steps)
    assert scheduler.timesteps.tolist() == samplers.timestep_grid(SCHEDULE, num_steps, "leading_n")
    ours = samplers.ddim(denoise, x, SCHEDULE, num_steps=num_steps, spacing="leading_n")
    assert_same_end(ours, run_scheduler(scheduler, denoise, x))


@pytest.mark.parametrize("num_steps", [8, 20])
@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
@pytest.mark.parametrize("name", ["dpm_solver_pp_2m", "unipc"])
def test_solvers_of_the_clean_latent_end_where_diffusers_does(
    denoise: samplers.Denoise, x: Tensor, name: str, spacing: Spacing, num_steps: int
) -> None:
    kind: Any = {"dpm_solver_pp_2m": DPMSolverMultistepScheduler, "unipc": UniPCMultistepScheduler}[name]
    scheduler = kind(**BETAS, final_sigmas_type="zero", timestep_spacing=spacing)
    scheduler.set_timesteps(num_steps)
    options = {"num_steps": num_steps, "spacing": spacing, "final": "clean"}
    ours = getattr(samplers, name)(denoise, x, SCHEDULE, **options)
    assert_same_end(ours, run_scheduler(scheduler, denoise, x))


@pytest.mark.parametrize("spacing", ["trailing", "leading_n"])
@pytest.mark.parametrize(("name", "kind"), [("euler", EulerDiscreteScheduler), ("heun", HeunDiscreteScheduler)])
def test_euler_and_heun_end_where_diffusers_does(
    denoise: samplers.Denoise, x: Tensor, name: str, kind: Any, spacing: Spacing
) -> None:
    scheduler = kind(**BETAS, timestep_spacing=spacing.removesuffix("_n"), steps_offset=1)
    scheduler.set_timesteps(10)
    # They count in x / signal, and scale the network's input back.
    theirs = x / SCHEDULE.at(int(scheduler.timesteps[0])).signal
    for timestep in scheduler.timesteps:
        eps = denoise(scheduler.scale_model_input(theirs, timestep), torch.full((2,), int(timestep)))
        theirs = scheduler.step(eps, timestep, theirs).prev_sample
    ours = getattr(samplers, name)(denoise, x, SCHEDULE, num_steps=10, spacing=spacing)
    assert_same_end(ours, theirs)


def on_flow(denoise: samplers.Denoise, schedule: NoiseSchedule) -> samplers.Denoise:
    """Return the stand-in as a network that predicts the velocity, at timesteps as whole as some schedulers' are."""

    def predict(x: Tensor, t: Tensor) -> Prediction:
        return to_prediction("flow", schedule, denoise(x, (t + 0.01).floor()), x, t)  # type: ignore[arg-type]

    return predict


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_matching_by_euler_ends_where_diffusers_does(denoise: samplers.Denoise, x: Tensor, shift: float) -> None:
    scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=shift)
    # As its pipelines do: evenly spaced, and shifted by the scheduler.
    scheduler.set_timesteps(sigmas=[1 - i / 10 for i in range(10)])
    schedule = NoiseSchedule(ScheduleConfig(kind="rectified_flow", shift=shift))
    assert scheduler.timesteps.tolist() == pytest.approx(samplers.timestep_grid(schedule, 10), rel=1e-6)
    theirs = x
    for timestep in scheduler.timesteps:
        velocity = denoise(theirs, (timestep + 0.01).floor().expand(2))
        theirs = scheduler.step(velocity, timestep, theirs).prev_sample
    assert_same_end(samplers.euler(on_flow(denoise, schedule), x, schedule, num_steps=10), theirs)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_matching_by_heun_ends_where_diffusers_does(denoise: samplers.Denoise, x: Tensor, shift: float) -> None:
    scheduler: Any = FlowMatchHeunDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(10)
    schedule = NoiseSchedule(ScheduleConfig(kind="rectified_flow", shift=shift))
    theirs = x
    for timestep in scheduler.timesteps:
        velocity = denoise(theirs, (timestep + 0.01).floor().expand(2))
        theirs = scheduler.step(velocity, timestep, theirs).prev_sample
    timesteps = scheduler.timesteps.unique().flip(0).tolist()
    assert_same_end(samplers.heun(on_flow(denoise, schedule), x, schedule, timesteps=timesteps), theirs)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("name", ["dpm_solver_pp_2m", "unipc"])
def test_multistep_solvers_of_a_flow_end_where_diffusers_does(
    denoise: samplers.Denoise, x: Tensor, name: str, shift: float
) -> None:
    kind: Any = {"dpm_solver_pp_2m": DPMSolverMultistepScheduler, "unipc": UniPCMultistepScheduler}[name]
    scheduler = kind(
        use_flow_sigmas=True, flow_shift=shift, prediction_type="flow_prediction", final_sigmas_type="zero"
    )
    scheduler.set_timesteps(20)
    schedule = NoiseSchedule(ScheduleConfig(kind="rectified_flow", shift=shift))
    timesteps = [1000 * sigma for sigma in scheduler.sigmas[:-1].tolist()]
    whole = [int(timestep + 0.01) for timestep in timesteps]
    theirs = x
    for given, timestep in zip(whole, scheduler.timesteps):
        theirs = scheduler.step(denoise(theirs, torch.full((2,), given)), timestep, theirs).prev_sample
    ours = getattr(samplers, name)(on_flow(denoise, schedule), x, schedule, timesteps=timesteps)
    assert_same_end(ours, theirs)


@pytest.mark.parametrize("strength", [0.3, 0.75])
def test_image_to_image_ends_where_diffusers_does_on_the_last_steps_of_the_grid(
    denoise: samplers.Denoise, x: Tensor, strength: float
) -> None:
    z0 = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    scheduler: Any = DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    scheduler.set_timesteps(50)
    scheduler.timesteps = scheduler.timesteps[50 - int(50 * strength) :]
    start, timesteps = samplers.img2img_start(z0, x, SCHEDULE, strength=strength)
    theirs = run_scheduler(scheduler, denoise, scheduler.add_noise(z0, x, scheduler.timesteps[:1]))
    assert_same_end(samplers.ddim(denoise, start, SCHEDULE, timesteps=timesteps), theirs)


@pytest.mark.parametrize("kind", ["scaled_linear", "linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_noise_schedules_are_those_of_diffusers(kind: str, zero_terminal_snr: bool) -> None:
    scheduler: Any = DDIMScheduler(
        beta_schedule=kind, beta_start=0.0015, beta_end=0.0195, rescale_betas_zero_snr=zero_terminal_snr
    )
    ours = NoiseSchedule(
        ScheduleConfig(
            kind="cosine" if kind == "squaredcos_cap_v2" else kind,  # type: ignore[arg-type]
            beta_start=0.0015,
            beta_end=0.0195,
            zero_terminal_snr=zero_terminal_snr,
        )
    )
    torch.testing.assert_close(ours.alphas_cumprod, scheduler.alphas_cumprod, atol=1e-6, rtol=1e-4)
