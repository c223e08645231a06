"""The picture itself at the latent's size, for super-resolution (paper, Sec. 4.4).

Latents cache `KEY.low_resolution.npy`, (h, w, 3) uint8: the stored picture, reduced bicubically with antialiasing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipelines.conditions.cache_only import CacheOnly
from pipelines.conditions.config import LowResolutionCondition
from pipelines.conditions.kind import Pair
from pipelines.shards.format import decode_npy, encode_npy

LOW_RESOLUTION = "low_resolution.npy"


def low_resolution(config: LowResolutionCondition) -> CacheOnly:
    """Return the kind `low_resolution`."""
    return CacheOnly(config, (LOW_RESOLUTION,), lambda device, encode_images: SmallPictures(config))


class SmallPictures:
    """Reduces pictures by a whole factor."""

    def __init__(self, config: LowResolutionCondition) -> None:
        self.config = config

    def encode(self, pairs: Sequence[Pair]) -> list[dict[str, bytes]]:
        return [{LOW_RESOLUTION: encode_npy(self._reduced(pair))} for pair in pairs]

    def _reduced(self, pair: Pair) -> NDArray[np.uint8]:
        assert pair.image is not None
        height, width = (side // self.config.factor for side in pair.image.shape[:2])
        return np.asarray(Image.fromarray(pair.image).resize((width, height), Image.Resampling.BICUBIC))


def decode_small_picture(files: Mapping[str, bytes]) -> NDArray[np.uint8]:
    """Return the (h, w, 3) picture of a cached sample."""
    return decode_npy(files[LOW_RESOLUTION])
