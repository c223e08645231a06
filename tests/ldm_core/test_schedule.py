"""The forward process: published values, its closed form against its own steps, and clear refusals."""

import math

import pytest
import torch

from ldm_core.configs.schedule import ScheduleConfig
from ldm_core.schedule import NoiseSchedule


def test_scaled_linear_betas_are_linear_in_their_root_between_the_given_ends() -> None:
    betas = NoiseSchedule(ScheduleConfig()).betas
    assert betas.shape == (1000,)
    assert betas[0].item() == pytest.approx(0.00085, rel=1e-6)
    assert betas[-1].item() == pytest.approx(0.012, rel=1e-6)
    middle = ((math.sqrt(0.00085) * 500 + math.sqrt(0.012) * 499) / 999) ** 2
    assert betas[499].item() == pytest.approx(middle, rel=1e-6)


@pytest.mark.parametrize(
    ("config", "first", "last"),
    [
        # Products written out by hand: 1 - beta_start, and the well-known terminal signals.
        (ScheduleConfig(), 1 - 0.00085, 0.0046600),
        (ScheduleConfig(kind="linear", beta_start=1e-4, beta_end=0.02), 1 - 1e-4, 4.0358e-5),
        (ScheduleConfig(kind="cosine"), 0.999958, 2.4e-9),
    ],
)
def test_signal_left_at_both_ends_of_each_kind(config: ScheduleConfig, first: float, last: float) -> None:
    alphas_cumprod = NoiseSchedule(config).alphas_cumprod
    assert alphas_cumprod[0].item() == pytest.approx(first, rel=1e-5)
    assert alphas_cumprod[-1].item() == pytest.approx(last, rel=2e-2)
    assert (alphas_cumprod.diff() < 0).all()


def test_zero_terminal_snr_ends_without_signal_and_keeps_the_first_step() -> None:
    plain = NoiseSchedule(ScheduleConfig())
    rescaled = NoiseSchedule(ScheduleConfig(zero_terminal_snr=True))
    assert rescaled.alphas_cumprod[-1].item() == 0.0
    assert rescaled.snr(torch.tensor([999])).item() == 0.0
    assert rescaled.alphas_cumprod[0].item() == pytest.approx(plain.alphas_cumprod[0].item(), rel=1e-6)


def test_adding_noise_at_once_has_the_moments_of_adding_it_step_by_step() -> None:
    schedule = NoiseSchedule(ScheduleConfig(timesteps=20, beta_start=0.01, beta_end=0.1))
    mean, variance = 3.0, 0.0
    for beta in schedule.betas.double().tolist():
        mean, variance = math.sqrt(1 - beta) * mean, (1 - beta) * variance + beta
    t = torch.tensor([19])
    z0 = torch.full((1, 4, 2, 2), 3.0)
    without_noise = schedule.add_noise(z0, torch.zeros_like(z0), t)
    of_noise = schedule.add_noise(torch.zeros_like(z0), torch.ones_like(z0), t)
    assert without_noise.flatten()[0].item() == pytest.approx(mean, rel=1e-5)
    assert of_noise.flatten()[0].item() == pytest.approx(math.sqrt(variance), rel=1e-5)


def test_each_sample_of_a_batch_is_noised_at_its_own_timestep() -> None:
    schedule = NoiseSchedule(ScheduleConfig())
    z0, noise, t = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2), torch.tensor([0, 500, 999])
    together = schedule.add_noise(z0, noise, t)
    for i in range(3):
        torch.testing.assert_close(
            together[i : i + 1], schedule.add_noise(z0[i : i + 1], noise[i : i + 1], t[i : i + 1])
        )


def test_levels_of_latents_in_half_precision_are_exact() -> None:
    schedule = NoiseSchedule(ScheduleConfig())
    z0, noise, t = torch.randn(1000, 4).bfloat16(), torch.randn(1000, 4).bfloat16(), torch.arange(1000)
    signal, sigma = schedule.levels(t, like=z0)
    torch.testing.assert_close(signal.square() + sigma.square(), torch.ones(1000, 1), atol=1e-6, rtol=0)
    noisy = schedule.add_noise(z0, noise, t)
    assert noisy.dtype == torch.bfloat16
    assert torch.equal(noisy, schedule.add_noise(z0.float(), noise.float(), t).bfloat16())


def test_snr_is_signal_over_noise() -> None:
    schedule = NoiseSchedule(ScheduleConfig())
    t = torch.tensor([0, 999])
    abar = schedule.alphas_cumprod[t].double()
    torch.testing.assert_close(schedule.snr(t).double(), abar / (1 - abar), rtol=1e-4, atol=0)


def test_tables_stay_real_where_a_model_is_built_on_the_meta_device() -> None:
    with torch.device("meta"):
        schedule = NoiseSchedule(ScheduleConfig())
    assert schedule.alphas_cumprod.device.type == "cpu"
    assert schedule.to("meta").alphas_cumprod.device.type == "meta"


def test_tables_are_moved_to_the_timesteps_device_once(monkeypatch: pytest.MonkeyPatch) -> None:
    schedule = NoiseSchedule(ScheduleConfig())
    moves: list[str] = []
    move = NoiseSchedule.to

    def watching(self: NoiseSchedule, device: torch.device) -> NoiseSchedule:
        moves.append(str(device))
        return move(self, device)

    monkeypatch.setattr(NoiseSchedule, "to", watching)
    for device in ("cpu", "meta", "meta"):
        signal, _ = schedule.levels(torch.zeros(2, dtype=torch.long, device=device), like=torch.zeros(2, 4, 8, 8))
        assert signal.device.type == device
        assert signal.shape == (2, 1, 1, 1)
    assert moves == ["meta"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"timesteps": 1}, "at least 2 timesteps, got timesteps=1"),
        ({"kind": "sqrt"}, "got 'sqrt'"),
        ({"beta_start": 0.1, "beta_end": 0.01}, "0 < beta_start <= beta_end < 1"),
        ({"shift": 3.0}, "a schedule of kind scaled_linear has no shift, got 3.0: leave it out"),
        ({"kind": "rectified_flow", "beta_end": 0.02}, "of kind rectified_flow has no beta_end, got 0.02"),
        ({"kind": "rectified_flow", "zero_terminal_snr": True}, "rectified_flow has no zero_terminal_snr, got True"),
        ({"kind": "rectified_flow", "shift": 0.0}, "shift must be a positive number, got 0.0"),
    ],
)
def test_an_impossible_schedule_is_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ScheduleConfig(**settings)


def test_noise_of_another_shape_is_refused() -> None:
    schedule = NoiseSchedule(ScheduleConfig())
    with pytest.raises(ValueError, match="noise must have z0's shape"):
        schedule.add_noise(torch.zeros(2, 4, 8, 8), torch.zeros(1, 4, 8, 8), torch.zeros(2, dtype=torch.long))


@pytest.mark.parametrize("config", [ScheduleConfig(), ScheduleConfig(zero_terminal_snr=True)])
def test_between_its_timesteps_a_chain_is_interpolated_and_at_them_it_is_the_table(config: ScheduleConfig) -> None:
    schedule = NoiseSchedule(config)
    t = torch.arange(1000)
    for table, level in zip(schedule.levels(t, like=t.double()), schedule.levels(t.double(), like=t.double())):
        torch.testing.assert_close(level, table, atol=0, rtol=1e-6)
    assert schedule.at(998) == (math.sqrt(schedule.alpha_bar(998)), math.sqrt(1 - schedule.alpha_bar(998)))
    between = torch.arange(999) + 0.3
    signal, sigma = schedule.levels(between, like=between)
    torch.testing.assert_close(signal.square() + sigma.square(), torch.ones(999))
    assert (signal[:-1] < schedule.signal_level[:-2]).all()
    assert (signal[:-1] > schedule.signal_level[1:-1]).all()
    for timestep in (0.3, 500.3, 998.3):
        in_float32 = signal[int(timestep)].item(), sigma[int(timestep)].item()
        assert schedule.at(timestep) == pytest.approx(in_float32, abs=1e-6)
    assert schedule.at(999).signal == schedule.at(999.0).signal == math.sqrt(schedule.alpha_bar(999))
    with pytest.raises(ValueError, match=r"timesteps must be in 0 \.\.\. 999, got 999\.5"):
        schedule.levels(torch.tensor([999.5]), like=signal)


def test_a_rectified_flow_goes_straight_from_latent_to_noise() -> None:
    # Liu et al. 2023, Eq. (1), from noise at t = 1000 to data at t = 0.
    schedule = NoiseSchedule(ScheduleConfig(kind="rectified_flow", shift=3.0))
    z0, noise, t = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2), torch.tensor([0.0, 250.5, 1000.0])
    expected = torch.stack([z0[0], 0.7495 * z0[1] + 0.2505 * noise[1], noise[2]])
    torch.testing.assert_close(schedule.add_noise(z0, noise, t), expected)
    assert schedule.at(250.5) == pytest.approx((0.7495, 0.2505))
    assert (schedule.at(0).half_log_snr, schedule.at(1000).half_log_snr) == (math.inf, -math.inf)
    torch.testing.assert_close(schedule.snr(torch.tensor([500.0, 1000.0])), torch.tensor([1.0, 0.0]))
    with pytest.raises(ValueError, match=r"timesteps must be in 0 \.\.\. 1000, got 1000\.5"):
        schedule.add_noise(z0[:1], noise[:1], torch.tensor([1000.5]))
    with pytest.raises(ValueError, match="is no chain of steps, as DDPM and the variational bound need"):
        schedule.alpha_bar(3)
