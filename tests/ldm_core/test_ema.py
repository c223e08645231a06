"""The average of the weights: its arithmetic, its warm-up, and that it never leaks into training."""

import io
import itertools

import numpy as np
import pytest
import torch
from torch import nn

from ldm_core import ema as ema_module
from ldm_core.ema import EMA, PowerEMA, Snapshot, gamma_of, power_decay, reconstruct, reconstruction_shares


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def shift(module: nn.Module, amount: float) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(amount)


def test_a_constant_decay_gives_the_textbook_average() -> None:
    module = network()
    ema = EMA(module, decay=0.9, warmup=False)
    expected = module.get_parameter("0.weight").detach().double()
    for _ in range(20):
        shift(module, 0.1)
        ema.update()
        expected = 0.9 * expected + 0.1 * module.get_parameter("0.weight").detach().double()
    torch.testing.assert_close(ema.shadow["0.weight"].double(), expected, atol=1e-6, rtol=0)


def test_warm_up_keeps_less_of_the_beginning() -> None:
    # The published rule: the n-th update keeps min(decay, (1 + n) / (10 + n)).
    module = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(module.weight)
    ema = EMA(module, decay=0.5)
    nn.init.ones_(module.weight)
    kept = 1.0
    for n in range(1, 15):
        ema.update()
        kept *= min(0.5, (1 + n) / (10 + n))
        assert ema.shadow["weight"].item() == pytest.approx(1 - kept, abs=1e-6)


def test_buffers_are_averaged_and_integers_left_alone() -> None:
    module = network()
    ema = EMA(module, decay=0.5, warmup=False)
    module(torch.randn(16, 3) + 5)
    ema.update()
    running_mean = module.get_buffer("1.running_mean")
    torch.testing.assert_close(ema.shadow["1.running_mean"], 0.5 * running_mean)
    assert "1.num_batches_tracked" not in ema.shadow


def test_the_average_is_float32_whatever_the_network_is() -> None:
    module = nn.Linear(1, 1, bias=False).bfloat16()
    nn.init.ones_(module.weight)
    ema = EMA(module, decay=0.9999, warmup=False)
    nn.init.constant_(module.weight, 3.0)
    for _ in range(10):
        ema.update()
    # bfloat16 cannot tell 1.002 from 1.
    assert ema.shadow["weight"].item() == pytest.approx(3 - 2 * 0.9999**10, abs=1e-6)


def test_an_update_is_one_fused_call_and_copies_no_float32_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    module = network()
    ema = EMA(module, decay=0.9, warmup=False)
    calls: list[list[int]] = []
    fused = torch._foreach_lerp_

    def watching(averages: list[torch.Tensor], weights: list[torch.Tensor], share: float) -> None:
        calls.append([weight.data_ptr() for weight in weights])
        fused(averages, weights, share)

    monkeypatch.setattr(torch, "_foreach_lerp_", watching)
    ema.update()
    floating = [tensor for tensor in module.state_dict().values() if tensor.is_floating_point()]
    assert calls == [[tensor.data_ptr() for tensor in floating]]


def test_weights_that_were_moved_to_another_layout_are_still_followed() -> None:
    module = nn.Conv2d(3, 4, 3)
    ema = EMA(module, decay=0.5, warmup=False)
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    before = module.weight.detach().clone()
    shift(module, 1.0)
    ema.update()
    torch.testing.assert_close(ema.shadow["weight"], before + 0.5)
    with ema.swapped():
        torch.testing.assert_close(module.weight.detach(), before + 0.5)
        assert module.weight.is_contiguous(memory_format=torch.channels_last)


def test_the_network_computes_with_the_average_only_inside_swapped() -> None:
    module = network().eval()
    x = torch.randn(5, 3)
    ema = EMA(module, decay=0.9, warmup=False)
    averaged = module(x)
    shift(module, 1.0)
    own = module(x)
    parameter = next(module.parameters())
    with ema.swapped():
        assert torch.equal(module(x), averaged)
        assert next(module.parameters()) is parameter
    assert torch.equal(module(x), own)
    with pytest.raises(RuntimeError, match="inside"), ema.swapped():
        raise RuntimeError("inside")
    assert torch.equal(module(x), own)


def test_a_swap_gives_every_bit_back_and_copies_one_tensor_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2).bfloat16())
    ema = EMA(module, decay=0.9, warmup=False)
    shift(module, 0.3)
    ema.update()
    shift(module, 0.3)  # so that nothing the update left behind is what must come back
    weights = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    averages = {name: tensor.clone() for name, tensor in ema.shadow.items()}
    held: list[str] = []
    exchange = EMA._exchange

    def watching(self: EMA, name: str, *, back: bool) -> None:
        exchange(self, name, back=back)
        held.append(name)

    monkeypatch.setattr(EMA, "_exchange", watching)
    with ema.swapped():
        assert held == list(ema.shadow)
        for name, tensor in module.state_dict().items():
            assert torch.equal(tensor, averages[name].to(tensor.dtype)), name
        for forbidden in (ema.update, ema.state_dict, lambda: ema.load_state_dict({"num_updates": 0, "shadow": {}})):
            with pytest.raises(ValueError, match="do this outside of `swapped`"):
                forbidden()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in module.state_dict().items())
    # Of a bfloat16 weight too, whose average bfloat16 could not hold.
    assert all(torch.equal(tensor, averages[name]) for name, tensor in ema.shadow.items())
    ema.update()


def test_a_swap_that_fails_half_way_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    module = network()
    ema = EMA(module, decay=0.9, warmup=False)
    shift(module, 1.0)
    weights = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    exchange, calls = EMA._exchange, itertools.count(1)

    def failing(self: EMA, name: str, *, back: bool) -> None:
        if next(calls) == 3:
            raise MemoryError
        exchange(self, name, back=back)

    monkeypatch.setattr(EMA, "_exchange", failing)
    with pytest.raises(MemoryError), ema.swapped():
        pass
    assert all(torch.equal(tensor, weights[name]) for name, tensor in module.state_dict().items())
    ema.update()


def test_frozen_weights_are_not_averaged_and_states_that_hold_them_still_load() -> None:
    module = network()
    before = EMA(module)
    module[0].requires_grad_(False)
    ema = EMA(module)
    assert set(before.shadow) - set(ema.shadow) == {"0.weight", "0.bias"}
    shift(module[2], 1.0)
    before.update()
    ema.load_state_dict(before.state_dict())
    assert ema.num_updates == 1
    assert all(torch.equal(average, before.shadow[name]) for name, average in ema.shadow.items())


def test_training_goes_on_through_the_same_parameters_after_a_swap() -> None:
    module = nn.Linear(2, 1)
    ema = EMA(module)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    with ema.swapped(), torch.no_grad():
        module(torch.ones(1, 2))
    before = module.weight.detach().clone()
    module(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    ema.update()
    torch.testing.assert_close(module.weight.detach(), before - 0.1)
    assert not ema.shadow["weight"].requires_grad


def test_a_saved_average_continues_as_if_never_interrupted() -> None:
    module, copy = network(), network()
    ema = EMA(module)
    for _ in range(3):
        shift(module, 0.1)
        ema.update()
    file = io.BytesIO()
    torch.save(ema.state_dict(), file)
    file.seek(0)
    copy.load_state_dict(module.state_dict())
    resumed = EMA(copy)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for each_module, each_ema in ((module, ema), (copy, resumed)):
        shift(each_module, 0.1)
        each_ema.update()
    assert resumed.num_updates == 4
    assert all(torch.equal(resumed.shadow[name], ema.shadow[name]) for name in ema.shadow)


def test_another_networks_average_is_refused_by_name() -> None:
    ema = EMA(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"1 differ in name or shape \(weight\)"):
        ema.load_state_dict(EMA(nn.Linear(3, 2)).state_dict())
    with pytest.raises(ValueError, match=r"\(bias\)"):
        ema.load_state_dict(EMA(nn.Linear(2, 2, bias=False)).state_dict())


def test_a_decay_of_one_is_refused() -> None:
    with pytest.raises(ValueError, match=r"below 1, got 1\.0"):
        EMA(nn.Linear(1, 1), decay=1.0)


@pytest.mark.parametrize(("sigma_rel", "gamma"), [(0.05, 16.97), (0.10, 6.94), (12**-0.5, 0.0)])
def test_relative_lengths_have_their_published_exponents(sigma_rel: float, gamma: float) -> None:
    """Karras et al. 2024, Sec. 3.1; gamma = 0 is the uniform average, of standard deviation 12^-1/2."""
    found = gamma_of(sigma_rel)
    assert found == pytest.approx(gamma, abs=0.005)
    # Eq. (3).
    assert (found + 1) ** 0.5 / (found + 2) / (found + 3) ** 0.5 == pytest.approx(sigma_rel, rel=1e-9)


@pytest.mark.parametrize("sigma_rel", [0.0, -0.1, 0.3])
def test_lengths_that_no_power_profile_has_are_refused(sigma_rel: float) -> None:
    with pytest.raises(ValueError, match=rf"above 0 and at most 12\^-1/2 = 0.2887, got {sigma_rel}"):
        PowerEMA(nn.Linear(1, 1), sigma_rels=(sigma_rel,))


STEPS = 512


def impulses(*sigma_rels: float, every: int = STEPS // 16) -> tuple[PowerEMA, list[Snapshot]]:
    """Average weights that are the k-th unit vector at the k-th step: the average is the profile itself."""
    module = nn.Linear(STEPS, 1, bias=False)
    average, taken = PowerEMA(module, sigma_rels=sigma_rels), []
    for step in range(STEPS):
        with torch.no_grad():
            module.weight.zero_()[0, step] = 1.0
        average.update()
        if (step + 1) % every == 0:
            taken += average.snapshots()
    return average, taken


def profile(weights: torch.Tensor) -> np.ndarray:
    return weights[0].double().numpy()


@pytest.mark.parametrize("sigma_rel", [0.05, 0.10, 0.25])
def test_a_power_average_has_the_profile_and_the_length_asked_for(sigma_rel: float) -> None:
    average, _ = impulses(sigma_rel)
    found, gamma = profile(average.averages[sigma_rel].shadow["weight"]), gamma_of(sigma_rel)
    assert found.sum() == pytest.approx(1.0, abs=1e-5)
    steps = np.arange(1, STEPS + 1)
    mean = (found * steps).sum()
    assert ((found * (steps - mean) ** 2).sum()) ** 0.5 / STEPS == pytest.approx(sigma_rel, rel=0.02)
    # Eq. (1), integrated over each step.
    exact = (steps ** (gamma + 1) - (steps - 1.0) ** (gamma + 1)) / float(STEPS) ** (gamma + 1)
    np.testing.assert_allclose(found, exact, atol=2e-6)
    assert power_decay(sigma_rel)(1) == 0.0


def test_inner_products_of_profiles_are_those_of_the_functions() -> None:
    tau = np.linspace(0.0, 9.0, 200_001)
    cases = [(9.0, 16.97, 9.0, 6.94), (4.0, 6.94, 9.0, 16.97), (9.0, 0.0, 3.0, 6.94)]
    for t_a, gamma_a, t_b, gamma_b in cases:
        a, b = (np.where(tau <= t, (g + 1) / t ** (g + 1) * tau**g, 0.0) for t, g in ((t_a, gamma_a), (t_b, gamma_b)))
        found = ema_module._profile_product(t_a, gamma_a, t_b, gamma_b)
        assert found == pytest.approx(float(np.trapezoid(a * b, tau)), rel=1e-3)


@pytest.mark.parametrize(("sigma_rel", "time"), [(0.08, STEPS), (0.15, STEPS), (0.20, STEPS), (0.12, STEPS * 3 // 4)])
def test_an_average_reconstructed_afterwards_is_close_to_the_one_tracked(sigma_rel: float, time: int) -> None:
    _, taken = impulses(0.05, 0.10)
    _, tracked = impulses(sigma_rel)
    (wanted,) = [profile(each.weights["weight"]) for each in tracked if each.num_updates == time]
    found = profile(reconstruct(taken, sigma_rel, num_updates=time)["weight"])
    assert np.linalg.norm(found - wanted) < 0.05 * np.linalg.norm(wanted)
    assert found.sum() == pytest.approx(1.0, abs=0.01)


def test_a_snapshot_is_reconstructed_as_it_was() -> None:
    points = [(t, length) for t in (100, 200, 300) for length in (0.05, 0.10)]
    np.testing.assert_allclose(reconstruction_shares(points, (200, 0.10)), [0, 0, 0, 1, 0, 0], atol=1e-6)


def test_saved_power_averages_continue_and_snapshots_that_do_not_fit_are_refused() -> None:
    average, taken = impulses(0.05, 0.10, every=STEPS)
    again = PowerEMA(nn.Linear(STEPS, 1, bias=False))
    again.load_state_dict(average.state_dict())
    assert [each.num_updates for each in again.averages.values()] == [STEPS, STEPS]
    assert torch.equal(again.averages[0.05].shadow["weight"], average.averages[0.05].shadow["weight"])
    with pytest.raises(ValueError, match=r"of relative lengths \['0.05', '0.1'\], got \['0.05'\]"):
        again.load_state_dict(impulses(0.05)[0].state_dict())
    with pytest.raises(ValueError, match="got none"):
        reconstruct([], 0.1)
    with pytest.raises(ValueError, match=f"between 1 and the last snapshot's {STEPS}, got 9999"):
        reconstruct(taken, 0.1, num_updates=9999)
    with pytest.raises(ValueError, match="hold tensors of different names"):
        reconstruct([*taken, Snapshot(1, 0.1, {})], 0.1)
    with pytest.raises(ValueError, match="at least one relative length"):
        PowerEMA(nn.Linear(1, 1), sigma_rels=())


def test_a_weight_under_two_names_comes_back_from_a_swap() -> None:
    module = nn.ModuleDict({"tokens": nn.Embedding(3, 2), "logits": nn.Linear(2, 3, bias=False)})
    module["logits"].weight = module["tokens"].weight
    average = EMA(module, decay=0.5, warmup=False)
    shift(module, 1.0)
    own = module["tokens"].weight.detach().clone()
    with average.swapped():
        assert not torch.equal(module["tokens"].weight, own)
    assert torch.equal(module["tokens"].weight, own)
