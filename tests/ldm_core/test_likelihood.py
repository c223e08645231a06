"""The variational bound of a model whose data distribution is known."""

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from ldm_core.configs.schedule import ScheduleConfig
from ldm_core.likelihood import variational_bound
from ldm_core.samplers import seeded_noise
from ldm_core.schedule import NoiseSchedule

MEAN, STD = 0.7, 0.4
SCHEDULE = NoiseSchedule(ScheduleConfig(timesteps=50, beta_start=0.005, beta_end=0.2))
NOISE = [0, 1, 2]


def perfect_denoise(x: Tensor, t: Tensor) -> Tensor:
    signal, sigma = SCHEDULE.levels(t, like=x)
    return sigma * (x - signal * MEAN) / (signal.square() * STD**2 + sigma.square())


def data() -> Tensor:
    return MEAN + STD * seeded_noise([7, 8, 9], (2, 64, 64))()


def test_the_bound_is_the_sum_of_the_divergences_written_out() -> None:
    z0, noise = data(), seeded_noise(NOISE, (2, 64, 64))
    last = SCHEDULE.timesteps - 1
    expected = torch.zeros(3)
    for t in range(last, -1, -1):
        z_t = SCHEDULE.add_noise(z0, noise(), torch.full((3,), t))
        abar, before = SCHEDULE.alpha_bar(t), SCHEDULE.alpha_bar(t - 1)
        if t == last:
            q = Normal(math.sqrt(abar) * z0, math.sqrt(1 - abar))
            expected += kl_divergence(q, Normal(0.0, 1.0)).flatten(1).mean(dim=1)
        x0 = (z_t - math.sqrt(1 - abar) * perfect_denoise(z_t, torch.full((3,), t))) / math.sqrt(abar)
        beta = 1 - abar / before
        if t == 0:
            expected -= Normal(x0, math.sqrt(beta)).log_prob(z0).flatten(1).mean(dim=1)
            break
        # Ho et al. 2020, Eq. (6) and (7), with the clean latent and with the prediction of it.
        std = math.sqrt(beta * (1 - before) / (1 - abar))
        means = [
            (math.sqrt(before) * beta * z + math.sqrt(1 - beta) * (1 - before) * z_t) / (1 - abar) for z in (z0, x0)
        ]
        expected += kl_divergence(Normal(means[0], std), Normal(means[1], std)).flatten(1).mean(dim=1)
    ours = variational_bound(perfect_denoise, z0, SCHEDULE, seeded_noise(NOISE, (2, 64, 64)))
    torch.testing.assert_close(ours, expected / math.log(2), rtol=1e-4, atol=1e-4)


def test_no_model_needs_fewer_bits_than_the_truth_and_a_worse_one_needs_more() -> None:
    z0 = data()
    truth = -Normal(MEAN, STD).log_prob(z0).mean().item() / math.log(2)

    def bits(denoise) -> float:
        return variational_bound(denoise, z0, SCHEDULE, seeded_noise(NOISE, (2, 64, 64))).mean().item()

    best = bits(perfect_denoise)
    assert truth < best < truth + 0.6
    assert bits(lambda x, t: 0.9 * perfect_denoise(x, t)) > best + 0.01
    assert bits(lambda x, t: torch.zeros_like(x)) > best + 1


def test_each_sample_has_its_own_bound() -> None:
    z0 = data()
    together = variational_bound(perfect_denoise, z0, SCHEDULE, seeded_noise(NOISE, (2, 64, 64)))
    alone = variational_bound(perfect_denoise, z0[1:2], SCHEDULE, seeded_noise(NOISE[1:2], (2, 64, 64)))
    assert together.shape == (3,)
    assert together[1].item() == pytest.approx(alone.item(), rel=1e-5)
