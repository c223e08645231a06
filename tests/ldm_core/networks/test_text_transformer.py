"""The text transformer: one vector per token, in order, attending to all tokens."""

import pytest
import torch

from ldm_core.configs.text import TextTransformerConfig
from ldm_core.networks.text_transformer import TextTransformer

CONFIG = TextTransformerConfig(vocabulary_size=20, max_length=6, width=16, layers=2, heads=2, head_dim=4)


def build() -> TextTransformer:
    torch.manual_seed(0)
    return TextTransformer(CONFIG).eval()


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint16])
def test_tokens_of_any_integer_type_become_one_vector_each(dtype: torch.dtype) -> None:
    transformer = build()
    tokens = torch.tensor([[1, 2, 3], [4, 5, 6]])
    assert torch.equal(transformer(tokens.to(dtype)), transformer(tokens))
    assert transformer(tokens).shape == (2, 3, 16)


def test_every_token_sees_the_whole_caption_and_its_order() -> None:
    transformer = build()
    base = transformer(torch.tensor([[1, 2, 3, 0]]))
    last_changed = transformer(torch.tensor([[1, 2, 3, 9]]))
    swapped = transformer(torch.tensor([[2, 1, 3, 0]]))
    assert (last_changed[0, 0] - base[0, 0]).abs().max() > 1e-5
    assert (swapped[0, 2] - base[0, 2]).abs().max() > 1e-6


def test_output_head_is_frozen_and_everything_else_is_trained() -> None:
    transformer = build()
    transformer(torch.tensor([[1, 2, 3, 4, 5, 6]])).square().sum().backward()
    frozen = {name for name, each in transformer.named_parameters() if not each.requires_grad}
    assert frozen == {"output_head.weight", "output_head.bias"}
    without_gradient = {name for name, each in transformer.named_parameters() if each.grad is None}
    assert without_gradient == frozen


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.zeros(1, 7, dtype=torch.long), r"L <= 6, got torch.int64 of shape \(1, 7\)"),
        (torch.zeros(3, dtype=torch.long), r"of shape \(3,\)"),
        (torch.zeros(1, 3), r"got torch.float32"),
    ],
    ids=["too long", "no batch", "floating"],
)
def test_wrong_tokens_are_named(tokens: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()(tokens)


def test_impossible_configurations_are_refused() -> None:
    with pytest.raises(ValueError, match=r"TextTransformerConfig.layers must be positive, got 0"):
        TextTransformerConfig(vocabulary_size=20, width=16, layers=0)
