"""Configurations of conditioners (paper, Sec. 3.3; Table 15), one class a kind; none imports torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ldm_core.configs.text import ClipTextConfig, FrozenTextConfig, TextTransformerConfig

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class ClassConfig:
    """Shape of a class embedding.

    Args:
        classes: labels are 0 ... classes - 1.
        width: D of the context.
        unconditional_class: the last label stands for no class, as classifier-free guidance needs.

    Raises:
        ValueError: a number is not positive.
    """

    classes: int
    width: int
    unconditional_class: bool = False

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        for name in ("classes", "width"):
            if getattr(self, name) < 1:
                raise ValueError(f"ClassConfig.{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class Box:
    """A labelled box in units of the image: x, y of the upper left corner, width and height, all within [0, 1].

    Raises:
        ValueError: the box is not inside the image.
    """

    x: float
    y: float
    width: float
    height: float
    label: int = 0

    def __post_init__(self) -> None:
        corners = (self.x, self.y, self.x + self.width, self.y + self.height)
        # Boxes written with a few decimals may overshoot the edge by rounding.
        if not all(-1e-6 <= corner <= 1 + 1e-6 for corner in corners) or self.width < 0 or self.height < 0:
            raise ValueError(
                f"a box must lie inside the image, in units of its width and height, got x={self.x}, y={self.y}, "
                f"width={self.width}, height={self.height}"
            )


WHOLE_IMAGE = Box(x=0.0, y=0.0, width=1.0, height=1.0)


@dataclass(frozen=True, kw_only=True)
class LayoutConfig:
    """Shape of a layout conditioner; the defaults are those of the published model.

    Args:
        width: D of the context.
        layers, heads, head_dim: of the transformer.
        vocabulary_size: tokens; the grid of corners has floor(sqrt(vocabulary_size)) cells a side.
        max_objects: objects of a layout.

    Raises:
        ValueError: a number is not positive.
    """

    width: int
    layers: int
    heads: int = 8
    head_dim: int = 64
    vocabulary_size: int = 8192
    max_objects: int = 30

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        for name in ("width", "layers", "heads", "head_dim", "vocabulary_size", "max_objects"):
            if getattr(self, name) < 1:
                raise ValueError(f"LayoutConfig.{name} must be at least 1, got {getattr(self, name)}")

    @property
    def max_length(self) -> int:
        """Tokens of a layout: three an object, two for the crop."""
        return 3 * self.max_objects + 2

    @property
    def transformer(self) -> TextTransformerConfig:
        """The transformer over the tokens."""
        return TextTransformerConfig(
            vocabulary_size=self.vocabulary_size,
            max_length=self.max_length,
            width=self.width,
            layers=self.layers,
            heads=self.heads,
            head_dim=self.head_dim,
        )

    @property
    def no_object(self) -> int:
        """The token of what is not there."""
        return self.vocabulary_size - 1

    def encode(self, objects: Sequence[Box], *, crop: Box = WHOLE_IMAGE) -> Tensor:
        """Encode one layout as tokens.

        Args:
            objects: written in this order. A label of the published model is the category plus the number of
                categories times the flags of Open Images (group, occluded, depiction, inside).
            crop: the part of the image that is wanted, in units of the whole image as all boxes are; its label is
                ignored.

        Returns:
            (max_length,) int64.

        Raises:
            ValueError: more than `max_objects` objects, or a label that is no token.
        """
        import torch  # the one tensor that a configuration makes: reading a recipe needs no torch

        if len(objects) > self.max_objects:
            raise ValueError(f"a layout holds at most {self.max_objects} objects, got {len(objects)}")
        tokens = []
        for box in objects:
            if not 0 <= box.label < self.no_object:
                raise ValueError(f"labels of a layout must be in 0 ... {self.no_object - 1}, got {box.label}")
            tokens += [box.label, *self._corners(box)]
        tokens += [self.no_object] * (3 * (self.max_objects - len(objects)))
        return torch.tensor([*tokens, *self._corners(crop)], device="cpu")

    def _corners(self, box: Box) -> tuple[int, int]:
        """Return the tokens of the box's upper left and lower right corner."""
        return self._cell(box.x, box.y), self._cell(box.x + box.width, box.y + box.height)

    def _cell(self, x: float, y: float) -> int:
        side = math.isqrt(self.vocabulary_size)
        column, row = (min(max(round(value * (side - 1)), 0), side - 1) for value in (x, y))
        return row * side + column


@dataclass(frozen=True, kw_only=True)
class SemanticMapConfig:
    """Shape of a rescaled semantic map (Sec. 4.3.2: semantic synthesis).

    Args:
        classes: labels are 0 ... classes - 1.
        halvings: how often the map is halved, log2 of the first stage's downsampling factor.
        out_channels: channels that a learned 1x1 convolution maps the classes to.

    Raises:
        ValueError: a number is out of range.
    """

    classes: int
    halvings: int
    out_channels: int = 3

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        for name, least in (("classes", 1), ("halvings", 0), ("out_channels", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"SemanticMapConfig.{name} must be at least {least}, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class LowResolutionConfig:
    """Super-resolution: the small image has the latent's height and width (Sec. 4.4).

    Args:
        channels: of the small image.

    Raises:
        ValueError: no channels.
    """

    channels: int = 3

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        if self.channels < 1:
            raise ValueError(f"LowResolutionConfig.channels must be at least 1, got {self.channels}")


@dataclass(frozen=True, kw_only=True)
class MaskedImageConfig:
    """Inpainting: the latent of the image without what is to be filled in, and the mask (Sec. 4.5)."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}


ConditionerConfig = (
    TextTransformerConfig
    | ClipTextConfig
    | FrozenTextConfig
    | ClassConfig
    | LayoutConfig
    | SemanticMapConfig
    | LowResolutionConfig
    | MaskedImageConfig
)

# The names that saved configs know them by.
CONDITIONER_KINDS: Mapping[str, type[ConditionerConfig]] = {
    "text": TextTransformerConfig,
    "frozen_clip": ClipTextConfig,
    "frozen_text": FrozenTextConfig,
    "class": ClassConfig,
    "layout": LayoutConfig,
    "semantic_map": SemanticMapConfig,
    "low_resolution": LowResolutionConfig,
    "masked_image": MaskedImageConfig,
}


def kind_of(config: ConditionerConfig) -> str:
    """The name that saved configs know this config's kind by."""
    return next(name for name, kind in CONDITIONER_KINDS.items() if type(config) is kind)


def context_dim(config: ConditionerConfig | None) -> int | None:
    """D of the context that a conditioner gives for cross-attention; None where it gives none."""
    return getattr(config, "width", None)


def concat_channels(config: ConditionerConfig | None, latent_channels: int) -> int:
    """Channels that a conditioner adds to the UNet's input, for latents of so many channels."""
    match config:
        case SemanticMapConfig():
            return config.out_channels
        case LowResolutionConfig():
            return config.channels
        case MaskedImageConfig():
            return latent_channels + 1
    return 0
