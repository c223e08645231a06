"""Weights that are not finite are found by name."""

import pytest
import torch
from torch import nn

from ldm_core.weights.finite import check_finite


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))


def test_finite_weights_pass_and_so_do_no_weights_and_meta_weights() -> None:
    check_finite(network())
    check_finite(nn.Identity())
    check_finite(network().to("meta"))


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
