"""The average of the weights: its arithmetic, its warm-up, and that it never leaks into training."""

import io

import pytest
import torch
from torch import nn

from ldm_core.ema import EMA


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
