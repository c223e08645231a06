"""The whole model: a first stage, and a denoising UNet with its conditioner in that stage's latent space.

Shapes: x: (B, 3, H, W) images in [-1, 1]; z: (B, C, h, w) scaled latents; t: (B,) integer timesteps;
tokens: (B, L) integer ids; context: (B, L, D).
"""

import dataclasses
import difflib
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ldm_core import guidance, objective, samplers
from ldm_core.autoencoder import FirstStageConfig, build_first_stage
from ldm_core.conditioning import Conditioning, TextConditioner
from ldm_core.schedule import NoiseSchedule, ScheduleConfig
from ldm_core.text_transformer import TextTransformerConfig
from ldm_core.unet import UNet, UNetConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentDiffusionConfig:
    """Everything that decides what a model computes, apart from its weights.

    Args:
        first_stage: the autoencoder whose latents are diffused.
        unet: the denoising network.
        conditioner: text transformer, or None for an unconditional model.
        schedule: forward process.
        parameterization: what the UNet predicts, "eps", "v" or "x0".
        loss: "l1" or "l2", what it was trained with.
        scale_factor: latents are multiplied by it before diffusion: 1 / their std (Sec. 4.3.2, appendix G).

    Raises:
        ValueError: when the parts do not fit each other.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    first_stage: FirstStageConfig
    unet: UNetConfig
    conditioner: TextTransformerConfig | None = None
    schedule: ScheduleConfig = dataclasses.field(default_factory=ScheduleConfig)
    parameterization: objective.Parameterization = "eps"
    loss: objective.LossKind = "l2"
    scale_factor: float = 1.0

    def __post_init__(self) -> None:
        objective.check_parameterization(
            self.parameterization, self.loss, zero_terminal_snr=self.schedule.zero_terminal_snr
        )
        if not (math.isfinite(self.scale_factor) and self.scale_factor > 0):
            raise ValueError(f"scale_factor must be a positive number, got {self.scale_factor}")
        latent_channels = self.first_stage.embed_dim
        if (self.unet.in_channels, self.unet.out_channels) != (latent_channels, latent_channels):
            raise ValueError(
                f"the UNet must take and give the first stage's {latent_channels} latent channels, got "
                f"in_channels={self.unet.in_channels}, out_channels={self.unet.out_channels}"
            )
        width = self.conditioner.width if self.conditioner else None
        if self.unet.context_dim != width:
            raise ValueError(
                "the UNet's context_dim must be the text transformer's width (None without one), "
                f"got context_dim={self.unet.context_dim}, width={width}"
            )

    def build(self, device: torch.device | str | None = None) -> "LatentDiffusion":
        """The model with random weights; device "meta" costs no memory."""
        with torch.device(device or torch.get_default_device()):
            return LatentDiffusion(self)

    def build_network(self, device: torch.device | str | None = None) -> "DiffusionNetwork":
        """Only the part that the diffusion stage trains, with random weights."""
        with torch.device(device or torch.get_default_device()):
            return DiffusionNetwork(UNet(self.unet), TextConditioner(self.conditioner) if self.conditioner else None)

    def to_dict(self) -> dict[str, Any]:
        """A nested dict of plain values that JSON can hold."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "LatentDiffusionConfig":
        """The config of `to_dict()`'s result, also after a passage through JSON.

        Raises:
            ValueError: for unknown or missing keys, or values that do not fit each other.
        """
        parts = {"first_stage": FirstStageConfig, "unet": UNetConfig, "schedule": ScheduleConfig}
        parts |= {"conditioner": TextTransformerConfig}
        _check_keys(cls, values, "model config")
        arguments = dict(values)
        for name, kind in parts.items():
            if arguments.get(name) is not None:
                arguments[name] = _component(kind, arguments[name], name)
        return cls(**arguments)


class DiffusionNetwork(nn.Module):
    """Conditioner and UNet as one module, the part that training updates: one forward, so one DDP wrapper."""

    def __init__(self, unet: UNet, conditioner: TextConditioner | None) -> None:
        super().__init__()
        self.unet = unet
        self.conditioner = conditioner

    def forward(self, z_t: Tensor, t: Tensor, tokens: Tensor | None = None) -> Tensor:
        """The UNet's raw prediction at z_t (B, C, h, w), t (B,), conditioned on tokens (B, L).

        Raises:
            ValueError: when tokens are given to an unconditional network or missing from a conditional one.
        """
        conditioning = _condition(self.conditioner, tokens)
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
        self.conditioner = TextConditioner(config.conditioner) if config.conditioner else None
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

    def decode(self, z: Tensor) -> Tensor:
        """Scaled latents to images, (B, 3, H, W) around [-1, 1] (not clipped)."""
        return self.first_stage.decode(z / self.scale_factor)

    def denoiser(self) -> guidance.ConditionalDenoise:
        """The function `(x, t, *, context, concat) -> eps` that samplers and guidance are built on."""

        def denoise(x: Tensor, t: Tensor, *, context: Tensor | None = None, concat: Tensor | None = None) -> Tensor:
            prediction = self.unet(x, t, context=context, concat=concat)
            return objective.to_eps(self.config.parameterization, self.schedule, prediction, x, t)

        return denoise

    @torch.no_grad()
    def sample(
        self,
        tokens: Tensor | None = None,
        *,
        seeds: Sequence[int],
        empty_tokens: Tensor | None = None,
        num_steps: int = 50,
        guidance_scale: float = 1.0,
        eta: float = 0.0,
        callback: samplers.Callback | None = None,
    ) -> Tensor:
        """Images by DDIM with classifier-free guidance; image i depends on tokens[i] and seeds[i] alone.

        Args:
            tokens: (B, L) ids of the captions; None for an unconditional model.
            seeds: B integers, one an image.
            empty_tokens: (L,) or (1, L) ids of the empty caption, needed where guidance_scale is not 1.
            num_steps: DDIM steps.
            guidance_scale: 1 is the plain conditional model.
            eta: 0 deterministic ... 1 as random as DDPM.
            callback: see `samplers.Callback`.

        Returns:
            (B, 3, H, W) float32 in [-1, 1].

        Raises:
            ValueError: when captions and seeds differ in number, guidance lacks the empty caption, or a
                number is out of range.
        """
        if tokens is not None and len(tokens) != len(seeds):
            raise ValueError(f"sample needs one seed a caption, got {len(seeds)} seeds for {len(tokens)} captions")
        device = next(self.unet.parameters()).device
        size = self.config.unet.latent_size
        noise = samplers.seeded_noise(seeds, (self.config.first_stage.embed_dim, size, size), device)
        denoise = self._guided(tokens, empty_tokens, guidance_scale, device)
        z = samplers.ddim(denoise, noise(), self.schedule, num_steps=num_steps, eta=eta, noise=noise, callback=callback)
        return self.decode(z).float().clamp(-1.0, 1.0)

    def _guided(
        self, tokens: Tensor | None, empty_tokens: Tensor | None, guidance_scale: float, device: torch.device
    ) -> samplers.Denoise:
        """The denoiser with its captions bound and guidance applied."""
        denoise = self.denoiser()
        context = _condition(self.conditioner, None if tokens is None else tokens.to(device)).context
        if context is None:
            if guidance_scale != 1.0:
                raise ValueError(
                    f"an unconditional model cannot be guided: keep guidance_scale 1, got {guidance_scale}"
                )
            return denoise
        if guidance_scale != 1.0 and empty_tokens is None:
            raise ValueError(f"guidance_scale={guidance_scale} needs empty_tokens, the ids of the empty caption")
        unconditional = context
        if guidance_scale != 1.0 and empty_tokens is not None:
            empty = empty_tokens.to(device).view(1, -1)
            unconditional = _condition(self.conditioner, empty).context  # type: ignore[assignment]
        return guidance.classifier_free(denoise, context, unconditional, guidance_scale)


def _condition(conditioner: TextConditioner | None, tokens: Tensor | None) -> Conditioning:
    """The conditioning of tokens, or none for an unconditional model."""
    if (conditioner is None) != (tokens is None):
        raise ValueError(
            "a text-conditional model needs tokens (B, L) and an unconditional one takes none, "
            f"got {'no tokens' if tokens is None else f'tokens {tuple(tokens.shape)}'}"
        )
    return Conditioning() if conditioner is None else conditioner(tokens)


def _component(kind: type, values: Mapping[str, Any], path: str) -> Any:
    """A component's config from plain values."""
    if not isinstance(values, Mapping):
        raise ValueError(f"{path} must be a mapping of settings, got {values!r}")
    _check_keys(kind, values, path)
    # JSON has no tuples; configs are hashable and therefore hold no lists.
    return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})


def _check_keys(kind: type, values: Mapping[str, Any], path: str) -> None:
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for key in values:
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1)
            hint = f", did you mean {near[0]!r}?" if near else f": it has {', '.join(fields)}"
            raise ValueError(f"{path} has no setting {key!r}{hint}")
    unset = (dataclasses.MISSING, dataclasses.MISSING)
    missing = [
        name for name, field in fields.items() if name not in values and (field.default, field.default_factory) == unset
    ]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}")
