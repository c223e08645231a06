"""Guidance: wrap a denoiser so that samples are pulled towards a condition, with any sampler.

Classifier-free guidance (Ho & Salimans 2021; Sec. 4.3.1 of the paper) and the paper's post-hoc image guidance
(Appendix C). A denoiser may return the noise or a `Prediction`; the wrapped one returns the same kind.

Shapes: x: (B, C, h, w); t: (B,) integers; context: (B, L, D); concat: (B, Cc, h, w).
"""

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from ldm_core.objective import Prediction
from ldm_core.samplers import Denoise
from ldm_core.schedule import NoiseSchedule


class ConditionalDenoise(Protocol):
    """Predicts the noise in x given a context; `LatentDiffusion.denoiser()` is one."""

    def __call__(
        self, x: Tensor, t: Tensor, *, context: Tensor | None = None, concat: Tensor | None = None
    ) -> Tensor | Prediction: ...


def classifier_free(
    denoise_with_context: ConditionalDenoise,
    context: Tensor | None,
    unconditional_context: Tensor | None,
    guidance_scale: float,
    concat: Tensor | None = None,
    *,
    unconditional_concat: Tensor | None = None,
    interval: tuple[int, int] | None = None,
    rescale: float = 0.0,
) -> Denoise:
    """Return a `denoise(x, t)` for classifier-free guidance: eps_u + guidance_scale * (eps_c - eps_u).

    eps_c is conditional and eps_u unconditional (Ho & Salimans 2021, Eq. 6, where w = guidance_scale - 1). Both are
    computed in one batched call; a scale of 1 is the plain conditional model and skips the unconditional half. The
    formula is linear, so that a network's own output (eps, v or x0) may be guided as well and converted afterwards by
    `objective.to_prediction`.

    Args:
        denoise_with_context: conditional denoiser.
        context: (B, L, D) or (1, L, D) conditioning; None for a model without cross-attention.
        unconditional_context: (B, L, D) or (1, L, D) null context, e.g. of the empty caption; None without context.
        guidance_scale: 0 is unconditional, 1 conditional, more is guided.
        concat: (B, Cc, h, w) or (1, Cc, h, w) channels given to both halves.
        unconditional_concat: channels of concat's shape given to the unconditional half instead.
        interval: (t_low, t_high), both inclusive, the timesteps to guide; at others the plain conditional model
            answers at half the cost (Kynkaanniemi et al. 2024). Reading t costs one device synchronisation a step.
            None guides everywhere.
        rescale: 0 to 1, share of the guided answer that is scaled back to the conditional one's standard deviation,
            against over-exposure (Lin et al. 2024, Sec. 3.4, who take 0.7 and rescale the network's own output).

    Raises:
        ValueError: for a scale that is not finite, contexts that differ in length or width, halves that cannot
            differ, t_low above t_high, or a rescale outside 0 to 1; when called, for conditioning whose batch is
            neither 1 nor x's, or a rescale of a `Prediction`.
    """
    check_settings(guidance_scale, interval, rescale)
    _check_halves(context, unconditional_context, concat, unconditional_concat, guided=guidance_scale != 1.0)
    other_concat = concat if unconditional_concat is None else unconditional_concat

    def conditional(x: Tensor, t: Tensor) -> Tensor | Prediction:
        return denoise_with_context(
            x, t, context=_for_batch(context, x, "context"), concat=_for_batch(concat, x, "concat")
        )

    def halves(x: Tensor, t: Tensor) -> tuple[Tensor | Prediction, Tensor | Prediction]:
        both = denoise_with_context(
            torch.cat([x, x]),
            torch.cat([t, t]),
            context=_both(
                _for_batch(unconditional_context, x, "unconditional_context"), _for_batch(context, x, "context")
            ),
            concat=_both(_for_batch(other_concat, x, "unconditional_concat"), _for_batch(concat, x, "concat")),
        )
        return _map(lambda half: half.chunk(2)[0], both), _map(lambda half: half.chunk(2)[1], both)

    return guide(conditional, halves, guidance_scale, interval=interval, rescale=rescale)


def guide(
    conditional: Denoise,
    halves: Callable[[Tensor, Tensor], tuple[Tensor | Prediction, Tensor | Prediction]],
    guidance_scale: float,
    *,
    interval: tuple[int, int] | None = None,
    rescale: float = 0.0,
) -> Denoise:
    """Apply the rule of classifier-free guidance to predictions, whatever computes them.

    `classifier_free` computes them with any conditional denoiser, `LatentDiffusion.guided_denoiser` with a UNet whose
    two halves share what they can.

    Args:
        conditional: predicts with the condition, where nothing is guided.
        halves: predicts without and with the condition, in this order.
        guidance_scale, interval, rescale: as for `classifier_free`; see `check_settings`.
    """

    def guided(x: Tensor, t: Tensor) -> Tensor | Prediction:
        # Samplers give one timestep to the whole batch.
        if interval is not None and not interval[0] <= int(t[0]) <= interval[1]:
            return conditional(x, t)
        return combine(*halves(x, t), guidance_scale, rescale=rescale)

    return conditional if guidance_scale == 1.0 else guided


def check_settings(guidance_scale: float, interval: tuple[int, int] | None, rescale: float) -> None:
    """Raise ValueError unless the settings of `classifier_free` are in range."""
    if not math.isfinite(guidance_scale):
        raise ValueError(f"guidance_scale must be a finite number, got {guidance_scale}")
    if not 0.0 <= rescale <= 1.0:
        raise ValueError(f"guidance rescale must be between 0 (none) and 1, got {rescale}")
    if interval is not None and not interval[0] <= interval[1]:
        raise ValueError(f"the guidance interval must be (t_low, t_high) with t_low <= t_high, got {interval}")


def combine(
    unconditional: Tensor | Prediction, conditional: Tensor | Prediction, guidance_scale: float, *, rescale: float = 0.0
) -> Tensor | Prediction:
    """Guide one answer by the other: u + guidance_scale * (c - u), then `rescale` as for `classifier_free`.

    Args:
        unconditional, conditional: answers (B, ...) of a network or a denoiser, both of the same kind.
        guidance_scale, rescale: as for `classifier_free`.

    Raises:
        ValueError: for a rescale of a `Prediction`.
    """
    answer = _map(lambda u, c: u + guidance_scale * (c - u), unconditional, conditional)
    return _rescaled(answer, conditional, rescale) if rescale else answer


def image_guidance(
    denoise: Denoise,
    schedule: NoiseSchedule,
    decode: Callable[[Tensor], Tensor],
    loss: Callable[[Tensor], Tensor],
    scale: float,
) -> Denoise:
    """Return a `denoise(x, t)` for post-hoc image guidance (Appendix C): any model, steered by a loss on its images.

        eps + scale * sqrt(1 - abar) * gradient of loss(decode(x0(x))) with respect to x

    Here -loss is log p(y | T(D(z_0(z_t)))). For a picture y known in low resolution it is half of the summed squared
    distance of the downsampled image to y. The gradient passes through decoder and network, which costs their
    backward pass. While x is all noise (zero terminal SNR) there is nothing to steer yet.

    Args:
        denoise: predicts the noise, or noise and clean latent; differentiable.
        schedule: forward process the network was trained on.
        decode: differentiable map from (B, C, h, w) clean latents to images, e.g. `LatentDiffusion.decode`.
        loss: map from images to (B,) losses, each of its own image alone.
        scale: strength of the guidance; 1 is the paper's, for a guider of variance 1.

    Raises:
        ValueError: for a scale that is not finite; when called, for a loss of another shape or without a gradient.
    """
    if not math.isfinite(scale):
        raise ValueError(f"the scale of image guidance must be a finite number, got {scale}")

    def guided(x: Tensor, t: Tensor) -> Tensor | Prediction:
        signal, sigma = schedule.levels(t, like=x)
        with torch.enable_grad():
            z_t = x.detach().requires_grad_()
            answer = denoise(z_t, t)
            x0 = answer.x0 if isinstance(answer, Prediction) else (z_t - sigma * answer) / signal
            losses = loss(decode(x0))
            if losses.shape != x.shape[:1]:
                raise ValueError(
                    f"the loss of image guidance must be one number an image, ({len(x)},), got {tuple(losses.shape)}: "
                    "sum over channels and pixels only"
                )
            if not losses.requires_grad:
                raise ValueError(
                    "the loss of image guidance must have a gradient, got one without: decode and predict without "
                    "torch.no_grad or detach"
                )
            # Each loss depends on its own image alone, so the gradient of the sum holds those of all.
            (gradient,) = torch.autograd.grad(losses.sum(), z_t)
        answer = _map(torch.Tensor.detach, answer)
        shift = scale * sigma * gradient
        if not isinstance(answer, Prediction):
            return answer + shift
        # The clean latent moves along, so that signal x0 + sigma eps is still x; without signal it cannot be told.
        moves = signal > 0
        return Prediction(
            answer.eps + torch.where(moves, shift, 0.0),
            answer.x0 - torch.where(moves, sigma / signal * shift, 0.0),
        )

    return guided


def _rescaled(answer: Tensor | Prediction, conditional: Tensor | Prediction, share: float) -> Tensor:
    """Scale a share of the guided answer to the conditional one's standard deviation (Lin et al. 2024, Sec. 3.4)."""
    if isinstance(answer, Prediction) or isinstance(conditional, Prediction):
        raise ValueError(
            "guidance rescale needs the network's own output, got a Prediction: guide the output, then apply "
            "objective.to_prediction"
        )
    dims = list(range(1, answer.dim()))
    # An untrained network answers zero everywhere, and 0 / 0 would be NaN.
    tiny = torch.finfo(answer.dtype).tiny
    ratio = conditional.std(dim=dims, keepdim=True) / answer.std(dim=dims, keepdim=True).clamp_min(tiny)
    return share * (answer * ratio) + (1 - share) * answer


def _check_halves(
    context: Tensor | None,
    unconditional_context: Tensor | None,
    concat: Tensor | None,
    unconditional_concat: Tensor | None,
    *,
    guided: bool,
) -> None:
    """Raise ValueError unless the conditional and the unconditional half fit together, and can differ."""
    if context is not None and unconditional_context is not None:
        if context.dim() != 3 or context.shape[1:] != unconditional_context.shape[1:]:
            raise ValueError(
                "context and unconditional_context must be (batch, length, width), alike in length and width, "
                f"got {tuple(context.shape)} and {tuple(unconditional_context.shape)}: tokenize both alike"
            )
    elif guided and (context is not None or unconditional_context is not None):
        missing = "unconditional_context" if unconditional_context is None else "context"
        raise ValueError(f"guidance needs context and unconditional_context, or neither, got no {missing}")
    elif guided and (concat is None or unconditional_concat is None):
        raise ValueError("guidance without a context needs concat and unconditional_concat, got none of one or both")
    if unconditional_concat is not None and (concat is None or concat.shape[1:] != unconditional_concat.shape[1:]):
        raise ValueError(
            "unconditional_concat must be alike concat in channels and size, "
            f"got {tuple(unconditional_concat.shape)} for {None if concat is None else tuple(concat.shape)}"
        )


def _map(function: Callable[..., Tensor], *answers: Tensor | Prediction) -> Tensor | Prediction:
    """Apply a function of tensors to plain answers, or to both parts of predictions."""
    if isinstance(answers[0], Prediction):
        return Prediction(*(function(*parts) for parts in zip(*answers)))
    return function(*answers)


def _both(unconditional: Tensor | None, conditional: Tensor | None) -> Tensor | None:
    """Concatenate both halves to one batch."""
    return None if unconditional is None or conditional is None else torch.cat([unconditional, conditional])


def _for_batch(conditioning: Tensor | None, x: Tensor, name: str) -> Tensor | None:
    """Repeat conditioning that is one for all to x's batch."""
    if conditioning is None:
        return None
    if conditioning.shape[0] not in (1, x.shape[0]):
        raise ValueError(
            f"{name} must hold one entry, or one for each of the {x.shape[0]} samples, got {conditioning.shape[0]}"
        )
    return conditioning.expand(x.shape[0], *conditioning.shape[1:])
