"""What the network learns to predict: three parameterizations of one statement, and the loss, Eq. (2)."""

import pytest
import torch
from torch import Tensor

from ldm_core.configs.objective import FLOW_PARAMETERIZATIONS, PARAMETERIZATIONS, Parameterization
from ldm_core.configs.schedule import ScheduleConfig
from ldm_core.objective import DiffusionObjective, target, to_eps, to_prediction, to_x0, vlb_weights
from ldm_core.schedule import NoiseSchedule

SCHEDULE = NoiseSchedule(ScheduleConfig())
FLOW = NoiseSchedule(ScheduleConfig(kind="rectified_flow"))


@pytest.fixture
def batch() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    z0, noise = torch.randn(2, 4, 3, 5, 5, generator=generator)
    return z0, noise, torch.tensor([0, 3, 500, 999])


@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
def test_the_perfect_prediction_gives_back_noise_and_latent(
    parameterization: Parameterization, batch: tuple[Tensor, Tensor, Tensor]
) -> None:
    z0, noise, t = batch
    z_t = SCHEDULE.add_noise(z0, noise, t)
    prediction = target(parameterization, SCHEDULE, z0, noise, t)
    # At the ends of the chain a conversion divides by 0.03 and so magnifies float32's rounding.
    torch.testing.assert_close(to_eps(parameterization, SCHEDULE, prediction, z_t, t), noise, atol=2e-5, rtol=0)
    torch.testing.assert_close(to_x0(parameterization, SCHEDULE, prediction, z_t, t), z0, atol=2e-5, rtol=0)


@pytest.mark.parametrize("parameterization", ["v", "x0"])
def test_without_signal_the_latent_is_still_predicted(
    parameterization: Parameterization, batch: tuple[Tensor, Tensor, Tensor]
) -> None:
    z0, noise, t = batch
    schedule = NoiseSchedule(ScheduleConfig(zero_terminal_snr=True))
    z_t = schedule.add_noise(z0, noise, t)
    prediction = target(parameterization, schedule, z0, noise, t)
    eps, x0 = to_prediction(parameterization, schedule, prediction, z_t, t)
    torch.testing.assert_close(eps, noise, atol=2e-5, rtol=0)
    torch.testing.assert_close(x0, z0, atol=2e-5, rtol=0)
    with pytest.raises(ValueError, match="use parameterization v or x0"):
        to_prediction("eps", schedule, noise, z_t, t)


def test_v_is_the_angular_velocity_of_the_latent(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    z0, noise, t = batch
    signal, sigma = SCHEDULE.levels(t, like=z0)
    angle = torch.atan2(sigma, signal).double()
    step = 1e-6
    ahead = torch.cos(angle + step) * z0 + torch.sin(angle + step) * noise
    behind = torch.cos(angle - step) * z0 + torch.sin(angle - step) * noise
    v = target("v", SCHEDULE, z0, noise, t)
    torch.testing.assert_close(v.double(), (ahead - behind) / (2 * step), atol=1e-5, rtol=0)


@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
def test_a_perfect_network_has_no_loss(
    parameterization: Parameterization, batch: tuple[Tensor, Tensor, Tensor]
) -> None:
    z0, noise, t = batch
    objective = DiffusionObjective(SCHEDULE, parameterization=parameterization)
    loss = objective.loss(lambda z_t, t: target(parameterization, SCHEDULE, z0, noise, t), z0, noise, t)
    assert loss.shape == (4,)
    assert loss.max().item() == 0.0


@pytest.mark.parametrize(("kind", "expected"), [("l1", 0.5), ("l2", 0.25)])
def test_the_loss_is_the_mean_of_absolute_or_squared_errors_of_each_sample(
    kind: str, expected: float, batch: tuple[Tensor, Tensor, Tensor]
) -> None:
    z0, noise, t = batch
    objective = DiffusionObjective(SCHEDULE, loss=kind)  # type: ignore[arg-type]
    offsets = torch.tensor([0.5, 0.0, -0.5, 0.5]).view(4, 1, 1, 1)
    loss = objective.loss(lambda z_t, t: noise + offsets, z0, noise, t)
    torch.testing.assert_close(loss, torch.tensor([expected, 0.0, expected, expected]))


def test_the_network_sees_the_noised_latent_and_its_timestep(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    z0, noise, t = batch
    seen: list[Tensor] = []

    def network(z_t: Tensor, timestep: Tensor) -> Tensor:
        seen.extend([z_t, timestep])
        return z_t

    DiffusionObjective(SCHEDULE).loss(network, z0, noise, t)
    torch.testing.assert_close(seen[0], SCHEDULE.add_noise(z0, noise, t))
    assert seen[1] is t


@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_weights_express_the_same_loss_in_every_parameterization(
    gamma: float, batch: tuple[Tensor, Tensor, Tensor]
) -> None:
    # Hang et al. weigh the x0 error by min(snr, gamma): the same wrong x0 must cost the same everywhere.
    z0, noise, t = batch
    z_t = SCHEDULE.add_noise(z0, noise, t)
    wrong_x0 = z0 + 0.1
    signal, sigma = SCHEDULE.levels(t, like=z0)
    implied_eps = (z_t - signal * wrong_x0) / sigma
    answers = {"x0": wrong_x0, "eps": implied_eps, "v": signal * implied_eps - sigma * wrong_x0}
    expected = SCHEDULE.snr(t).clamp(max=gamma) * 0.01
    for parameterization in PARAMETERIZATIONS:
        objective = DiffusionObjective(SCHEDULE, parameterization=parameterization, min_snr_gamma=gamma)
        loss = objective.loss(lambda z_t, t: answers[parameterization], z0, noise, t)  # noqa: B023
        torch.testing.assert_close(loss, expected, rtol=2e-3, atol=0)


def test_vlb_weights_are_the_published_ones() -> None:
    # Written out as in the code release: its float64 tables, its expression for eps, its copy into the first place.
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alphas = 1 - betas
    alphas_cumprod = alphas.cumprod(dim=0)
    previous = torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod[:-1]])
    posterior_variance = betas * (1 - previous) / (1 - alphas_cumprod)
    published = betas**2 / (2 * posterior_variance * alphas * (1 - alphas_cumprod))
    published[0] = published[1]
    torch.testing.assert_close(vlb_weights("eps", SCHEDULE), published.float())


def test_the_variational_bound_is_the_same_in_every_parameterization(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    z0, noise, _ = batch
    t = torch.tensor([1, 3, 500, 999])
    z_t = SCHEDULE.add_noise(z0, noise, t)
    signal, sigma = SCHEDULE.levels(t, like=z0)
    wrong_x0 = z0 + 0.1
    implied_eps = (z_t - signal * wrong_x0) / sigma
    answers = {"x0": wrong_x0, "eps": implied_eps, "v": signal * implied_eps - sigma * wrong_x0}
    # Half of the squared distance of the posterior's means over its variance (Ho et al. 2020, Eq. 7 and 8).
    abar = torch.tensor([SCHEDULE.alpha_bar(int(i)) for i in t], dtype=torch.float64)
    before = torch.tensor([SCHEDULE.alpha_bar(int(i) - 1) for i in t], dtype=torch.float64)
    beta = 1 - abar / before
    of_mean = before.sqrt() * beta / (1 - abar)
    expected = (of_mean * 0.1).square() / (2 * beta * (1 - before) / (1 - abar))
    for parameterization in PARAMETERIZATIONS:
        both = DiffusionObjective(SCHEDULE, parameterization=parameterization, vlb_weight=1.0)
        simple = DiffusionObjective(SCHEDULE, parameterization=parameterization)
        of_both, of_simple = (
            objective.loss(lambda z_t, t: answers[parameterization], z0, noise, t)  # noqa: B023
            for objective in (both, simple)
        )
        torch.testing.assert_close((of_both - of_simple).double(), expected, rtol=2e-2, atol=1e-6)


def test_the_bound_is_added_by_its_weight(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    z0, noise, t = batch
    weighted = DiffusionObjective(SCHEDULE, min_snr_gamma=5.0, vlb_weight=0.5)
    plain = DiffusionObjective(SCHEDULE, min_snr_gamma=5.0)
    unweighted = DiffusionObjective(SCHEDULE)
    by_weight, by_snr, simple = (o.loss(lambda z_t, t: z_t, z0, noise, t) for o in (weighted, plain, unweighted))
    torch.testing.assert_close(by_weight, by_snr + 0.5 * vlb_weights("eps", SCHEDULE)[t] * simple)


@pytest.mark.parametrize("parameterization", ["v", "x0"])
def test_the_bound_is_finite_without_terminal_signal(parameterization: Parameterization) -> None:
    weights = vlb_weights(parameterization, NoiseSchedule(ScheduleConfig(zero_terminal_snr=True)))
    assert weights.isfinite().all()
    assert (weights > 0).all()


def test_bf16_predictions_give_a_float32_loss(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    z0, noise, t = batch
    loss = DiffusionObjective(SCHEDULE).loss(lambda z_t, t: z_t.bfloat16(), z0, noise, t)
    assert loss.dtype == torch.float32


def test_unusable_choices_are_refused() -> None:
    with pytest.raises(ValueError, match="parameterization must be eps, v, x0 or flow, got 'epsilon'"):
        DiffusionObjective(SCHEDULE, parameterization="epsilon")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="loss must be l1 or l2, got 'huber'"):
        DiffusionObjective(SCHEDULE, loss="huber")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="min_snr_gamma must be positive"):
        DiffusionObjective(SCHEDULE, min_snr_gamma=0.0)
    for weight in (-1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=f"vlb_weight must be a finite number of at least 0, got {weight}"):
            DiffusionObjective(SCHEDULE, vlb_weight=weight)
    without_terminal_signal = NoiseSchedule(ScheduleConfig(zero_terminal_snr=True))
    with pytest.raises(ValueError, match="use parameterization v or x0"):
        DiffusionObjective(without_terminal_signal)


def test_a_prediction_of_another_shape_is_refused(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    z0, noise, t = batch
    with pytest.raises(ValueError, match="check the network's out_channels"):
        DiffusionObjective(SCHEDULE).loss(lambda z_t, t: z_t[:, :2], z0, noise, t)


@pytest.mark.parametrize("parameterization", FLOW_PARAMETERIZATIONS)
def test_a_perfect_prediction_on_a_rectified_flow_gives_back_noise_and_latent(
    parameterization: Parameterization, batch: tuple[Tensor, Tensor, Tensor]
) -> None:
    z0, noise, _ = batch
    t = torch.tensor([1.5, 300.0, 999.25, 1000.0])
    z_t = FLOW.add_noise(z0, noise, t)
    prediction = target(parameterization, FLOW, z0, noise, t)
    eps, x0 = to_prediction(parameterization, FLOW, prediction, z_t, t)
    # At t = 1.5 of 1000 the noise that an x0 implies is a difference divided by 0.0015.
    torch.testing.assert_close(eps, noise, atol=2e-3 if parameterization == "x0" else 2e-5, rtol=0)
    torch.testing.assert_close(x0, z0, atol=2e-5, rtol=0)
    objective = DiffusionObjective(FLOW, parameterization=parameterization)
    assert objective.loss(lambda z_t, t: prediction, z0, noise, t).max().item() == 0.0


def test_flow_is_the_velocity_of_the_latent(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    z0, noise, _ = (part.double() for part in batch)
    t = torch.tensor([10.0, 400.0, 700.0, 990.0], dtype=torch.float64)
    behind, ahead = (FLOW.add_noise(z0, noise, t + step) for step in (-1.0, 1.0))
    # In units of T: t goes from 0 to 1 while the network's timestep goes from 0 to 1000.
    torch.testing.assert_close(target("flow", FLOW, z0, noise, t), (ahead - behind) / (2 / 1000))


def test_what_only_a_chain_or_only_a_flow_has_is_refused() -> None:
    refused: tuple[tuple[NoiseSchedule, dict, str], ...] = (
        (FLOW, {"parameterization": "eps"}, "with a rectified_flow use parameterization flow .*, got eps"),
        (FLOW, {"parameterization": "v"}, "with a rectified_flow use parameterization flow .*, got v"),
        (FLOW, {"parameterization": "flow", "min_snr_gamma": 5.0}, "last timestep of a rectified_flow no weight"),
        (FLOW, {"parameterization": "flow", "vlb_weight": 0.1}, "bound is that of a chain.* leave vlb_weight 0"),
        (SCHEDULE, {"parameterization": "flow"}, "only a rectified_flow has parameterization flow, got a schedule of"),
    )
    for schedule, settings, message in refused:
        with pytest.raises(ValueError, match=message):
            DiffusionObjective(schedule, **settings)
