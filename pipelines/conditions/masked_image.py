"""Pictures with a part blacked out, for inpainting (paper, Sec. 4.5).

Latents cache, for some masks drawn for each picture,

KEY.masked.npy   (masks, C, h, w) float16, the latent of the picture without what is under the mask, not scaled
KEY.masks.npy    (masks, h, w) uint8, 1 where the latent is to be filled in

A mask is a union of rectangles and brush strokes, drawn from the picture's content alone: the same picture has the same
masks, whatever its key.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from ldm_core.conditioning import MaskedImage, MaskedImageConditioner
from ldm_core.configs.conditioning import MaskedImageConfig
from ldm_core.images import to_unit_range
from pipelines.conditions.cache_only import CacheOnly
from pipelines.conditions.config import MaskedImageCondition
from pipelines.conditions.kind import Encode, Pair
from pipelines.errors import UserError
from pipelines.shards.format import decode_npy, encode_npy

MASKED, MASKS = "masked.npy", "masks.npy"
MOST_SHAPES = 4


def masked_image(config: MaskedImageCondition) -> CacheOnly:
    """Return the kind `masked_image`."""
    return CacheOnly(
        config, (MASKED, MASKS), lambda device, encode_images: MaskedPictures(config, device, encode_images)
    )


class MaskedPictures:
    """Encodes pictures under the masks drawn for them."""

    def __init__(self, config: MaskedImageCondition, device: str, encode_images: Encode | None) -> None:
        self.config, self.device = config, device
        self.conditioner = MaskedImageConditioner(MaskedImageConfig(), encode=encode_images)

    def encode(self, pairs: Sequence[Pair]) -> list[dict[str, bytes]]:
        return [self._encoded(pair) for pair in pairs]

    @torch.inference_mode()
    def _encoded(self, pair: Pair) -> dict[str, bytes]:
        assert pair.image is not None
        masks = draw_masks(pair.image, self.config.masks)
        picture = to_unit_range(torch.from_numpy(pair.image).to(self.device).permute(2, 0, 1)[None])
        fill = torch.from_numpy(masks).bool().to(self.device)[:, None]
        given = self.conditioner(MaskedImage(image=picture.expand(len(masks), -1, -1, -1), mask=fill)).concat
        assert given is not None
        latents = given[:, :-1].half().cpu().numpy()
        if not np.isfinite(latents).all():
            raise UserError(f"the first stage encodes sample {pair.key} under a mask to values not finite in fp16")
        small = (given[:, -1] > 0).to(torch.uint8).cpu().numpy()
        return {MASKED: encode_npy(latents), MASKS: encode_npy(small)}


def draw_masks(image: NDArray[np.uint8], count: int) -> NDArray[np.uint8]:
    """Return (count, H, W) masks for a picture (H, W, 3), 1 where it is to be filled in; none is empty."""
    digest = hashlib.sha256(image.tobytes()).digest()
    random = np.random.default_rng(np.frombuffer(digest, np.uint32))
    return np.stack([_draw(random, image.shape[0], image.shape[1]) for _ in range(count)])


def _draw(random: np.random.Generator, height: int, width: int) -> NDArray[np.uint8]:
    mask = Image.new("L", (width, height))
    draw = ImageDraw.Draw(mask)
    for _ in range(random.integers(1, MOST_SHAPES + 1)):
        if random.random() < 0.5:
            sides = random.uniform(0.1, 0.5, 2) * (width, height)
            x, y = random.uniform(0, 1, 2) * ((width, height) - sides)
            draw.rectangle((x, y, x + sides[0], y + sides[1]), fill=1)
        else:
            points = random.uniform(0, 1, (random.integers(2, 6), 2)) * (width, height)
            draw.line(
                [(x, y) for x, y in points], fill=1, width=int(random.uniform(0.05, 0.2) * min(height, width)) + 1
            )
    return np.asarray(mask).copy()


def decode_masked(files: Mapping[str, bytes]) -> tuple[NDArray[np.float16], NDArray[np.uint8]]:
    """Return the (masks, C, h, w) latents and the (masks, h, w) masks of a cached sample."""
    return decode_npy(files[MASKED]), decode_npy(files[MASKS])
