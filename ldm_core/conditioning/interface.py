"""The interface of conditioners, and dropping the condition of some samples during training.

Shapes: context: (B, L, D) for cross-attention; mask: (B, L), true where the context is attended to; concat:
(B, Cc, h, w) extra channels beside the latent's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Encode = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Conditioning:
    """Output of a conditioner, input of the UNet.

    Args:
        context: (B, L, D) for cross-attention, or None.
        mask: (B, L) bool, which places of the context are attended to, at least one a sample; None for all.
        concat: (B, Cc, h, w) channels to concatenate with the latent's, or None.
    """

    context: Tensor | None = None
    mask: Tensor | None = None
    concat: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Shared:
    """Inputs that several samples have in common, such as the empty caption: a network encodes each of them once.

    Args:
        inputs: (K, ...) a conditioner's inputs.
        row: (B,) which of them each sample has.
    """

    inputs: Tensor
    row: Tensor


class Conditioner(nn.Module):
    """Maps a batch of inputs to a `Conditioning`; the `forward` of each kind says what its inputs are."""

    def unconditional(self) -> Tensor | None:
        """Return the null condition (1, ...) of classifier-free guidance, if this kind has one of its own.

        The null condition of captions is the empty caption, which only their tokenizer knows; pictures have none.
        """
        return None

    def __call__(self, inputs: Any) -> Conditioning:
        """Return the conditioning of a batch of inputs. Raises ValueError for inputs that are not of this kind."""
        conditioning: Conditioning = super().__call__(inputs)
        return conditioning


def drop(inputs: Tensor, unconditional: Tensor | None, probability: float, uniform: Tensor) -> Tensor:
    """Replace the condition of some samples by the null condition, to train the unconditional half of guidance.

    Works on a conditioner's inputs (token ids, class labels) and on cached contexts of a frozen encoder alike. The
    randomness is the caller's, so that training is reproducible from its own seed.

    Args:
        inputs: (B, ...) of any dtype.
        unconditional: the null condition, (...) or (1, ...): the empty caption's ids or context, the label "no class".
            Its values must fit inputs' dtype.
        probability: share of samples that lose their condition (Ho & Salimans 2021 use 0.1 to 0.2).
        uniform: (B,) numbers drawn uniformly from [0, 1).

    Returns:
        (B, ...) of inputs' dtype; sample i has lost its condition if uniform[i] < probability.

    Raises:
        ValueError: the probability is outside [0, 1], or shapes do not agree.
    """
    if not 0.0 <= probability <= 1.0:
        raise ValueError(f"the dropout probability must be between 0 and 1, got {probability}")
    if unconditional is None:
        raise ValueError(
            "drop needs the unconditional input, and this conditioner has none of its own: "
            "for captions give the ids of the empty one"
        )
    shapes = (inputs.shape[1:], (1, *inputs.shape[1:]))
    if uniform.shape != inputs.shape[:1] or unconditional.shape not in shapes:
        raise ValueError(
            "drop needs one uniform number a sample and one unconditional sample of the inputs' shape, got "
            f"inputs {tuple(inputs.shape)}, uniform {tuple(uniform.shape)}, unconditional {tuple(unconditional.shape)}"
        )
    dropped = (uniform < probability).view(-1, *[1] * (inputs.ndim - 1))
    return torch.where(dropped, unconditional.to(inputs).view(1, *inputs.shape[1:]), inputs)
