"""Configurations of conditioners, one class per kind (paper, Sec. 3.3 and Table 15)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ldm_core.configs.text import ClipTextConfig, FrozenTextConfig, JoinedTextConfig, TextTransformerConfig
from ldm_core.configs.values import check_at_least, component

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class ClassConfig:
    """Shape of a class embedding.

    Args:
        classes: number of labels, 0 ... classes - 1.
        width: D of the context.
        unconditional_class: whether the last label means "no class", as classifier-free guidance needs.
        names: what people call the labels, "no class" aside, in order; empty if unknown.

    Raises:
        ValueError: a number is not positive, or there are more or fewer names than labels.
    """

    classes: int
    width: int
    unconditional_class: bool = False
    names: tuple[str, ...] = ()

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        check_at_least(self, 1, "classes", "width")
        if self.names and len(self.names) != self.classes - self.unconditional_class:
            raise ValueError(
                f"ClassConfig.names must be one a label, {self.classes - self.unconditional_class}, "
                f"got {len(self.names)}"
            )


@dataclass(frozen=True, kw_only=True)
class Box:
    """A labelled box in units of the image: upper left corner (x, y), width and height, all within [0, 1].

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
        layers: number of transformer layers.
        heads: number of attention heads.
        head_dim: channels of a head.
        vocabulary_size: number of tokens; corners fall in a grid of floor(sqrt(vocabulary_size)) cells per side.
        max_objects: most objects in a layout.

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
        check_at_least(self, 1, "width", "layers", "heads", "head_dim", "vocabulary_size", "max_objects")

    @property
    def max_length(self) -> int:
        """Number of tokens of a layout: three per object, two for the crop."""
        return 3 * self.max_objects + 2

    @property
    def transformer(self) -> TextTransformerConfig:
        """Configuration of the transformer over the tokens."""
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
        """Token that fills the places of missing objects."""
        return self.vocabulary_size - 1

    def encode(self, objects: Sequence[Box], *, crop: Box = WHOLE_IMAGE) -> Tensor:
        """Encode one layout as tokens.

        Args:
            objects: boxes, encoded in this order. A label of the published model is the category plus the number of
                categories times the flags of Open Images (group, occluded, depiction, inside).
            crop: the part of the image to generate, in units of the whole image like all boxes; its label is ignored.

        Returns:
            (max_length,) int64.

        Raises:
            ValueError: more than `max_objects` objects, or a label that is no token.
        """
        import torch  # here, not above: configurations are imported without torch, and nothing else here needs it

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
        classes: number of labels, 0 ... classes - 1.
        halvings: number of times the map is halved, log2 of the first stage's downsampling factor.
        out_channels: channels that a learned 1x1 convolution maps the classes to.

    Raises:
        ValueError: a number is out of range.
    """

    classes: int
    halvings: int
    out_channels: int = 3

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        check_at_least(self, 1, "classes", "out_channels")
        check_at_least(self, 0, "halvings")


@dataclass(frozen=True, kw_only=True)
class LowResolutionConfig:
    """Shape of the low-resolution image of super-resolution; it has the latent's height and width (Sec. 4.4).

    Args:
        channels: channels of that image.

    Raises:
        ValueError: no channels.
    """

    channels: int = 3

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        check_at_least(self, 1, "channels")


@dataclass(frozen=True, kw_only=True)
class MaskedImageConfig:
    """Inpainting: condition on the latent of the masked image and on the mask (Sec. 4.5). Nothing to choose."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}


ConditionerConfig = (
    TextTransformerConfig
    | ClipTextConfig
    | FrozenTextConfig
    | JoinedTextConfig
    | ClassConfig
    | LayoutConfig
    | SemanticMapConfig
    | LowResolutionConfig
    | MaskedImageConfig
)

# `kind` in a saved config.json.
CONDITIONER_KINDS: Mapping[str, type[ConditionerConfig]] = {
    "text": TextTransformerConfig,
    "frozen_clip": ClipTextConfig,
    "frozen_text": FrozenTextConfig,
    "joined_text": JoinedTextConfig,
    "class": ClassConfig,
    "layout": LayoutConfig,
    "semantic_map": SemanticMapConfig,
    "low_resolution": LowResolutionConfig,
    "masked_image": MaskedImageConfig,
}


def conditioner_kind(config: ConditionerConfig) -> str:
    """Return the name of a conditioner's kind, as in `CONDITIONER_KINDS`."""
    return next(name for name, kind in CONDITIONER_KINDS.items() if type(config) is kind)


def conditioner_to_dict(config: ConditionerConfig) -> dict[str, Any]:
    """Return a configuration as plain values, its `kind` among them."""
    kind = conditioner_kind(config)
    if isinstance(config, JoinedTextConfig):
        return {"kind": kind, "encoders": [conditioner_to_dict(encoder) for encoder in config.encoders]}
    return {"kind": kind, **asdict(config)}


def conditioner_from_dict(values: Any, path: str = "conditioner") -> ConditionerConfig:
    """Build the configuration that `conditioner_to_dict` described, also after a round trip through JSON.

    Raises:
        ValueError: the kind or a setting is unknown, or the values do not fit each other.
    """
    if not isinstance(values, Mapping) or values.get("kind") not in CONDITIONER_KINDS:
        found = values.get("kind") if isinstance(values, Mapping) else values
        raise ValueError(f"{path}.kind must be one of {', '.join(CONDITIONER_KINDS)}, got {found!r}")
    settings = {key: value for key, value in values.items() if key != "kind"}
    if values["kind"] == "joined_text" and isinstance(settings.get("encoders"), list | tuple):
        encoders = enumerate(settings["encoders"])
        settings["encoders"] = [conditioner_from_dict(each, f"{path}.encoders.{number}") for number, each in encoders]
    config: ConditionerConfig = component(CONDITIONER_KINDS[values["kind"]], settings, path)
    return config


def context_dim(config: ConditionerConfig | None) -> int | None:
    """Return D of the context that a conditioner gives for cross-attention, or None if it gives none."""
    return getattr(config, "width", None)


def concat_channels(config: ConditionerConfig | None, latent_channels: int) -> int:
    """Return the number of channels that a conditioner adds to the UNet's input beside the latent's own."""
    match config:
        case SemanticMapConfig():
            return config.out_channels
        case LowResolutionConfig():
            return config.channels
        case MaskedImageConfig():
            return latent_channels + 1
    return 0
