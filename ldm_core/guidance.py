"""Classifier-free guidance around a conditional denoiser (Ho & Salimans 2021; Sec. 4.3.1 of the paper).

Shapes: x: (B, C, h, w); t: (B,) integers; context: (B, L, D); concat: (B, Cc, h, w).
"""

import math
from typing import Protocol

import torch
from torch import Tensor

from ldm_core.samplers import Denoise


class ConditionalDenoise(Protocol):
    """Predicts the noise in x given a context; `LatentDiffusion.denoiser()` is one."""

    def __call__(
        self, x: Tensor, t: Tensor, *, context: Tensor | None = None, concat: Tensor | None = None
    ) -> Tensor: ...


def classifier_free(
    denoise_with_context: ConditionalDenoise,
    context: Tensor,
    unconditional_context: Tensor,
    guidance_scale: float,
    concat: Tensor | None = None,
) -> Denoise:
    """A `denoise(x, t)` that answers eps_u + guidance_scale * (eps_c - eps_u).

    Both halves are computed in one batched call; a scale of 1 is the plain conditional model and skips the
    unconditional half.

    Args:
        denoise_with_context: conditional noise prediction.
        context: (B, L, D) or (1, L, D) conditioning.
        unconditional_context: (B, L, D) or (1, L, D) conditioning of the empty caption.
        guidance_scale: strength; 0 is unconditional, 1 conditional, more is guided.
        concat: (B, Cc, h, w) or (1, Cc, h, w) channels given to both halves.

    Raises:
        ValueError: for a scale that is not finite, contexts that differ in length or width, or (on call) a
            context whose batch is neither 1 nor x's.
    """
    if not math.isfinite(guidance_scale):
        raise ValueError(f"guidance_scale must be a finite number, got {guidance_scale}")
    if context.dim() != 3 or context.shape[1:] != unconditional_context.shape[1:]:
        raise ValueError(
            "context and unconditional_context must be (batch, length, width), alike in length and width, "
            f"got {tuple(context.shape)} and {tuple(unconditional_context.shape)}: tokenize both alike"
        )

    def conditional(x: Tensor, t: Tensor) -> Tensor:
        return denoise_with_context(
            x, t, context=_for_batch(context, x, "context"), concat=_optional_for_batch(concat, x)
        )

    def guided(x: Tensor, t: Tensor) -> Tensor:
        both = torch.cat(
            [
                _for_batch(unconditional_context, x, "unconditional_context"),
                _for_batch(context, x, "context"),
            ]
        )
        channels = _optional_for_batch(concat, x)
        eps_unconditional, eps_conditional = denoise_with_context(
            torch.cat([x, x]),
            torch.cat([t, t]),
            context=both,
            concat=None if channels is None else torch.cat([channels, channels]),
        ).chunk(2)
        return eps_unconditional + guidance_scale * (eps_conditional - eps_unconditional)

    return conditional if guidance_scale == 1.0 else guided


def _for_batch(conditioning: Tensor, x: Tensor, name: str) -> Tensor:
    """Conditioning repeated to x's batch, where it is one for all."""
    if conditioning.shape[0] not in (1, x.shape[0]):
        raise ValueError(
            f"{name} must hold one entry, or one for each of the {x.shape[0]} samples, got {conditioning.shape[0]}"
        )
    return conditioning.expand(x.shape[0], *conditioning.shape[1:])


def _optional_for_batch(concat: Tensor | None, x: Tensor) -> Tensor | None:
    return None if concat is None else _for_batch(concat, x, "concat")
