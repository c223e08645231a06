"""Conditioners: from what a user gives to what the UNet takes (Sec. 3.3 of the paper, tau_theta).

Shapes: tokens: (B, L) integer ids; context: (B, L, D) for cross-attention; concat: (B, Cc, h, w) extra
channels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ldm_core.text_transformer import TextTransformer, TextTransformerConfig


@dataclass(frozen=True, kw_only=True)
class Conditioning:
    """What a conditioner gives the UNet.

    Args:
        context: (B, L, D) for cross-attention, or None.
        concat: (B, Cc, h, w) to concatenate with the latent's channels, or None.
    """

    context: Tensor | None = None
    concat: Tensor | None = None


class TextConditioner(nn.Module):
    """The text transformer that is trained jointly with the UNet (Sec. 4.3.1)."""

    def __init__(self, config: TextTransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.transformer = TextTransformer(config)

    def forward(self, tokens: Tensor) -> Conditioning:
        """Ids (B, L) of any integer type -> context (B, L, D). Raises ValueError as the transformer does."""
        return Conditioning(context=self.transformer(tokens))


def drop(tokens: Tensor, empty_tokens: Tensor, probability: float, uniform: Tensor) -> Tensor:
    """Replace the captions of some samples by the empty one, to train the unconditional half of guidance.

    The randomness is the caller's, so that training is reproducible from its own seed.

    Args:
        tokens: (B, L) ids.
        empty_tokens: (L,) or (1, L) ids of the empty caption.
        probability: share of samples to drop (Ho & Salimans 2021 use 0.1 to 0.2).
        uniform: (B,) numbers drawn uniformly from [0, 1).

    Returns:
        (B, L) ids of tokens' type; sample i is dropped where uniform[i] < probability.

    Raises:
        ValueError: for a probability outside [0, 1] or shapes that do not agree.
    """
    if not 0.0 <= probability <= 1.0:
        raise ValueError(f"the dropout probability must be between 0 and 1, got {probability}")
    if uniform.shape != tokens.shape[:1] or empty_tokens.numel() != tokens.shape[1]:
        raise ValueError(
            "drop needs one uniform number a sample and an empty caption of the tokens' length, got "
            f"tokens {tuple(tokens.shape)}, uniform {tuple(uniform.shape)}, empty {tuple(empty_tokens.shape)}"
        )
    dropped = (uniform < probability).unsqueeze(1)
    return torch.where(dropped, empty_tokens.to(tokens).view(1, -1), tokens)
