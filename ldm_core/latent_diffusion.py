"""The whole model: a first stage, and a denoising UNet with its conditioner in that stage's latent space.

Shapes: x: (B, 3, H, W) images in [-1, 1]; z: (B, C, h, w) scaled latents; t: (B,) timesteps; context: (B, L, D)
for cross-attention; inputs: what the conditioner takes, e.g. token ids (B, L).
"""

import contextlib
import dataclasses
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ldm_core import guidance, objective, samplers
from ldm_core.conditioning import Conditioner, Conditioning, Shared
from ldm_core.conditioning.build import build_conditioner
from ldm_core.configs.model import LatentDiffusionConfig
from ldm_core.configs.text import FrozenConfig
from ldm_core.networks.autoencoder import build_first_stage
from ldm_core.networks.unet import UNet
from ldm_core.schedule import NoiseSchedule

# Steps of samplers that take a number of them.
NUM_STEPS = 50


def build_model(config: LatentDiffusionConfig, device: torch.device | str | None = None) -> "LatentDiffusion":
    """Build the model with random weights; on device "meta" it takes no memory."""
    with torch.device(device or torch.get_default_device()):
        return LatentDiffusion(config)


def build_network(config: LatentDiffusionConfig, device: torch.device | str | None = None) -> "DiffusionNetwork":
    """Build the part that the diffusion stage trains, with random weights: the UNet, and a conditioner that is trained.

    A frozen text encoder is no part of it: the network takes the `Conditioning` that it gave. Nor is the first stage:
    a network for inpainting takes a `MaskedLatent`.
    """
    frozen = isinstance(config.conditioner, FrozenConfig)
    conditioner = None if frozen else config.conditioner
    with torch.device(device or torch.get_default_device()):
        return DiffusionNetwork(UNet(config.unet), build_conditioner(conditioner) if conditioner else None)


class DiffusionNetwork(nn.Module):
    """Conditioner and UNet as one module, the part that training updates: one forward, so one DDP wrapper."""

    def __init__(self, unet: UNet, conditioner: Conditioner | None) -> None:
        super().__init__()
        self.unet = unet
        self.conditioner = conditioner

    def forward(self, z_t: Tensor, t: Tensor, inputs: Any = None) -> Tensor:
        """Return the UNet's raw prediction at z_t (B, C, h, w), t (B,), conditioned on the conditioner's inputs.

        Inputs may be a `Conditioning`, which is taken as it is, or `Shared` by several samples.

        Raises:
            ValueError: inputs are given to an unconditional network or missing from a conditional one.
        """
        conditioning = _condition(self.conditioner, inputs)
        return self.unet(z_t, t, context=conditioning.context, mask=conditioning.mask, concat=conditioning.concat)


class LatentDiffusion(nn.Module):
    """A latent diffusion model; its weights are those of its three parts.

    Attributes:
        first_stage, unet, conditioner: the parts; conditioner is None for an unconditional model.
        schedule: the forward process.
        scale_factor: factor between the first stage's latents and those that the UNet sees; the first stage does not
            apply it, `encode` and `decode` do.
        run_step: runs the steps of sampling; `prepare` sets another one on GPUs.
    """

    def __init__(self, config: LatentDiffusionConfig) -> None:
        super().__init__()
        self.config = config
        # Frozen, as in the code release: who optimises `parameters()` means the other two.
        self.first_stage = build_first_stage(config.first_stage).requires_grad_(False)
        self.unet = UNet(config.unet)
        self.conditioner = (
            build_conditioner(config.conditioner, encode=self._encode_mode) if config.conditioner else None
        )
        self.schedule = NoiseSchedule(config.schedule)
        self.scale_factor = config.scale_factor
        self.run_step: guidance.Run = guidance.run_step

    def network(self) -> DiffusionNetwork:
        """Return UNet and conditioner as one module that shares this model's weights."""
        return DiffusionNetwork(self.unet, self.conditioner)

    def encode(self, x: Tensor, *, noise: Tensor | None = None) -> Tensor:
        """Encode images to scaled latents: a sample of the posterior with `noise` (B, C, h, w), else its mode.

        They are float32 at least: samplers compute in what they start from.
        """
        posterior = self.first_stage.encode(x)
        latent = posterior.mode() if noise is None else posterior.sample(noise=noise)
        return self.scale_factor * latent.to(torch.promote_types(latent.dtype, torch.float32))

    def _encode_mode(self, x: Tensor) -> Tensor:
        # Not scaled: the published networks take a latent that they are conditioned on as the first stage gives it.
        return self.first_stage.encode(x).mode()

    def decode(self, z: Tensor) -> Tensor:
        """Decode scaled latents to images, (B, 3, H, W) around [-1, 1] (not clipped)."""
        return self.first_stage.decode(z / self.scale_factor)

    def _prediction(self, output: Tensor, x: Tensor, t: Tensor) -> Tensor | objective.Prediction:
        """Turn the network's own output at (x, t) into what samplers take."""
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
        num_steps: int | None = None,
        guidance_scale: float = 1.0,
        eta: float = 0.0,
        sampler: samplers.Sampler = samplers.ddim,
        size: tuple[int, int] | None = None,
        callback: samplers.Callback | None = None,
    ) -> Tensor:
        """Sample images with classifier-free guidance; image i depends on its own input and seeds[i] alone.

        For image-to-image and masked sampling see `samplers`, on `guided_denoiser()`.

        Args:
            inputs: a batch of the conditioner's inputs, e.g. token ids (B, L); None for an unconditional model.
            seeds: B integers, one per image.
            unconditional: the null condition (1, ...), e.g. the empty caption's ids; required if guidance_scale is not
                1, unless the conditioner has one of its own.
            num_steps: number of timesteps visited; with zero terminal SNR the last timestep is always among them. None
                is 50 for samplers that take a number.
            guidance_scale: strength of the guidance; 1 is the plain conditional model.
            eta: from 0, deterministic, to 1, as random as DDPM; for samplers that take it, DDIM of ours.
            sampler: any of `samplers`, or another function of (denoise, x, schedule), which is given those of
                num_steps, eta, noise and callback that it has arguments for; `partial(unipc, order=3)` sets others.
            size: height and width of the latent; None is the size of training. Larger ones are sampled
                convolutionally (Sec. 4.3.2), multiples of the UNet's downsampling factor.
            callback: see `samplers.Callback`.

        Returns:
            (B, 3, H, W) float32 in [-1, 1].

        Raises:
            ValueError: inputs and seeds differ in number, guidance lacks the null condition, a number is out of range,
                or the sampler does not take what is given.
        """
        if inputs is not None and (count := _count(inputs)) != len(seeds):
            raise ValueError(f"sample needs one seed an input, got {len(seeds)} seeds for {count} inputs")
        shape = self._latent_shape(size)
        denoise = self.guided_denoiser(inputs, unconditional=unconditional, guidance_scale=guidance_scale)
        noise = samplers.seeded_noise(seeds, shape, self._device)
        options = _options_of(sampler, {"num_steps": num_steps, "eta": eta or None, "callback": callback}, noise)
        with _evaluating(self):
            z = sampler(denoise, noise(), self.schedule, **options)
            if not z.isfinite().all():
                raise ValueError("sampling gave NaN or infinity: look at the weights with finite.check_finite(model)")
            return self.decode(z).float().clamp(-1.0, 1.0)

    def guided_denoiser(
        self,
        inputs: Any = None,
        *,
        unconditional: Any = None,
        guidance_scale: float = 1.0,
        interval: tuple[float, float] | None = None,
        rescale: float = 0.0,
    ) -> samplers.Denoise:
        """Bind the condition and apply classifier-free guidance: the function `(x, t)` that samplers take.

        It returns the predicted noise; for a network that predicts v, x0 or flow, noise and clean latent, see
        `objective.Prediction`. The weights must not change between its first call and its last.

        Args:
            inputs, unconditional, guidance_scale: as for `sample`.
            interval, rescale: as for `guidance.classifier_free`.

        Raises:
            ValueError: as `sample`.
        """
        guidance.check_settings(guidance_scale, interval, rescale)
        condition = _condition(self.conditioner, _to(inputs, self._device))
        null = None
        if guidance_scale != 1.0 and condition.context is not None:
            null = self._null_condition(unconditional, inputs, guidance_scale)
        return guidance.classifier_free(
            self.unet,
            condition,
            null,
            guidance_scale,
            interval=interval,
            rescale=rescale,
            convert=self._prediction,
            run=self.run_step,
        )

    @property
    def _device(self) -> torch.device:
        return next(self.unet.parameters()).device

    def _latent_shape(self, size: tuple[int, int] | None) -> tuple[int, int, int]:
        """Return (C, h, w) of the latents to sample. Raises ValueError for a size that the UNet cannot take."""
        height, width = size or (self.config.unet.latent_size,) * 2
        factor = self.config.unet.downsampling_factor
        if min(height, width) < factor or height % factor or width % factor:
            raise ValueError(f"size must be positive multiples of {factor}, in latent pixels, got {(height, width)}")
        return self.config.first_stage.embed_dim, height, width

    def _null_condition(self, unconditional: Any, inputs: Any, guidance_scale: float) -> Conditioning:
        """Return the null condition of classifier-free guidance, with a context (1, L, D) or (B, L, D)."""
        assert self.conditioner is not None
        null = self.conditioner.unconditional() if unconditional is None else unconditional
        if null is None:
            raise ValueError(
                f"guidance_scale={guidance_scale} needs `unconditional`, the input that asks for nothing: "
                "the ids (1, L) of the empty caption"
            )
        if isinstance(null, Tensor) and null.ndim < inputs.ndim:
            null = null[None]
        return self.conditioner(_to(null, self._device))


@contextlib.contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Switch dropout off, so that a seed always gives the same image; every module gets its mode back afterwards."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


def _options_of(sampler: samplers.Sampler, given: Mapping[str, Any], noise: samplers.NoiseSource) -> dict[str, Any]:
    """Return the options to call a sampler with: what is given, not None, and what it should not do without.

    Raises:
        ValueError: it does not take something that is given.
    """
    parameters = inspect.signature(sampler).parameters
    options = {name: value for name, value in given.items() if value is not None}
    takes_all = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    if not takes_all and (unknown := [name for name in options if name not in parameters]):
        name = getattr(sampler, "__name__", str(sampler))
        raise ValueError(f"the sampler {name} takes no {unknown[0]}, got {options[unknown[0]]}: leave it out")
    for name, value in {"num_steps": NUM_STEPS, "noise": noise}.items():
        # A number of steps that is bound by `partial` stays.
        bound = getattr(sampler, "keywords", {})
        # Whatever takes all options is taken to hand them on: without the noise a seed would not make a picture.
        if (name in parameters or takes_all) and name not in bound:
            options.setdefault(name, value)
    return options


def _condition(conditioner: Conditioner | None, inputs: Any) -> Conditioning:
    """Return the conditioning of a batch of inputs; an unconditional model has none."""
    if isinstance(inputs, Conditioning):
        return inputs
    if (conditioner is None) != (inputs is None):
        raise ValueError(
            "a conditional model needs its conditioner's inputs, such as token ids (B, L), and an unconditional one "
            f"takes none; got {'none' if inputs is None else 'some'}"
        )
    if conditioner is None:
        return Conditioning()
    if not isinstance(inputs, Shared):
        return conditioner(inputs)
    found = conditioner(inputs.inputs)
    parts = {field.name: getattr(found, field.name) for field in dataclasses.fields(found)}
    return Conditioning(**{name: None if part is None else part[inputs.row] for name, part in parts.items()})


def _count(inputs: Any) -> int:
    """Return how many a conditioner's inputs are. Raises ValueError for what is no tensor and holds none."""
    if isinstance(inputs, Tensor):
        return len(inputs)
    if dataclasses.is_dataclass(inputs):
        parts = (getattr(inputs, field.name) for field in dataclasses.fields(inputs))
        if tensors := [part for part in parts if isinstance(part, Tensor)]:
            # A mask may be one for all.
            return max(len(tensor) for tensor in tensors)
    raise ValueError(f"inputs must be a tensor, or what the conditioner takes, got {type(inputs).__name__}")


def _to(inputs: Any, device: torch.device) -> Any:
    """Move a conditioner's inputs, a tensor or a dataclass of tensors, to a device."""
    if isinstance(inputs, Tensor):
        return inputs.to(device)
    if dataclasses.is_dataclass(inputs) and not isinstance(inputs, type):
        moved = {field.name: _to(getattr(inputs, field.name), device) for field in dataclasses.fields(inputs)}
        return dataclasses.replace(inputs, **moved)
    return inputs
