"""Conditions that are pictures: extra channels beside the latent's (paper, Sec. 3.3, 4.3.2, 4.4 and 4.5).

Shapes: H, W: size of the image; h, w: of its latent. Images are in [-1, 1].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_core.conditioning.interface import Conditioner, Conditioning, Encode
from ldm_core.configs.conditioning import LowResolutionConfig, MaskedImageConfig, SemanticMapConfig
from ldm_core.images import to_bool
from ldm_core.networks.ids import check_ids


class SemanticMapConditioner(Conditioner):
    """Maps semantic maps to channels of the latent's size."""

    def __init__(self, config: SemanticMapConfig) -> None:
        super().__init__()
        self.config = config
        self.channel_mapper = nn.Conv2d(config.classes, config.out_channels, 1, bias=False)

    def forward(self, semantic_map: Tensor) -> Conditioning:
        """Halve the map bilinearly, then map its classes to channels.

        Args:
            semantic_map: (B, H, W) integer labels, or (B, classes, H, W) float weights of the classes; H and W are
                multiples of 2**halvings.

        Returns:
            concat (B, out_channels, h, w).

        Raises:
            ValueError: the map has another shape.
        """
        classes, multiple = self.config.classes, 2**self.config.halvings
        are_labels = semantic_map.ndim == 3 and not semantic_map.is_floating_point()
        are_weights = semantic_map.ndim == 4 and semantic_map.shape[1] == classes
        if not (are_labels or are_weights) or any(side % multiple for side in semantic_map.shape[-2:]):
            raise ValueError(
                f"a semantic map must be (B, H, W) integer labels or (B, {classes}, H, W), H and W multiples of "
                f"{multiple}, got {semantic_map.dtype} of shape {tuple(semantic_map.shape)}"
            )
        if are_labels:
            check_ids(semantic_map, classes, "labels of a semantic map")
            semantic_map = F.one_hot(semantic_map.long(), classes).movedim(-1, 1)
        channels = semantic_map.to(self.channel_mapper.weight.dtype)
        for _ in range(self.config.halvings):
            channels = F.interpolate(channels, scale_factor=0.5, mode="bilinear")
        return Conditioning(concat=self.channel_mapper(channels))


class LowResolutionConditioner(Conditioner):
    """Passes low-resolution images (B, 3, h, w) on as they are."""

    def __init__(self, config: LowResolutionConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, image: Tensor) -> Conditioning:
        """(B, channels, h, w) in [-1, 1] -> concat, the same. Raises ValueError for another shape."""
        if image.ndim != 4 or image.shape[1] != self.config.channels:
            raise ValueError(
                f"a low-resolution image must be (B, {self.config.channels}, h, w), got shape {tuple(image.shape)}"
            )
        return Conditioning(concat=image)


@dataclass(frozen=True, kw_only=True)
class MaskedImage:
    """Inputs of inpainting.

    Args:
        image: (B, 3, H, W) in [-1, 1]; pixels under the mask are ignored.
        mask: (B, 1, H, W) or (1, 1, H, W); 1 where the image is to be filled in, 0 where it is kept. It is kept as
            bool: checked once, here, and never read again on a GPU.

    Raises:
        ValueError: image and mask do not fit each other, or the mask holds other values than 0 and 1.
    """

    image: Tensor
    mask: Tensor

    def __post_init__(self) -> None:
        object.__setattr__(self, "mask", _fitting_mask(self.mask, self.image, "image"))


@dataclass(frozen=True, kw_only=True)
class MaskedLatent:
    """Inputs of inpainting that were encoded before, such as those that the latents stage caches for training.

    Args:
        latent: (B, C, h, w) unscaled latent of the image without what is under its mask.
        mask: (B, 1, h, w) or (1, 1, h, w), the mask in the latent's size; as for `MaskedImage`.

    Raises:
        ValueError: as `MaskedImage`.
    """

    latent: Tensor
    mask: Tensor

    def __post_init__(self) -> None:
        object.__setattr__(self, "mask", _fitting_mask(self.mask, self.latent, "latent"))


class MaskedImageConditioner(Conditioner):
    """Maps masked images to latents, with the mask as one more channel.

    Args:
        config: the kind's configuration, which has no settings.
        encode: maps images (B, 3, H, W) to unscaled latents (B, C, h, w); None builds a conditioner that takes masked
            latents only, as a network does that is trained on cached ones.
    """

    def __init__(self, config: MaskedImageConfig, *, encode: Encode | None) -> None:
        super().__init__()
        self.config = config
        self.encode = encode

    def forward(self, inputs: MaskedImage | MaskedLatent) -> Conditioning:
        """Black out the masked part of an image and encode it, unless that was done before; append the mask.

        Returns:
            concat (B, C + 1, h, w); the mask is 1 where the image is to be filled in and -1 elsewhere.

        Raises:
            ValueError: the inputs are an image, and there is no first stage to encode it with.
        """
        if isinstance(inputs, MaskedImage):
            inputs = self._encoded(inputs)
        mask = inputs.mask.to(inputs.latent.dtype).expand(len(inputs.latent), -1, -1, -1)
        return Conditioning(concat=torch.cat([inputs.latent, 2 * mask - 1], dim=1))

    @torch.no_grad()
    def _encoded(self, inputs: MaskedImage) -> MaskedLatent:
        if self.encode is None:
            raise ValueError(
                "a masked image is encoded by the first stage: build the whole model, not its network alone, "
                "or give a MaskedLatent"
            )
        latent = self.encode(torch.where(inputs.mask, -1.0, inputs.image))
        small_mask = F.interpolate(inputs.mask.to(latent.dtype), size=latent.shape[2:], mode="nearest")
        return MaskedLatent(latent=latent, mask=small_mask.bool())


def _fitting_mask(mask: Tensor, masked: Tensor, name: str) -> Tensor:
    """Return a mask as bool. Raises ValueError for other values than 0 and 1, or a shape that does not fit."""
    if mask.ndim != 4 or mask.shape[1] != 1 or mask.shape[2:] != masked.shape[2:] or len(mask) not in (1, len(masked)):
        raise ValueError(
            f"the mask must be (B, 1, H, W) or (1, 1, H, W), H and W those of the {name}, "
            f"got mask {tuple(mask.shape)} and {name} {tuple(masked.shape)}"
        )
    return to_bool(mask)
