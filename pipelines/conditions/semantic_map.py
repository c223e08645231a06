"""Semantic maps: a class for every pixel (paper, Sec. 4.3.2).

Pairs carry `KEY.map.png`, 8 bits a pixel and of the picture's size, and latents cache it as it is: as a PNG, a map of
few classes takes a fiftieth of its pixels' bytes.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipelines.conditions.cache_only import CacheOnly
from pipelines.conditions.config import SemanticMapCondition
from pipelines.conditions.kind import Pair
from pipelines.errors import UserError

MAP = "map.png"
MOST_PIXELS = 100_000_000


def semantic_map(config: SemanticMapCondition) -> CacheOnly:
    """Return the kind `semantic_map`."""
    return CacheOnly(config, (MAP,), lambda device, encode_images: Maps(config))


class Maps:
    """Takes maps over that fit their pictures."""

    def __init__(self, config: SemanticMapCondition) -> None:
        self.config = config

    def encode(self, pairs: Sequence[Pair]) -> list[dict[str, bytes]]:
        return [{MAP: self._checked(pair)} for pair in pairs]

    def _checked(self, pair: Pair) -> bytes:
        if MAP not in pair.files:
            raise UserError(f"sample {pair.key} has no {MAP}, which condition semantic_map needs of its pairs")
        try:
            found = decode_map(pair.files)
        # Whatever Pillow answers to bytes that are no picture.
        except Exception as error:
            raise UserError(f"{MAP} of sample {pair.key} is no PNG of 8 bits a pixel: {error}") from error
        assert pair.image is not None
        if found.shape != pair.image.shape[:2] or found.max(initial=0) >= self.config.classes:
            raise UserError(
                f"{MAP} of sample {pair.key} must have the picture's size {pair.image.shape[:2]} and classes below "
                f"{self.config.classes}, got size {found.shape} and classes up to {found.max(initial=0)}"
            )
        return pair.files[MAP]


def decode_map(files: Mapping[str, bytes]) -> NDArray[np.uint8]:
    """Return the (H, W) map of a cached sample.

    Raises:
        ValueError: it is no PNG of 8 bits a pixel, or too large.
    """
    with Image.open(io.BytesIO(files[MAP]), formats=("PNG",)) as image:
        if image.mode not in ("L", "P") or image.width * image.height > MOST_PIXELS:
            raise ValueError(f"mode {image.mode}, {image.width} x {image.height} pixels")
        return np.asarray(image).copy()
