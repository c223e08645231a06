"""Layouts: labelled bounding boxes written as tokens (paper, Sec. 4.3.1, Appendix D.3: layout-to-image).

An object is three tokens: its class and two corners of its box; a corner's token is its cell in a grid over the
image. Objects that are not there, and what a layout lacks, are the last token of the vocabulary. Two more tokens give
the corners of the crop of the original image that is wanted, as the released model was trained on crops.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ldm_core.conditioning.interface import Conditioner, Conditioning
from ldm_core.networks.text_transformer import TextTransformer, TextTransformerConfig


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
        """The tokens of one layout.

        Args:
            objects: in the order they are to be written. A label of the published model is the category,
                plus the number of categories times the flags of Open Images (group, occluded, depiction, inside).
            crop: the part of the image that is wanted, in units of the whole image as all boxes are; its label is not
                used.

        Returns:
            (max_length,) int64.

        Raises:
            ValueError: more than `max_objects` objects, or a label that is no token.
        """
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
        """Tokens of the upper left and the lower right corner."""
        return self._cell(box.x, box.y), self._cell(box.x + box.width, box.y + box.height)

    def _cell(self, x: float, y: float) -> int:
        side = math.isqrt(self.vocabulary_size)
        column, row = (min(max(round(value * (side - 1)), 0), side - 1) for value in (x, y))
        return row * side + column


class LayoutConditioner(Conditioner):
    """Tokens (B, L) of layouts, from `LayoutConfig.encode`, to a context (B, L, D)."""

    def __init__(self, config: LayoutConfig) -> None:
        super().__init__()
        self.config = config
        self.transformer = TextTransformer(config.transformer)

    def unconditional(self) -> Tensor:
        """(1, L) the layout without objects."""
        return self.config.encode([])[None]

    def forward(self, tokens: Tensor) -> Conditioning:
        """Tokens (B, L) of any integer type -> context (B, L, D). Raises ValueError as the transformer does."""
        return Conditioning(context=self.transformer(tokens))
