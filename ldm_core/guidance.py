"""Guidance: denoisers by which samples are pulled towards a condition, with any sampler.

Classifier-free guidance of a network (Ho & Salimans 2021; Sec. 4.3.1 of the paper), and the paper's post-hoc image
guidance of any denoiser (Appendix C).

Shapes: x: (B, C, h, w); t: (B,) timesteps; context: (B, L, D); concat: (B, Cc, h, w).
"""

import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from ldm_core.conditioning import Conditioning
from ldm_core.objective import Prediction
from ldm_core.samplers import Denoise
from ldm_core.schedule import NoiseSchedule

# A step of sampling: (x, t, context, concat) -> answer; and what runs it, perhaps by other means, e.g. a CUDA graph.
Step = Callable[[Tensor, Tensor, Any, Tensor | None], Tensor | Prediction]
Run = Callable[[Step, object, Tensor, Tensor, Any, Tensor | None], Tensor | Prediction]
Convert = Callable[[Tensor, Tensor, Tensor], Tensor | Prediction]


class Network(Protocol):
    """What guidance asks; a `UNet` is one, in which several contexts share what they can of one latent."""

    def prepare_context(self, context: Tensor, mask: Tensor | None = None) -> Any:
        """Return what is computed once of contexts (k * B, L, D), for `context` of a call."""
        ...

    def __call__(self, z: Tensor, t: Tensor, *, context: Any = None, concat: Tensor | None = None) -> Tensor:
        """(B, C, h, w), (B,) -> (k * B, C, h, w); of k * B contexts, number i goes with latent i modulo B."""
        ...


def run_step(step: Step, key: object, x: Tensor, t: Tensor, context: Any, concat: Tensor | None) -> Tensor | Prediction:
    """Run a step as it is; `prepare.StepGraphs` replays one that has this key."""
    return step(x, t, context, concat)


def classifier_free(
    network: Network,
    condition: Conditioning,
    null: Conditioning | None = None,
    guidance_scale: float = 1.0,
    *,
    interval: tuple[float, float] | None = None,
    rescale: float = 0.0,
    convert: Convert = lambda output, x, t: output,
    run: Run = run_step,
) -> Denoise:
    """Return a `denoise(x, t)` for classifier-free guidance: eps_u + guidance_scale * (eps_c - eps_u).

    eps_c is conditional and eps_u unconditional (Ho & Salimans 2021, Eq. 6, where w = guidance_scale - 1). Both are
    computed in one call, in which they share what comes before the first context; keys and values of the contexts are
    computed once, at the first call, after which the weights must not change. A scale of 1 is the plain conditional
    model and skips the unconditional half.

    Args:
        network: predicts eps, v, x0 or flow; guidance acts on its own output, as published for v (Lin et al. 2024).
        condition: of B samples.
        null: the null condition, e.g. of the empty caption, of one sample or of B; both have the condition's concat. It
            is needed unless the scale is 1.
        guidance_scale: 0 is unconditional, 1 conditional, more is guided.
        interval: (t_low, t_high), both inclusive, the timesteps to guide; at others the plain conditional model
            answers at half the cost (Kynkaanniemi et al. 2024). Reading t costs one device synchronisation a step.
            None guides everywhere.
        rescale: 0 to 1, share of the guided answer that is scaled back to the conditional one's standard deviation,
            against over-exposure (Lin et al. 2024, Sec. 3.4, who take 0.7).
        convert: makes what samplers take of (output, x, t), see `objective.to_prediction`; by default the output.
        run: runs a step.

    Raises:
        ValueError: for a scale that is not finite, t_low above t_high, a rescale outside 0 to 1, a scale other than 1
            without contexts, or contexts that differ in length or width; when called, for another batch.
    """
    check_settings(guidance_scale, interval, rescale)
    conditional = _Bound(network, condition, convert, run, key=(network, convert))
    if guidance_scale == 1.0:
        return conditional

    def guide(output: Tensor, x: Tensor, t: Tensor) -> Tensor | Prediction:
        without, with_it = output.chunk(2)
        return convert(combine(without, with_it, guidance_scale, rescale=rescale), x, t)

    key = (network, convert, guidance_scale, rescale)
    both = _Bound(network, _both(null, condition, guidance_scale), guide, run, key=key, contexts=2)

    def guided(x: Tensor, t: Tensor) -> Tensor | Prediction:
        # Samplers give one timestep to the whole batch.
        if interval is not None and not interval[0] <= float(t[0]) <= interval[1]:
            return conditional(x, t)
        return both(x, t)

    return guided


def check_settings(guidance_scale: float, interval: tuple[float, float] | None, rescale: float) -> None:
    """Raise ValueError unless the settings of `classifier_free` are in range."""
    if not math.isfinite(guidance_scale):
        raise ValueError(f"guidance_scale must be a finite number, got {guidance_scale}")
    if not 0.0 <= rescale <= 1.0:
        raise ValueError(f"guidance rescale must be between 0 (none) and 1, got {rescale}")
    if interval is not None and not interval[0] <= interval[1]:
        raise ValueError(f"the guidance interval must be (t_low, t_high) with t_low <= t_high, got {interval}")


def combine(unconditional: Tensor, conditional: Tensor, guidance_scale: float, *, rescale: float = 0.0) -> Tensor:
    """Guide one output (B, ...) of a network by the other: u + guidance_scale * (c - u), `rescale`d if it is not 0."""
    answer = unconditional + guidance_scale * (conditional - unconditional)
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
        shift = scale * sigma * gradient
        if not isinstance(answer, Prediction):
            return answer.detach() + shift
        # The clean latent moves along, so that signal x0 + sigma eps is still x; without signal it cannot be told.
        moves = signal > 0
        return Prediction(
            answer.eps.detach() + torch.where(moves, shift, 0.0),
            answer.x0.detach() - torch.where(moves, sigma / signal * shift, 0.0),
        )

    return guided


class _Bound:
    """A network with its conditioning bound: a `denoise(x, t)`.

    Args:
        network: the network.
        conditioning: its context is (k * B, L, D), k contexts a latent; None without cross-attention.
        convert: makes an answer (B, C, h, w) of (output (k * B, C, h, w), x, t).
        run: runs a step.
        key: what tells this step from all others.
        contexts: k.
    """

    def __init__(
        self,
        network: Network,
        conditioning: Conditioning,
        convert: Convert,
        run: Run,
        *,
        key: object,
        contexts: int = 1,
    ) -> None:
        def step(x: Tensor, t: Tensor, context: Any, concat: Tensor | None) -> Tensor | Prediction:
            return convert(network(x, t, context=context, concat=concat), x, t)

        self.network, self.step, self.run, self.key, self.contexts = network, step, run, key, contexts
        self.context, self.mask, self.concat = conditioning.context, conditioning.mask, conditioning.concat
        self._prepared: Any = None

    def __call__(self, x: Tensor, t: Tensor) -> Tensor | Prediction:
        if self.context is not None:
            bound = len(self.context) // self.contexts
            if bound != len(x):
                raise ValueError(f"the denoiser is bound to {bound} inputs, got {len(x)} latents: bind it anew")
            if self._prepared is None:
                self._prepared = self.network.prepare_context(self.context, self.mask)
        return self.run(self.step, self.key, x, t, self._prepared, self.concat)


def _both(null: Conditioning | None, condition: Conditioning, guidance_scale: float) -> Conditioning:
    """Join the null condition and the condition to one batch. Raises ValueError unless they fit together."""
    context = condition.context
    if context is None:
        raise ValueError(f"only a model with a context can be guided: keep guidance_scale 1, got {guidance_scale}")
    if null is None or null.context is None:
        raise ValueError(f"guidance_scale={guidance_scale} needs a null condition with a context, got none")
    if null.context.shape[1:] != context.shape[1:] or len(null.context) not in (1, len(context)):
        raise ValueError(
            "the unconditional input must be one, or one an input, and as long as these, "
            f"got contexts {tuple(null.context.shape)} and {tuple(context.shape)}: tokenize both alike"
        )
    mask = None
    if null.mask is not None or condition.mask is not None:
        # One without a mask attends to all places.
        everywhere = torch.ones(context.shape[:2], dtype=torch.bool, device=context.device)
        masks = [each.mask if each.mask is not None else everywhere for each in (null, condition)]
        mask = torch.cat([each.expand_as(everywhere) for each in masks])
    return Conditioning(
        context=torch.cat([null.context.expand_as(context), context]), mask=mask, concat=condition.concat
    )


def _rescaled(answer: Tensor, conditional: Tensor, share: float) -> Tensor:
    """Scale a share of the guided answer to the conditional one's standard deviation (Lin et al. 2024, Sec. 3.4)."""
    dims = list(range(1, answer.dim()))
    # An untrained network answers zero everywhere, and 0 / 0 would be NaN.
    tiny = torch.finfo(answer.dtype).tiny
    ratio = conditional.std(dim=dims, keepdim=True) / answer.std(dim=dims, keepdim=True).clamp_min(tiny)
    return share * (answer * ratio) + (1 - share) * answer
