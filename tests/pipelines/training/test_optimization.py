"""Learning rate, clipping, wrapping."""

import pytest
import torch
from torch import nn

from ldm_core import presets
from ldm_core.networks.unet import UNet
from pipelines.training.config import TrainingConfig
from pipelines.training.optimization import build_optimizer, clip_gradient, learning_rate, wrap
from tests.random_weights import randomized


def config(**changes: object) -> TrainingConfig:
    return TrainingConfig.model_validate(
        {"steps": 100, "batch_size": 4, "learning_rate": 0.1, "warmup_steps": 10} | changes
    )


def test_the_rate_warms_up_linearly_then_stays() -> None:
    rates = [learning_rate(config(), step) for step in range(100)]
    assert rates[:10] == pytest.approx([0.01 * i for i in range(1, 11)])
    assert set(rates[10:]) == {0.1}


def test_the_cosine_ends_at_a_tenth() -> None:
    rates = [learning_rate(config(schedule="cosine"), step) for step in range(10, 101)]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] == pytest.approx(0.1)
    assert rates[45] == pytest.approx(0.055)
    assert rates[-1] == pytest.approx(0.01)


@pytest.mark.parametrize(("maximum", "after"), [(1.0, 1.0), (100.0, 50.0), (None, 50.0)])
def test_the_gradient_is_cut_to_its_maximum_norm(maximum: float | None, after: float) -> None:
    network = nn.Linear(2, 1, bias=False)
    network.weight.grad = torch.tensor([[30.0, 40.0]])
    assert float(clip_gradient([network.weight], maximum)) == pytest.approx(50.0)
    assert float(network.weight.grad.norm()) == pytest.approx(after, rel=1e-4)


def test_only_weights_with_gradients_are_optimised() -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False))
    optimizer = build_optimizer(network, config())
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 2


def test_activation_checkpointing_reaches_the_unet_and_changes_no_gradient() -> None:
    unet = randomized(UNet(presets.unet("tiny-txt2img")), std=0.05)
    z, t, context = torch.randn(2, 4, 8, 8), torch.tensor([3, 500]), torch.randn(2, 5, 128)
    gradients = []
    for checkpointing in (False, True):
        wrapped = wrap(unet, config(activation_checkpointing=checkpointing), world=1)
        assert unet.activation_checkpointing is checkpointing
        unet.zero_grad()
        wrapped(z, t, context=context).square().mean().backward()
        gradients.append([weight.grad.clone() for weight in unet.parameters() if weight.grad is not None])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"workers": 3}, r"must be one of 1, 2, 4, to share 4 partitions .*\(batch_size 4, at most 64\), got 3;"),
        ({"batch_size": 64, "partitions": 8, "workers": 16}, r"must be one of 1, 2, 4, 8, .* got 16;"),
    ],
)
def test_workers_that_cannot_share_the_samples_are_refused(values: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**values)


def test_as_many_workers_as_partitions_share_the_samples() -> None:
    assert config(batch_size=96, workers=48).workers == 48
