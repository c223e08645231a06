"""Weights that are not finite are found by name."""

import pytest
import torch
from torch import nn

from ldm_core.weights.finite import check_finite


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))


def test_finite_weights_pass_however_large_and_stay_what_they_are() -> None:
    whole = network()
    with torch.no_grad():
        whole[0].weight.fill_(torch.finfo(torch.float32).max)
        whole[2].weight.fill_(-torch.finfo(torch.float32).tiny)
    before = {name: tensor.clone() for name, tensor in whole.state_dict().items()}
    check_finite(whole)
    check_finite(nn.Identity())
    torch.testing.assert_close(whole.state_dict(), before, rtol=0, atol=0)


def test_weights_without_data_are_passed_over_and_the_others_are_not() -> None:
    check_finite(network().to("meta"))
    half_loaded = nn.Sequential(nn.Linear(2, 3, device="meta"), nn.Linear(3, 1))
    check_finite(half_loaded)
    nn.init.constant_(half_loaded[1].bias, float("nan"))
    with pytest.raises(ValueError, match=r"1 of 2 tensors hold NaN or infinity \(1\.bias\)"):
        check_finite(half_loaded)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_and_buffers_that_are_not_finite_are_named(value: float) -> None:
    broken = network()
    with torch.no_grad():
        broken[0].weight[1, 1] = value
        broken[1].running_var[0] = value
    with pytest.raises(ValueError, match=r"2 of 8 tensors hold NaN or infinity \(0\.weight, 1\.running_var\)"):
        check_finite(broken)


def test_a_long_list_is_cut() -> None:
    broken = nn.Sequential(*(nn.Linear(1, 1) for _ in range(4)))
    with torch.no_grad():
        for weight in broken.parameters():
            weight.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"8 of 8 tensors .*2\.weight, \.\.\.\)"):
        check_finite(broken)
