"""Captions' ids to the UNet's context, and dropping captions for classifier-free guidance."""

import pytest
import torch

from ldm_core.conditioning import TextConditioner, drop
from ldm_core.text_transformer import TextTransformerConfig

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
    with pytest.raises(ValueError, match=r"empty \(3,\)"):
        drop(TOKENS, EMPTY[:3], 0.5, torch.zeros(3))
