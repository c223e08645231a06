"""Learning rate, clipping, wrapping."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from ldm_core import presets
from pipelines.training.config import TrainingConfig
from pipelines.training.optimization import build_optimizer, learning_rate, optimize, prepare_network
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
    optimizer = build_optimizer(network, config(betas=(0.9, 0.999)))
    assert float(optimize(optimizer, maximum)) == pytest.approx(50.0)
    # Of which AdamW keeps a tenth.
    assert float(optimizer.state[network.weight]["exp_avg"].norm()) == pytest.approx(0.1 * after, rel=1e-4)


@pytest.mark.parametrize("maximum", [1.0, None])
def test_a_gradient_that_is_not_finite_changes_nothing(maximum: float | None) -> None:
    network = nn.Linear(2, 1, bias=False)
    before = network.weight.detach().clone()
    network.weight.grad = torch.tensor([[1.0, torch.nan]])
    optimizer = build_optimizer(network, config())
    assert not optimize(optimizer, maximum).isfinite()
    assert torch.equal(network.weight, before)
    assert optimizer.state[network.weight]["step"] == 0
    network.weight.grad = torch.tensor([[1.0, 1.0]])
    assert optimize(optimizer, maximum).isfinite()
    assert not torch.equal(network.weight, before)
    assert network.weight.isfinite().all()


def test_only_weights_with_gradients_are_optimised() -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False))
    optimizer = build_optimizer(network, config())
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 2


def test_activation_checkpointing_reaches_unet_and_text_transformer_and_changes_no_gradient() -> None:
    preset = presets.get("tiny-txt2img")
    small = replace(preset.unet, model_channels=32, num_res_blocks=1, channel_mult=(1,), attention_downsampling=(1,))
    network = randomized(replace(preset, unet=small).build_network(), std=0.05)
    kept: list[int] = []

    def keep(x: Tensor) -> Tensor:
        kept.append(x.numel())
        return x

    def gradients(checkpointing: bool) -> dict[str, Tensor | None]:
        prepare_network(network, config(activation_checkpointing=checkpointing))
        network.zero_grad()
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            loss = network(torch.ones(2, 4, 4, 4), torch.tensor([3, 500]), torch.arange(10).view(2, 5)).square().mean()
        loss.backward()
        return {name: weight.grad for name, weight in network.named_parameters()}

    plain, all_kept = gradients(False), sum(kept)
    torch.testing.assert_close(gradients(True), plain)
    # Of the transformer's layers and of the UNet's blocks hardly more than their inputs.
    assert sum(kept) < 0.3 * all_kept


@pytest.mark.parametrize(("precision", "chosen"), [("fp32", "fp32"), ("bf16", "bf16"), ("auto", "bf16")])
def test_the_recipe_decides_about_precision_and_only_by_auto_the_machine(
    precision: str, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ldm_core.prepare.has_bf16", lambda device: True)
    prepared = prepare_network(nn.Linear(2, 1), config(precision=precision))
    assert prepared.precision == chosen
    assert not prepared.compiled


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
