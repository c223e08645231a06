"""The UNet: its inputs, its prediction, and the shapes that it refuses."""

import copy
import dataclasses
import json
from typing import Any

import pytest
import torch

from ldm_core.configs.unet import UNetConfig
from ldm_core.networks import attention
from ldm_core.networks.attention import SelfAttentionBlock, SpatialTransformer, attend
from ldm_core.networks.blocks import TimestepEmbedding, sinusoidal_embedding
from ldm_core.networks.unet import UNet
from tests.random_weights import randomized


def config(**changes: Any) -> UNetConfig:
    base: dict[str, Any] = {
        "latent_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": 32,
        "num_res_blocks": 1,
        "channel_mult": (1, 2),
        "attention_downsampling": (2,),
        "num_heads": 4,
    }
    return UNetConfig(**(base | changes))


def randomized_unet(unet_config: UNetConfig) -> UNet:
    return randomized(UNet(unet_config)).eval()


def test_untrained_unet_predicts_zero() -> None:
    unet = UNet(config(context_dim=6))
    prediction = unet(torch.randn(2, 4, 8, 8), torch.tensor([0, 999]), context=torch.randn(2, 3, 6))
    assert prediction.shape == (2, 4, 8, 8)
    assert not prediction.any()


def test_prediction_depends_on_timestep_and_context_of_its_own_sample_only() -> None:
    unet = randomized_unet(config(context_dim=6))
    z, t, context = torch.randn(2, 4, 8, 8), torch.tensor([5, 700]), torch.randn(2, 3, 6)
    base = unet(z, t, context=context)
    other_time = unet(z, torch.tensor([5, 20]), context=context)
    other_context = unet(z, t, context=torch.cat([context[:1], -context[1:]]))
    for changed in (other_time, other_context):
        assert torch.allclose(changed[0], base[0], atol=1e-5)
        assert (changed[1] - base[1]).abs().max() > 1e-3


@pytest.mark.parametrize("changes", [{}, {"resblock_up_down": True, "transformer_depth": 2}])
def test_prepared_context_gives_the_prediction_of_the_context_itself(changes: dict[str, Any]) -> None:
    unet = randomized_unet(config(context_dim=6, attention_downsampling=(1,), **changes))
    z, t, context = torch.randn(2, 4, 8, 8), torch.tensor([5, 700]), torch.randn(2, 3, 6)
    with torch.no_grad():
        expected = unet(z, t, context=context)
        torch.testing.assert_close(unet(z, t, context=unet.prepare_context(context)), expected)


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("changes", [{}, {"attention_downsampling": (1, 2)}, {"resblock_up_down": True}])
def test_several_contexts_may_share_a_latent(changes: dict[str, Any], prepared: bool) -> None:
    unet = randomized_unet(config(context_dim=6, in_channels=5, **changes))
    z, t, concat, contexts = (
        torch.randn(2, 4, 8, 8),
        torch.tensor([5, 700]),
        torch.randn(2, 1, 8, 8),
        torch.randn(6, 3, 6),
    )
    with torch.no_grad():
        expected = unet(torch.cat([z] * 3), torch.cat([t] * 3), context=contexts, concat=torch.cat([concat] * 3))
        shared = unet(z, t, context=unet.prepare_context(contexts) if prepared else contexts, concat=concat)
    torch.testing.assert_close(shared, expected, rtol=1e-4, atol=1e-4)


def test_layers_before_the_first_context_are_computed_once_for_all() -> None:
    unet = randomized_unet(config(context_dim=6))
    batches: list[int] = []
    for block in (unet.input_blocks[0], unet.output_blocks[-1]):
        block.register_forward_pre_hook(lambda _, args: batches.append(args[0].shape[0]))
    unet(torch.randn(1, 4, 8, 8), torch.tensor([5]), context=torch.randn(2, 3, 6))
    assert batches == [1, 2]


def test_gradients_reach_a_context_that_was_prepared() -> None:
    unet = randomized_unet(config(context_dim=6))
    z, t = torch.randn(1, 4, 8, 8), torch.tensor([5])
    plain, prepared = (torch.ones(1, 3, 6, requires_grad=True) for _ in range(2))
    unet(z, t, context=plain).sum().backward()
    unet(z, t, context=unet.prepare_context(prepared)).sum().backward()
    assert plain.grad is not None
    assert plain.grad.any()
    torch.testing.assert_close(prepared.grad, plain.grad)


@pytest.mark.parametrize("prepared", [False, True])
def test_the_compiler_sees_one_graph(prepared: bool) -> None:
    unet = randomized_unet(config(context_dim=6))
    z, t, context = torch.randn(1, 4, 8, 8), torch.tensor([5]), torch.randn(2, 3, 6)
    compiled = torch.compile(unet, backend="eager", fullgraph=True)
    with torch.no_grad():
        given = unet.prepare_context(context) if prepared else context
        torch.testing.assert_close(compiled(z, t, context=given), unet(z, t, context=given))


def test_half_precision_weights_take_full_precision_latents_and_contexts() -> None:
    unet = randomized_unet(config(context_dim=6))
    z, t, context = torch.randn(2, 4, 8, 8), torch.tensor([5, 700]), torch.randn(2, 3, 6)
    with torch.no_grad():
        expected = unet(z, t, context=context)
        half_unet = copy.deepcopy(unet).bfloat16()
        half = half_unet(z, t, context=context)
        prepared = half_unet(z, t, context=half_unet.prepare_context(context))
        masked = half_unet(z, t, context=context, mask=torch.ones(2, 3, dtype=torch.bool))
        with torch.autocast("cpu", torch.bfloat16):
            autocast = unet(z, t, context=context)
    for prediction in (half, prepared, masked, autocast):
        assert prediction.dtype == torch.bfloat16
        assert (prediction.float() - expected).norm() < 0.05 * expected.norm()


def test_explicit_attention_of_cpus_in_half_precision_is_that_of_torch() -> None:
    query, key, value = (torch.randn(2, 3, n, 16, dtype=torch.bfloat16, requires_grad=True) for n in (5, 7, 7))
    exact = [each.detach().double().requires_grad_() for each in (query, key, value)]
    attend(query, key, value).sum().backward()
    torch.nn.functional.scaled_dot_product_attention(*exact).sum().backward()
    for ours, reference in zip((query, key, value), exact, strict=True):
        assert ours.grad is not None
        assert reference.grad is not None
        assert (ours.grad - reference.grad).norm() < 0.03 * value.grad.double().norm()  # type: ignore[union-attr]


def test_concat_conditioning_is_joined_after_the_latent() -> None:
    unet = randomized_unet(config(in_channels=7))
    z, concat, t = torch.randn(1, 4, 8, 8), torch.randn(1, 3, 8, 8), torch.tensor([5])
    assert torch.equal(unet(z, t, concat=concat), unet(torch.cat([z, concat], dim=1), t))


def test_attention_sits_at_the_configured_levels_and_in_the_middle() -> None:
    def kinds(unet: UNet) -> list[type]:
        blocks = [*unet.input_blocks, *unet.middle_blocks, *unet.output_blocks]
        return [type(block.attention) for block in blocks if block.attention is not None]

    cross = UNet(config(context_dim=6, channel_mult=(1, 1, 1), attention_downsampling=(4, 1)))
    assert kinds(cross) == [SpatialTransformer] * 7  # two levels: 1 block in, 2 out each; the middle
    assert kinds(UNet(config(attention_downsampling=(32, 16)))) == [SelfAttentionBlock]


def test_sizes_beyond_the_training_size_are_denoised() -> None:
    assert UNet(config())(torch.randn(1, 4, 16, 6), torch.tensor([5])).shape == (1, 4, 16, 6)


def test_activation_checkpointing_changes_no_gradient() -> None:
    plain = randomized_unet(config(context_dim=6)).train()
    recomputing = copy.deepcopy(plain)
    recomputing.activation_checkpointing = True
    z, t, context = torch.randn(2, 4, 8, 8), torch.tensor([5, 700]), torch.randn(2, 3, 6)
    calls = {}
    for unet in (plain, recomputing):
        calls[unet] = 0
        for block in unet.input_blocks:
            block.register_forward_pre_hook(lambda *_, unet=unet: calls.update({unet: calls[unet] + 1}))
        unet(z, t, context=context).square().mean().backward()
    assert calls[recomputing] == 2 * calls[plain], "each block is computed again in the backward pass"
    for (name, ours), other in zip(plain.named_parameters(), recomputing.parameters(), strict=True):
        assert ours.grad is not None
        assert other.grad is not None
        assert torch.allclose(ours.grad, other.grad, rtol=1e-4, atol=1e-7), name


def test_every_parameter_gets_a_gradient_as_ddp_requires() -> None:
    unet = randomized_unet(config(context_dim=6, resblock_up_down=True, use_scale_shift_norm=True))
    unet(torch.randn(1, 4, 8, 8), torch.tensor([5]), context=torch.randn(1, 3, 6)).sum().backward()
    assert [name for name, parameter in unet.named_parameters() if parameter.grad is None] == []


def test_the_timestep_embedding_is_exact_under_autocast() -> None:
    embedding = TimestepEmbedding(32)
    t = torch.tensor([998, 999])
    with torch.autocast("cpu", torch.bfloat16):
        found = embedding(t)
    assert torch.equal(found, embedding(t))


def test_timestep_embedding_has_cosines_first_and_period_10000() -> None:
    embedding = sinusoidal_embedding(torch.tensor([0, 7]), 4)
    assert embedding[0].tolist() == [1.0, 1.0, 0.0, 0.0]
    expected = [torch.tensor(x) for x in (7.0, 0.07)]
    assert torch.allclose(embedding[1], torch.stack([x.cos() for x in expected] + [x.sin() for x in expected]))


def test_self_attention_keeps_the_published_channel_order() -> None:
    block = SelfAttentionBlock(64, num_heads=4, zero_output=False)
    x = torch.randn(2, 64, 3, 5)
    fused = block.query_key_value(block.norm(x)).reshape(2 * 4, 3 * 16, 15)
    query, key, value = fused.split(16, dim=1)
    weights = torch.softmax(query.transpose(1, 2) @ key / 16**0.5, dim=-1)
    attended = (value @ weights.transpose(1, 2)).reshape(2, 64, 3, 5)
    assert torch.allclose(block(x), x + block.project_out(attended), atol=1e-5)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_self_attention_has_the_channels_of_a_head_side_by_side_as_fused_kernels_want_them(
    memory_format: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    strides: list[int] = []

    def watched(*arguments: torch.Tensor) -> torch.Tensor:
        strides.extend(each.stride(-1) for each in arguments)
        return attend(*arguments)

    monkeypatch.setattr(attention, "attend", watched)
    SelfAttentionBlock(64, num_heads=4)(torch.randn(2, 64, 3, 5).contiguous(memory_format=memory_format))
    assert strides == [1, 1, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"z": torch.zeros(4, 8, 8)}, r"z must be \(B, C, h, w\), got shape \(4, 8, 8\)"),
        ({"z": torch.zeros(1, 4, 7, 8)}, r"multiples of 2, got \(7, 8\)"),
        ({"z": torch.zeros(1, 3, 8, 8)}, r"must have 4 channels together, got 3"),
        ({"concat": torch.zeros(1, 1, 4, 4)}, r"concat must be .* got \(1, 1, 4, 4\)"),
        ({"t": torch.zeros(2, dtype=torch.long)}, r"t must be \(B,\) = \(1,\), got shape \(2,\)"),
        ({"z": torch.zeros(0, 4, 8, 8)}, r"z must be \(B, C, h, w\), got shape \(0, 4, 8, 8\)"),
        ({"z": torch.zeros(2, 4, 8, 8), "t": torch.zeros(2)}, r"B = 2 or a multiple, .* got \(1, 3, 6\)"),
        ({"context": None}, r"context_dim is set \(here 6\), got none"),
        ({"context": torch.zeros(1, 3, 5)}, r"here \(1, L, 6\), got \(1, 3, 5\)"),
    ],
)
def test_wrong_shapes_are_named(arguments: dict[str, Any], message: str) -> None:
    inputs: dict[str, Any] = {
        "z": torch.zeros(1, 4, 8, 8),
        "t": torch.zeros(1, dtype=torch.long),
        "context": torch.zeros(1, 3, 6),
    }
    inputs |= arguments
    with pytest.raises(ValueError, match=message):
        UNet(config(context_dim=6))(inputs.pop("z"), inputs.pop("t"), **inputs)


def test_contexts_that_cannot_be_prepared_or_were_prepared_for_others_are_named() -> None:
    unet, unconditional = UNet(config(context_dim=6)), UNet(config())
    with pytest.raises(ValueError, match=r"D = context_dim \(6\), got \(1, 3, 5\)"):
        unet.prepare_context(torch.zeros(1, 3, 5))
    with pytest.raises(ValueError, match=r"D = context_dim \(None\), got \(1, 3, 6\)"):
        unconditional.prepare_context(torch.zeros(1, 3, 6))
    prepared = unet.prepare_context(torch.zeros(3, 3, 6))
    z, t = torch.zeros(2, 4, 8, 8), torch.zeros(2)
    for other in (unet, unconditional):
        with pytest.raises(ValueError, match="for 2 samples or a multiple, got one for 3: prepare it anew"):
            other(z, t, context=prepared)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_channels": 48}, "model_channels must be a multiple of 32, got 48"),
        ({"num_head_channels": 8}, "exactly one of num_heads and num_head_channels, got num_heads=4"),
        ({"num_heads": None}, "exactly one of num_heads and num_head_channels, got num_heads=None"),
        ({"num_heads": 5}, "64 channels at an attention block do not divide by num_heads=5"),
        ({"latent_size": 9}, "latent_size must be a multiple of 2"),
        ({"channel_mult": ()}, r"channel_mult must list positive factors, got \(\)"),
        ({"num_res_blocks": 0}, "num_res_blocks must be at least 1, got 0"),
        ({"num_heads": 0}, "num_heads must be at least 1, got 0"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
    ],
)
def test_impossible_configurations_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**changes)


def test_configuration_survives_json() -> None:
    original = config(context_dim=6, attention_downsampling=(1, 2))
    assert UNetConfig(**json.loads(json.dumps(dataclasses.asdict(original)))) == original


def test_masked_places_of_a_context_are_not_seen() -> None:
    """Whatever stands there, and as if they were not there at all."""
    unet = randomized_unet(config(context_dim=6))
    z, t, context = torch.randn(2, 4, 8, 8), torch.tensor([1, 500]), torch.randn(2, 5, 6)
    mask = torch.tensor([[True, True, True, False, False]]).expand(2, -1)
    with torch.no_grad():
        expected = unet(z, t, context=context[:, :3])
        for changed in (context, torch.cat([context[:, :3], torch.full_like(context[:, 3:], 7.0)], dim=1)):
            torch.testing.assert_close(unet(z, t, context=changed, mask=mask), expected, rtol=1e-4, atol=1e-5)
            prepared = unet.prepare_context(changed, mask)
            torch.testing.assert_close(unet(z, t, context=prepared), expected, rtol=1e-4, atol=1e-5)
        assert (unet(z, t, context=context) - expected).abs().max() > 1e-3


def test_a_mask_of_another_shape_is_refused() -> None:
    unet = UNet(config(context_dim=6))
    context = torch.randn(2, 5, 6)
    with pytest.raises(ValueError, match=r"must be bool of shape \(2, 5\), got torch.bool of shape \(2, 4\)"):
        unet.prepare_context(context, torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="a mask goes with the context that it is of"):
        unet(torch.randn(2, 4, 8, 8), torch.ones(2), context=unet.prepare_context(context), mask=torch.ones(2, 5) > 0)
