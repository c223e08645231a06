"""The size that a picture is stored at, and the resampling that gets it there.

Pixels are uint8 (H, W, 3) RGB throughout; sizes are (width, height) in pixels.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

# Intel's routines inside OpenCV round differently on each kind of processor; with one kind named, all x86 machines
# of a cluster give the same bytes. Read by OpenCV at its first use.
os.environ.setdefault("OPENCV_IPP", "avx2")
import cv2

from pipelines.stages.pairs.config import PairsConfig
from pipelines.stages.pairs.rows import RejectedError

# Threads would compete with the other worker processes.
cv2.setNumThreads(1)

Size = tuple[int, int]
# The longest side that a format can hold, in pixels.
_LONGEST = {"jpg": 65_500, "webp": 16_383, "png": 1_000_000}
# A picture to be cropped is scaled as a whole if it is at most this many times as long as the crop: the crop's place
# then does not depend on the scale that a JPEG is decoded at. The ends of longer pictures are cut off first.
_COVER = 4
# Large reductions begin with a box filter, by a whole factor that leaves at least this reduction to the better filter.
LEFT_TO_CUBIC = 1.5
# Fits the low-pass of the 4-tap cubic to Pillow's Lanczos, in PSNR over sharp and soft photographs (docs/log.md).
_BLUR = 0.65


@dataclass(frozen=True)
class Geometry:
    """The sizes that a picture passes through, all of them upright.

    Attributes:
        whole: the size that the whole picture would be scaled to.
        scaled: the centre of `whole` that is computed; smaller than it only for very long pictures.
        stored: the stored size: the centre of `scaled`, or `scaled` in the middle of a white picture.
        bucket: `WIDTHxHEIGHT` with `resize: buckets`, otherwise None.
    """

    whole: Size
    scaled: Size
    stored: Size
    bucket: str | None = None


def plan(width: int, height: int, config: PairsConfig) -> Geometry:
    """Plan the geometry of a picture of this upright size.

    Raises:
        RejectedError: `too_small` if it would have to be enlarged and may not; `too_large` if enlarging it would give
            more than `max_image_pixels`; `encode_error` if a side is longer than the format can hold.
    """
    geometry = _plan(width, height, config)
    if math.prod(geometry.scaled) > max(width * height, config.max_image_pixels):
        raise RejectedError("too_large")
    if max(geometry.stored) > _LONGEST[config.encode]:
        raise RejectedError("encode_error")
    return geometry


def _plan(width: int, height: int, config: PairsConfig) -> Geometry:
    target = config.image_size
    whole = (width, height)
    if config.resize == "none":
        return Geometry(whole, whole, whole)
    if config.resize == "border":
        scaled = _scaled(whole, target / max(whole), config)
        return Geometry(scaled, scaled, (target, target))
    if config.resize == "keep_ratio":
        scaled = _scaled(whole, target / min(whole), config)
        return Geometry(scaled, scaled, scaled)
    stored, name = (target, target), None
    if config.resize == "buckets":
        stored = nearest_bucket(width, height, bucket_sizes(target, config.buckets.step, config.buckets.max_aspect))
        name = f"{stored[0]}x{stored[1]}"
    scale = max(stored[0] / width, stored[1] / height)
    if scale > 1 and not config.upscale:
        raise RejectedError("too_small")
    whole = (max(round(width * scale), stored[0]), max(round(height * scale), stored[1]))
    scaled = (min(whole[0], _COVER * stored[0]), min(whole[1], _COVER * stored[1]))
    return Geometry(whole, scaled, stored, name)


def _scaled(size: Size, scale: float, config: PairsConfig) -> Size:
    if scale >= 1 and not config.upscale:
        return size
    # The side that `scale` was computed for comes out exactly.
    return max(round(size[0] * scale), 1), max(round(size[1] * scale), 1)


@lru_cache(maxsize=16)
def bucket_sizes(image_size: int, step: int, max_aspect: float) -> tuple[Size, ...]:
    """List the sizes whose sides are multiples of `step`, with an area of at most image_size² and an aspect ratio of at
    most `max_aspect`.

    Only maximal sizes: adding `step` to either side would exceed the area.
    """
    largest = image_size * image_size
    sides = range(step, largest // step + 1, step)
    sizes = [(w, h) for w in sides for h in range(step, largest // w + 1, step)]
    return tuple(
        (w, h)
        for w, h in sizes
        if max(w, h) <= max_aspect * min(w, h) and (w + step) * h > largest and w * (h + step) > largest
    )


def nearest_bucket(width: int, height: int, sizes: tuple[Size, ...]) -> Size:
    """Return the size whose aspect ratio is nearest on a logarithmic scale; of two equally near ones the narrower."""
    aspect = math.log(width / height)
    return min(sizes, key=lambda size: (abs(math.log(size[0] / size[1]) - aspect), size))


def resize(pixels: np.ndarray, geometry: Geometry, turn: int = 1) -> np.ndarray:
    """Scale, turn upright, and crop or pad.

    Args:
        pixels: the whole picture as its file has it (before turning), decoded at any scale.
        geometry: the plan for the upright picture.
        turn: EXIF orientation, 1 to 8.
    """
    whole, scaled = geometry.whole, geometry.scaled
    # Orientations 5 to 8 swap width and height.
    if turn >= 5:
        whole, scaled = whole[::-1], scaled[::-1]
    if scaled != whole:
        height, width = pixels.shape[:2]
        part = (-(-width * scaled[0] // whole[0]), -(-height * scaled[1] // whole[1]))
        pixels = _centre(pixels, part)
    upright = turned(scale_to(pixels, scaled), turn)
    if geometry.scaled == geometry.stored:
        return upright
    if geometry.scaled[0] >= geometry.stored[0] and geometry.scaled[1] >= geometry.stored[1]:
        return np.ascontiguousarray(_centre(upright, geometry.stored))
    framed = np.full((geometry.stored[1], geometry.stored[0], 3), 255, np.uint8)
    _centre(framed, geometry.scaled)[:] = upright
    return framed


def _centre(pixels: np.ndarray, size: Size) -> np.ndarray:
    """Return a view of the middle."""
    left, top = (pixels.shape[1] - size[0]) // 2, (pixels.shape[0] - size[1]) // 2
    return pixels[top : top + size[1], left : left + size[0]]


def scale_to(pixels: np.ndarray, size: Size) -> np.ndarray:
    """Resample to exactly this size.

    Enlarges by cubic interpolation. Reduces by a cubic after a small Gaussian, without which its 4 taps would alias;
    large reductions average whole blocks of pixels first.
    """
    if (pixels.shape[1], pixels.shape[0]) == size:
        return pixels
    pixels = shrink(pixels, int(_reduction(pixels, size) / LEFT_TO_CUBIC))
    reduction = _reduction(pixels, size)
    if reduction > 1.1:
        taps = 3 if reduction <= 2 else 5
        pixels = cv2.GaussianBlur(pixels, (taps, taps), _BLUR * math.sqrt(reduction - 1))
    return cv2.resize(pixels, size, interpolation=cv2.INTER_CUBIC)


def _reduction(pixels: np.ndarray, size: Size) -> float:
    return min(pixels.shape[1] / size[0], pixels.shape[0] / size[1])


def shrink(pixels: np.ndarray, factor: int) -> np.ndarray:
    """Average blocks of factor x factor pixels; they are stretched a little if the sides are no multiples of it."""
    if factor <= 1:
        return pixels
    size = (pixels.shape[1] // factor, pixels.shape[0] // factor)
    return cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)


def turned(pixels: np.ndarray, turn: int) -> np.ndarray:
    """Turn a picture with this EXIF orientation (1 to 8) upright."""
    match turn:
        case 2:
            return cv2.flip(pixels, 1)
        case 3:
            return cv2.rotate(pixels, cv2.ROTATE_180)
        case 4:
            return cv2.flip(pixels, 0)
        case 5:
            return cv2.transpose(pixels)
        case 6:
            return cv2.rotate(pixels, cv2.ROTATE_90_CLOCKWISE)
        case 7:
            return cv2.rotate(cv2.transpose(pixels), cv2.ROTATE_180)
        case 8:
            return cv2.rotate(pixels, cv2.ROTATE_90_COUNTERCLOCKWISE)
    return pixels
