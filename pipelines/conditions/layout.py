"""Layouts: labelled boxes (paper, Sec. 4.3.1, layout-to-image).

Latents cache `KEY.boxes.npy`, (objects, 5) float32: class number, x, y, width and height in units of the stored
picture. Pairs carry boxes as COCO has them, in a column of the source: a list of `{"bbox": [x, y, width, height],
"category": NAME}` in pixels of the source's picture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.conditions.cache_only import CacheOnly
from pipelines.conditions.class_labels import name_of
from pipelines.conditions.config import LayoutCondition
from pipelines.conditions.kind import Pair
from pipelines.errors import UserError
from pipelines.shards.format import decode_npy, encode_npy

BOXES = "boxes.npy"


def layout(config: LayoutCondition) -> CacheOnly:
    """Return the kind `layout`."""
    return CacheOnly(config, (BOXES,), lambda device, encode_images: Boxes(config), from_facts=True)


class Boxes:
    """Converts boxes to the part of the picture that is stored."""

    def __init__(self, config: LayoutCondition) -> None:
        self.config = config
        self.numbers = {name: number for number, name in enumerate(config.classes)}

    def encode(self, pairs: Sequence[Pair]) -> list[dict[str, bytes]]:
        return [{BOXES: encode_npy(self._boxes(pair))} for pair in pairs]

    def _boxes(self, pair: Pair) -> NDArray[np.float32]:
        given = pair.facts.get(self.config.column)
        if not isinstance(given, list):
            raise _wrong(pair, self.config.column, given, "a list of boxes")
        crop = _crop(pair.facts)
        boxes = [self._box(pair, box, crop) for box in given]
        return np.array([box for box in boxes if box is not None], np.float32).reshape(-1, 5)

    def _box(self, pair: Pair, box: Any, crop: tuple[float, float, float, float]) -> list[float] | None:
        """Return a box within the crop; None if it lies outside."""
        column = self.config.column
        corners = box.get("bbox") if isinstance(box, dict) else None
        if not (
            isinstance(corners, list)
            and len(corners) == 4
            and all(isinstance(value, int | float) and np.isfinite(value) for value in corners)
        ):
            raise _wrong(pair, column, box, 'boxes such as {"bbox": [x, y, width, height], "category": NAME}')
        name = name_of(box.get("category", box.get("label")))
        if name not in self.numbers:
            raise UserError(
                f"sample {pair.key} has a box of {name or 'no class'}, which condition.classes lacks: add it, or leave "
                "such boxes out of the source"
            )
        x, y, width, height = crop
        left, top = max((corners[0] - x) / width, 0.0), max((corners[1] - y) / height, 0.0)
        right = min((corners[0] + corners[2] - x) / width, 1.0)
        bottom = min((corners[1] + corners[3] - y) / height, 1.0)
        if right <= left or bottom <= top:
            return None
        return [self.numbers[name], left, top, right - left, bottom - top]


def decode_boxes(files: Mapping[str, bytes]) -> NDArray[np.float32]:
    """Return the (objects, 5) boxes of a cached sample."""
    return decode_npy(files[BOXES])


def _crop(facts: Mapping[str, Any]) -> tuple[float, float, float, float]:
    """Return x, y, width and height of what is stored of a picture, in pixels of the source's: all, or its centre."""
    wide, high, width, height = (facts[name] for name in ("original_width", "original_height", "width", "height"))
    scale = max(width / wide, height / high)
    return (wide - width / scale) / 2, (high - height / scale) / 2, width / scale, height / scale


def _wrong(pair: Pair, column: str, value: Any, wanted: str) -> UserError:
    return UserError(f"sample {pair.key} needs {wanted} as {column!r}, got {str(value)[:80]}: set condition.column")
