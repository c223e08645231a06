"""The whole model: a first stage, and a denoising UNet with its conditioner in that stage's latent space.

Shapes: x: (B, 3, H, W) images in [-1, 1]; z: (B, C, h, w) scaled latents; t: (B,) integer timesteps;
inputs: what the conditioner takes, e.g. token ids (B, L).
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ldm_core import guidance, objective, samplers
from ldm_core.conditioning import Conditioner, Conditioning
from ldm_core.conditioning.build import build_conditioner
from ldm_core.configs.model import LatentDiffusionConfig
from ldm_core.networks.autoencoder import build_first_stage
from ldm_core.networks.unet import PreparedContext, UNet
from ldm_core.schedule import NoiseSchedule


def build_model(config: LatentDiffusionConfig, device: torch.device | str | None = None) -> "LatentDiffusion":
    """Build the model with random weights; on device "meta" it takes no memory."""
    with torch.device(device or torch.get_default_device()):
        return LatentDiffusion(config)


def build_network(config: LatentDiffusionConfig, device: torch.device | str | None = None) -> "DiffusionNetwork":
    """Build the part that the diffusion stage trains (UNet and conditioner), with random weights."""
    conditioner = config.conditioner
    with torch.device(device or torch.get_default_device()):
        return DiffusionNetwork(UNet(config.unet), build_conditioner(conditioner) if conditioner else None)


class DiffusionNetwork(nn.Module):
    """Conditioner and UNet as one module, the part that training updates: one forward, so one DDP wrapper."""

    def __init__(self, unet: UNet, conditioner: Conditioner | None) -> None:
        super().__init__()
        self.unet = unet
        self.conditioner = conditioner

    def forward(self, z_t: Tensor, t: Tensor, inputs: Any = None) -> Tensor:
        """The UNet's raw prediction at z_t (B, C, h, w), t (B,), conditioned on the conditioner's inputs.

        Raises:
            ValueError: when inputs are given to an unconditional network or missing from a conditional one.
        """
        conditioning = _condition(self.conditioner, inputs)
        return self.unet(z_t, t, context=conditioning.context, concat=conditioning.concat)


class LatentDiffusion(nn.Module):
    """A latent diffusion model; its weights are those of its three parts.

    Attributes:
        first_stage, unet, conditioner: the parts; conditioner is None for an unconditional model.
        schedule: forward process.
        scale_factor: what latents are multiplied by after `first_stage.encode`; the first stage knows nothing
            of it.
    """

    def __init__(self, config: LatentDiffusionConfig) -> None:
        super().__init__()
        self.config = config
        self.first_stage = build_first_stage(config.first_stage)
        self.unet = UNet(config.unet)
        self.conditioner = (
            build_conditioner(config.conditioner, encode=self._encode_mode) if config.conditioner else None
        )
        self.schedule = NoiseSchedule(config.schedule)
        self.scale_factor = config.scale_factor

    def network(self) -> DiffusionNetwork:
        """UNet and conditioner as one module that shares this model's weights."""
        return DiffusionNetwork(self.unet, self.conditioner)

    def encode(self, x: Tensor, *, noise: Tensor | None = None) -> Tensor:
        """Images to scaled latents: the posterior's draw with `noise` (B, C, h, w), without it its mode."""
        posterior = self.first_stage.encode(x)
        latent = posterior.mode() if noise is None else posterior.sample(noise=noise)
        return self.scale_factor * latent

    def _encode_mode(self, x: Tensor) -> Tensor:
        # Not scaled: a latent that is conditioned on enters the published networks as the first stage gives it.
        return self.first_stage.encode(x).mode()

    def decode(self, z: Tensor) -> Tensor:
        """Scaled latents to images, (B, 3, H, W) around [-1, 1] (not clipped)."""
        return self.first_stage.decode(z / self.scale_factor)

    def denoiser(self) -> guidance.ConditionalDenoise:
        """The function `(x, t, *, context, concat)` that samplers and guidance are built on.

        It answers the noise, or for a network of v or x0 noise and clean latent, see `objective.Prediction`.
        """

        def denoise(
            x: Tensor, t: Tensor, *, context: Tensor | None = None, concat: Tensor | None = None
        ) -> Tensor | objective.Prediction:
            return self._answer(self.unet(x, t, context=context, concat=concat), x, t)

        return denoise

    def _answer(self, output: Tensor, x: Tensor, t: Tensor) -> Tensor | objective.Prediction:
        """What samplers take, from the network's own output at (x, t)."""
        if self.config.parameterization == "eps":
            return output
        return objective.to_prediction(self.config.parameterization, self.schedule, output, x, t)

    @torch.no_grad()
    def sample(
        self,
        inputs: Any = None,
        *,
        seeds: Sequence[int],
        unconditional: Any = None,
        num_steps: int = 50,
        guidance_scale: float = 1.0,
        eta: float = 0.0,
        sampler: samplers.FewStepSampler = samplers.ddim,
        size: tuple[int, int] | None = None,
        callback: samplers.Callback | None = None,
    ) -> Tensor:
        """Images with classifier-free guidance; image i depends on its own input and seeds[i] alone.

        For image-to-image and masked sampling see `samplers`, on `guided_denoiser()`.

        Args:
            inputs: a batch of what the conditioner takes, e.g. token ids (B, L); None for an unconditional model.
            seeds: B integers, one an image.
            unconditional: the input (1, ...) that asks for nothing, e.g. the empty caption's ids; needed where
                guidance_scale is not 1, unless the conditioner knows it by itself.
            num_steps: timesteps visited; the last one first where the schedule leaves no signal there.
            guidance_scale: 1 is the plain conditional model.
            eta: 0 deterministic ... 1 as random as DDPM; DDIM alone has it.
            sampler: one of `samplers.FEW_STEP_SAMPLERS`.
            size: height and width of the latent; None is the size of training. Larger ones are sampled
                convolutionally (Sec. 4.3.2), multiples of the UNet's downsampling factor.
            callback: see `samplers.Callback`.

        Returns:
            (B, 3, H, W) float32 in [-1, 1].

        Raises:
            ValueError: when inputs and seeds differ in number, guidance lacks the unconditional input, or a number is
                out of range.
        """
        if isinstance(inputs, Tensor) and len(inputs) != len(seeds):
            raise ValueError(f"sample needs one seed an input, got {len(seeds)} seeds for {len(inputs)} inputs")
        device = next(self.unet.parameters()).device
        height, width = size or (self.config.unet.latent_size,) * 2
        factor = self.config.unet.downsampling_factor
        if min(height, width) < factor or height % factor or width % factor:
            raise ValueError(f"size must be positive multiples of {factor}, in latent pixels, got {(height, width)}")
        noise = samplers.seeded_noise(seeds, (self.config.first_stage.embed_dim, height, width), device)
        denoise = self.guided_denoiser(inputs, unconditional=unconditional, guidance_scale=guidance_scale)
        if sampler not in samplers.FEW_STEP_SAMPLERS:
            known = ", ".join(each.__name__ for each in samplers.FEW_STEP_SAMPLERS)
            raise ValueError(f"sampler must be one of {known}, got {getattr(sampler, '__name__', sampler)}")
        if eta and sampler is not samplers.ddim:
            raise ValueError(f"only DDIM has an eta, got eta={eta}: leave it 0")
        options: dict[str, Any] = {"eta": eta, "noise": noise} if sampler is samplers.ddim else {}
        spacing: samplers.Spacing = "trailing" if self.config.schedule.zero_terminal_snr else "leading"
        with _evaluating(self):
            z = sampler(
                denoise, noise(), self.schedule, num_steps=num_steps, spacing=spacing, callback=callback, **options
            )
            if not z.isfinite().all():
                raise ValueError("sampling gave NaN or infinity: look at the weights with finite.check_finite(model)")
            return self.decode(z).float().clamp(-1.0, 1.0)

    def guided_denoiser(
        self,
        inputs: Any = None,
        *,
        unconditional: Any = None,
        guidance_scale: float = 1.0,
        interval: tuple[int, int] | None = None,
        rescale: float = 0.0,
    ) -> samplers.Denoise:
        """The denoiser with its condition bound and classifier-free guidance applied: what samplers take.

        What does not change from step to step is computed once, and what both halves of guidance share, once a step.
        The weights must not change between its first call and its last.

        Args:
            inputs, unconditional, guidance_scale: as for `sample`.
            interval, rescale: as for `guidance.classifier_free`.

        Raises:
            ValueError: as `sample`.
        """
        device = next(self.unet.parameters()).device
        conditioning = _condition(self.conditioner, _to(inputs, device))
        conditional = _Bound(self.unet, conditioning.context, conditioning.concat)
        guidance.check_settings(guidance_scale, interval, rescale)
        if guidance_scale == 1.0:
            return lambda x, t: self._answer(conditional(x, t), x, t)
        if conditioning.context is None:
            raise ValueError(f"only a model with a context can be guided: keep guidance_scale 1, got {guidance_scale}")
        without = self._unconditional_context(unconditional, inputs, guidance_scale)
        if without.shape[1:] != conditioning.context.shape[1:] or len(without) not in (1, len(conditioning.context)):
            raise ValueError(
                "the unconditional input must be one, or one an input, and as long as these, "
                f"got contexts {tuple(without.shape)} and {tuple(conditioning.context.shape)}: tokenize both alike"
            )
        together = torch.cat([without.expand_as(conditioning.context), conditioning.context])
        both = _Bound(self.unet, together, conditioning.concat, contexts_a_sample=2)

        def guided(x: Tensor, t: Tensor) -> Tensor | objective.Prediction:
            # Samplers give one timestep to the whole batch.
            if interval is not None and not interval[0] <= int(t[0]) <= interval[1]:
                return self._answer(conditional(x, t), x, t)
            unguided, wanted = both(x, t).chunk(2)
            output = guidance.combine(unguided, wanted, guidance_scale, rescale=rescale)
            assert isinstance(output, Tensor)
            return self._answer(output, x, t)

        return guided

    def _unconditional_context(self, unconditional: Any, inputs: Any, guidance_scale: float) -> Tensor:
        """The context (1, L, D) that asks for nothing."""
        assert self.conditioner is not None
        nothing = self.conditioner.unconditional() if unconditional is None else unconditional
        if nothing is None:
            raise ValueError(
                f"guidance_scale={guidance_scale} needs `unconditional`, the input that asks for nothing: "
                "the ids (1, L) of the empty caption"
            )
        if isinstance(nothing, Tensor) and nothing.ndim < inputs.ndim:
            nothing = nothing[None]
        context = self.conditioner(_to(nothing, next(self.unet.parameters()).device)).context
        assert context is not None
        return context


@contextlib.contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Within the context dropout is off, so that a seed gives one image; afterwards every part has its mode back."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


class _Bound:
    """A UNet with its conditioning bound; keys and values of the context are computed at the first call."""

    def __init__(
        self, unet: UNet, context: Tensor | None, concat: Tensor | None, *, contexts_a_sample: int = 1
    ) -> None:
        self.unet, self.context, self.concat, self.contexts_a_sample = unet, context, concat, contexts_a_sample
        self._prepared: PreparedContext | None = None

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """(B, C, h, w), (B,) -> (contexts_a_sample * B, C, h, w), the network's own output."""
        if self.context is not None and len(self.context) != self.contexts_a_sample * len(x):
            raise ValueError(
                f"the denoiser is bound to {len(self.context) // self.contexts_a_sample} inputs, got {len(x)} latents: "
                "bind it anew"
            )
        if self.context is not None and self._prepared is None:
            self._prepared = self.unet.prepare_context(self.context)
        output: Tensor = self.unet(x, t, context=self._prepared, concat=self.concat)
        return output


def _condition(conditioner: Conditioner | None, inputs: Any) -> Conditioning:
    """The conditioning of inputs, or none for an unconditional model."""
    if (conditioner is None) != (inputs is None):
        raise ValueError(
            "a conditional model needs its conditioner's inputs, such as token ids (B, L), and an unconditional one "
            f"takes none; got {'none' if inputs is None else 'some'}"
        )
    return Conditioning() if conditioner is None else conditioner(inputs)


def _to(inputs: Any, device: torch.device) -> Any:
    """Inputs on a device: a tensor, or a dataclass of tensors."""
    if isinstance(inputs, Tensor):
        return inputs.to(device)
    if dataclasses.is_dataclass(inputs) and not isinstance(inputs, type):
        moved = {field.name: _to(getattr(inputs, field.name), device) for field in dataclasses.fields(inputs)}
        return dataclasses.replace(inputs, **moved)
    return inputs
