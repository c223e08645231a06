"""Conditioners of every kind: their outputs, their refusals, and dropping conditions for classifier-free guidance."""

import dataclasses
import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from ldm_core import presets
from ldm_core.conditioning import (
    ClassConditioner,
    FrozenTextConditioner,
    MaskedImage,
    MaskedLatent,
    SemanticMapConditioner,
    TextConditioner,
    drop,
)
from ldm_core.conditioning.build import build_conditioner
from ldm_core.configs.conditioning import (
    Box,
    ClassConfig,
    LayoutConfig,
    SemanticMapConfig,
    conditioner_from_dict,
    conditioner_to_dict,
)
from ldm_core.configs.text import ClipTextConfig, FrozenTextConfig, JoinedTextConfig, TextTransformerConfig
from tests.random_weights import without_zeros

TOKENS = torch.arange(12).view(3, 4) + 1
EMPTY = torch.zeros(4, dtype=torch.long)


def test_the_text_conditioner_gives_a_context_and_nothing_to_concatenate() -> None:
    config = TextTransformerConfig(vocabulary_size=20, max_length=4, width=16, layers=1, heads=2, head_dim=8)
    conditioner = TextConditioner(config).eval()
    conditioning = conditioner(TOKENS)
    assert conditioning.context.shape == (3, 4, 16)
    assert conditioning.concat is None
    # Latent shards hold ids as uint16.
    torch.testing.assert_close(conditioner(TOKENS.to(torch.uint16)).context, conditioning.context)


def test_the_text_conditioner_masks_padding_if_it_knows_it_and_never_a_whole_caption() -> None:
    config = TextTransformerConfig(vocabulary_size=20, max_length=4, width=16, layers=1, pad_id=0)
    tokens = torch.tensor([[5, 6, 0, 0], [0, 0, 0, 0]])
    assert TextConditioner(config)(tokens).mask.tolist() == [[True, True, False, False], [True, False, False, False]]
    assert TextConditioner(dataclasses.replace(config, pad_id=None))(tokens).mask is None


@pytest.mark.parametrize("dtype", [torch.long, torch.int32, torch.uint16])
def test_captions_below_the_probability_are_replaced_whole(dtype: torch.dtype) -> None:
    dropped = drop(TOKENS.to(dtype), EMPTY, 0.5, torch.tensor([0.49, 0.5, 0.0]))
    assert dropped.dtype == dtype
    assert dropped.tolist() == [[0, 0, 0, 0], [5, 6, 7, 8], [0, 0, 0, 0]]


def test_probability_zero_drops_nothing_and_one_everything() -> None:
    uniform = torch.tensor([0.0, 0.5, 0.999999])
    assert torch.equal(drop(TOKENS, EMPTY, 0.0, uniform), TOKENS)
    assert drop(TOKENS, EMPTY.view(1, 4), 1.0, uniform).sum() == 0


def test_shapes_and_probabilities_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match=r"between 0 and 1, got 1\.5"):
        drop(TOKENS, EMPTY, 1.5, torch.zeros(3))
    with pytest.raises(ValueError, match=r"one uniform number a sample .* uniform \(2,\)"):
        drop(TOKENS, EMPTY, 0.5, torch.zeros(2))
    with pytest.raises(ValueError, match=r"unconditional \(3,\)"):
        drop(TOKENS, EMPTY[:3], 0.5, torch.zeros(3))


def test_labels_and_cached_contexts_are_dropped_alike() -> None:
    uniform = torch.tensor([0.0, 0.9])
    assert drop(torch.tensor([3, 4]), torch.tensor(10), 0.5, uniform).tolist() == [10, 4]
    context = torch.randn(2, 5, 8)
    dropped = drop(context, torch.zeros(1, 5, 8), 0.5, uniform)
    assert torch.equal(dropped[1], context[1])
    assert not dropped[0].any()


def test_a_class_is_one_vector_of_context() -> None:
    conditioner = ClassConditioner(ClassConfig(classes=5, width=8, unconditional_class=True))
    context = conditioner(torch.tensor([4, 0])).context
    assert context is not None
    assert torch.equal(context[:, 0], conditioner.embedding.weight[[4, 0]])
    assert conditioner.unconditional().tolist() == [4]  # type: ignore[union-attr]
    assert ClassConditioner(ClassConfig(classes=5, width=8)).unconditional() is None
    with pytest.raises(ValueError, match=r"labels must be integers of shape \(B,\), got torch\.float32"):
        conditioner(torch.zeros(2))


def test_a_layout_has_three_tokens_per_object_and_two_for_the_crop() -> None:
    """Worked out by hand: 8192 tokens make a grid of 90 cells per side; token = 90 row + column."""
    config = LayoutConfig(width=8, layers=1)
    assert config.max_length == 92
    tokens = config.encode(
        [Box(label=17, x=0.0, y=0.0, width=1.0, height=1.0), Box(label=3, x=0.25, y=0.5, width=0.5, height=0.25)],
        crop=Box(x=0.0, y=0.1, width=1.0, height=0.9),
    ).tolist()
    assert tokens[:3] == [17, 0, 89 * 90 + 89]
    # 0.25 * 89 = 22.25, 0.5 * 89 = 44.5 (to the even 44), 0.75 * 89 = 66.75
    assert tokens[3:6] == [3, 44 * 90 + 22, 67 * 90 + 67]
    assert tokens[6:90] == [8191] * 84
    assert tokens[90:] == [9 * 90, 89 * 90 + 89]
    assert config.encode([]).tolist()[:90] == [8191] * 90


@pytest.mark.parametrize(
    ("objects", "message"),
    [
        ([{"x": 0.5, "y": 0, "width": 0.6, "height": 0.1}], r"inside the image.*x=0\.5.*width=0\.6"),
        ([{"x": 0, "y": 0, "width": 0.1, "height": 0.1, "label": 8191}], r"in 0 \.\.\. 8190, got 8191"),
        ([{"x": 0, "y": 0, "width": 0.1, "height": 0.1}] * 31, "at most 30 objects, got 31"),
    ],
)
def test_layouts_that_make_no_sense_are_refused(objects: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LayoutConfig(width=8, layers=1).encode([Box(**each) for each in objects])


def test_a_semantic_map_is_halved_and_mapped_to_few_channels() -> None:
    conditioner = SemanticMapConditioner(SemanticMapConfig(classes=4, halvings=2))
    labels = torch.randint(0, 4, (2, 16, 24))
    concat = conditioner(labels).concat
    one_hot = F.one_hot(labels, 4).movedim(-1, 1).float()
    # Halving bilinearly is averaging 2x2 pixels; twice, 4x4.
    expected = torch.einsum("oc,bchw->bohw", conditioner.channel_mapper.weight[:, :, 0, 0], F.avg_pool2d(one_hot, 4))
    torch.testing.assert_close(concat, expected)
    torch.testing.assert_close(conditioner(one_hot).concat, expected)
    with pytest.raises(ValueError, match=r"multiples of 4, got torch\.int64 of shape \(2, 16, 22\)"):
        conditioner(labels[:, :, :22])


def test_a_masked_image_becomes_a_latent_and_a_mask_and_hides_what_is_masked() -> None:
    model = dataclasses.replace(presets.get("tiny-inpainting"), scale_factor=0.5).build().eval()
    assert model.conditioner is not None
    image, mask = torch.rand(1, 3, 64, 64) * 2 - 1, torch.zeros(1, 1, 64, 64)
    mask[:, :, :32] = 1
    concat = model.conditioner(MaskedImage(image=image, mask=mask)).concat
    assert concat is not None
    assert concat.shape == (1, 4, 16, 16)
    assert concat[0, 3, 0, 0] == 1
    assert concat[0, 3, -1, -1] == -1
    hidden = torch.where(mask > 0.5, 0.3, image)
    assert torch.equal(model.conditioner(MaskedImage(image=hidden, mask=mask)).concat, concat)
    # As published: the first stage's latent, whatever the model's scale factor.
    expected = model.first_stage.encode(torch.where(mask > 0.5, -1.0, image)).mode()
    torch.testing.assert_close(concat[:, :3], expected)
    with pytest.raises(ValueError, match=r"must hold only 1 .* got values between 0 and 0\.4"):
        model.conditioner(MaskedImage(image=image, mask=0.4 * mask))
    with pytest.raises(ValueError, match=r"got mask \(1, 1, 32, 32\) and image \(1, 3, 64, 64\)"):
        model.conditioner(MaskedImage(image=image, mask=mask[:, :, :32, :32]))


def test_a_network_without_a_first_stage_refuses_masked_images_and_learns_from_masked_latents() -> None:
    network = presets.get("tiny-inpainting").build_network()
    assert network.conditioner is not None
    with pytest.raises(ValueError, match="build the whole model, not its network alone, or give a MaskedLatent"):
        network.conditioner(MaskedImage(image=torch.zeros(1, 3, 64, 64), mask=torch.zeros(1, 1, 64, 64)))
    without_zeros(network.unet, std=0.1)
    z, t, latent = torch.randn(2, 3, 16, 16), torch.tensor([1, 500]), torch.randn(2, 3, 16, 16)
    mask = torch.zeros(1, 1, 16, 16, dtype=torch.uint8)
    kept, filled = (network(z, t, MaskedLatent(latent=latent, mask=each)) for each in (mask, 1 - mask))
    assert not torch.allclose(kept, filled)
    kept.square().mean().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
    with pytest.raises(ValueError, match=r"got mask \(1, 1, 16, 16\) and latent \(2, 3, 8, 8\)"):
        MaskedLatent(latent=latent[:, :, :8, :8], mask=mask)


def test_a_mask_is_read_when_inputs_are_made_and_not_again() -> None:
    model = presets.get("tiny-inpainting").build().eval()
    assert model.conditioner is not None
    inputs = MaskedImage(image=torch.zeros(1, 3, 64, 64), mask=torch.ones(1, 1, 64, 64))
    # Tensors on the meta device have no values to read.
    moved = dataclasses.replace(inputs, image=inputs.image.to("meta"), mask=inputs.mask.to("meta"))
    concat = model.to("meta").conditioner(moved).concat
    assert concat is not None
    assert concat.shape == (1, 4, 16, 16)


def inputs_of(name: str) -> Any:
    """Return a batch of two inputs for a tiny model of each kind."""
    config = presets.get(name).conditioner
    return {
        "tiny-txt2img": lambda: torch.randint(0, 1024, (2, 77)),
        "tiny-sd": lambda: torch.randint(0, 1024, (2, 77)),
        "tiny-class": lambda: torch.tensor([1, 2]),
        "tiny-layout": lambda: torch.stack([config.encode([]), config.encode([Box(x=0, y=0, width=1, height=1)])]),  # type: ignore[union-attr]
        "tiny-semantic": lambda: torch.randint(0, 12, (2, 64, 64)),
        "tiny-super-resolution": lambda: torch.rand(2, 3, 16, 16),
        "tiny-inpainting": lambda: MaskedImage(image=torch.rand(2, 3, 64, 64), mask=torch.ones(2, 1, 64, 64)),
        "tiny-uncond": lambda: None,
    }[name]()


@pytest.mark.parametrize("name", [name for name in presets.names() if name.startswith("tiny-")])
def test_every_kind_of_model_samples(name: str) -> None:
    model = presets.get(name).build().eval()
    images = model.sample(inputs_of(name), seeds=[0, 1], num_steps=1)
    assert images.shape == (2, 3, 64, 64)
    assert images.isfinite().all()


@pytest.mark.parametrize("name", ["tiny-class", "tiny-layout"])
def test_conditioners_that_know_the_empty_input_guide_without_being_given_it(name: str) -> None:
    model = presets.get(name).build().eval()
    without_zeros(model.unet, std=0.1)  # what starts at zero would hide the context
    plain, guided = (model.sample(inputs_of(name), seeds=[0, 1], num_steps=2, guidance_scale=s) for s in (1.0, 4.0))
    assert not torch.allclose(plain, guided)


def test_a_frozen_encoder_has_no_gradients_and_stays_in_evaluation_mode() -> None:
    bert = {"model_type": "bert", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    bert |= {"intermediate_size": 32, "vocab_size": 50, "max_position_embeddings": 8}
    conditioner = build_conditioner(FrozenTextConfig(architecture=bert, width=16, max_length=8)).train()
    assert isinstance(conditioner, FrozenTextConditioner)
    assert not conditioner.training
    assert not any(module.training for module in conditioner.modules())
    assert not any(parameter.requires_grad for parameter in conditioner.parameters())
    tokens = torch.tensor([[5, 6, 7, 0, 0], [5, 6, 7, 8, 9]])
    context = conditioner(tokens).context
    assert context is not None
    assert not context.requires_grad
    # Padding is not attended to: the first caption's tokens do not change with it.
    torch.testing.assert_close(context[:1, :3], conditioner(tokens[:1, :3]).context)
    with pytest.raises(ValueError, match=r"L <= 8, got torch\.int64 of shape \(1, 9\)"):
        conditioner(torch.zeros(1, 9, dtype=torch.long))


def bert(width: int, max_length: int = 8) -> FrozenTextConfig:
    settings = {"model_type": "bert", "hidden_size": width, "num_hidden_layers": 1, "num_attention_heads": 2}
    settings |= {"intermediate_size": 32, "vocab_size": 50, "max_position_embeddings": max_length}
    return FrozenTextConfig(architecture=settings, width=width, max_length=max_length, mask_padding=True)


def test_frozen_encoders_side_by_side_are_attended_to_where_either_has_a_token() -> None:
    config = JoinedTextConfig(encoders=(bert(16), bert(24)))
    conditioner = build_conditioner(config).train()
    assert not any(module.training for module in conditioner.modules())
    assert (config.width, config.max_length, config.mask_padding) == (40, 8, True)
    tokens = torch.tensor([[[5, 6, 0, 7, 0], [5, 6, 0, 0, 0]], [[5, 0, 0, 0, 0], [5, 6, 7, 8, 0]]])
    given = conditioner(tokens)
    assert given.mask.tolist() == [[True, True, True, False, False], [True, True, True, True, False]]
    first, second = (encoder(ids) for encoder, ids in zip(conditioner.encoders, tokens.unbind(1), strict=True))
    # Tokens of the first, without what its tokenizer calls padding between them, and nothing after its last one.
    torch.testing.assert_close(given.context[0, :3, :16], first.context[0, [0, 1, 3]])
    assert given.context[0, 3:, :16].abs().sum() == 0
    torch.testing.assert_close(given.context[1, :4, 16:], second.context[1, :4])
    with pytest.raises(
        ValueError, match=r"must have the shape \(B, 2, L\), those of each encoder's tokenizer, got \(2, 5\)"
    ):
        conditioner(tokens[:, 0])


def test_frozen_encoders_of_captions_of_other_lengths_do_not_stand_side_by_side() -> None:
    with pytest.raises(ValueError, match="as many tokens of a caption, got max_length 8 and 9: set it to 8 for all"):
        JoinedTextConfig(encoders=(bert(16), bert(16, max_length=9)))
    with pytest.raises(ValueError, match="must be two or more, got 1"):
        JoinedTextConfig(encoders=(bert(16),))


def test_a_configuration_of_two_encoders_comes_back_from_json() -> None:
    config = JoinedTextConfig(encoders=(ClipTextConfig(max_length=8), bert(24)))
    values = json.loads(json.dumps(conditioner_to_dict(config)))
    assert conditioner_from_dict(values) == config
    values["encoders"][1]["widht"] = 3
    with pytest.raises(ValueError, match=r"conditioner\.encoders\.1 has no setting 'widht', did you mean 'width'"):
        conditioner_from_dict(values)


def test_encoders_that_transformers_does_not_know_or_of_another_width_are_refused() -> None:
    with pytest.raises(ValueError, match="it has no model_type 'berd'"):
        build_conditioner(FrozenTextConfig(architecture={"model_type": "berd"}, width=16, max_length=8))
    with pytest.raises(ValueError, match="must be the context's width 16, got 768"):
        build_conditioner(FrozenTextConfig(architecture={"model_type": "bert"}, width=16, max_length=8))
    with pytest.raises(ValueError, match="it has no 'model_type'"):
        FrozenTextConfig(architecture={}, width=16, max_length=8)


@pytest.mark.parametrize(
    ("name", "inputs", "message"),
    [
        ("tiny-class", torch.tensor([11]), r"labels must be in 0 \.\.\. 10, got 11 \.\.\. 11"),
        ("tiny-txt2img", torch.full((1, 77), 1024), r"token ids must be in 0 \.\.\. 1023"),
        ("tiny-sd", torch.full((1, 77), -1), r"token ids must be in 0 \.\.\. 1023, got -1"),
        ("tiny-semantic", torch.full((1, 64, 64), 255), r"labels of a semantic map must be in 0 \.\.\. 11"),
    ],
)
def test_ids_outside_the_table_are_named(name: str, inputs: torch.Tensor, message: str) -> None:
    conditioner = presets.get(name).build().conditioner
    assert conditioner is not None
    with pytest.raises(ValueError, match=message):
        conditioner(inputs)


def test_dropping_needs_an_unconditional_input() -> None:
    with pytest.raises(ValueError, match="for captions give the ids of the empty one"):
        drop(TOKENS, None, 0.5, torch.zeros(3))
    with pytest.raises(ValueError, match="one unconditional sample of the inputs' shape"):
        drop(torch.zeros(2, 7, 4), torch.zeros(4, 7), 0.5, torch.zeros(2))
