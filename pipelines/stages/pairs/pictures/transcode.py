"""From the bytes of any picture to the bytes that are stored: decoded by content, upright, RGB, resized, encoded.

The input is hostile: sizes are checked before pixels are decoded, and whatever a decoder raises becomes a status of the
row.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import cv2
import numpy as np
import simplejpeg
from PIL import Image

from pipelines.stages.pairs.config import PairsConfig
from pipelines.stages.pairs.filters import check_values
from pipelines.stages.pairs.pictures.color import needs_conversion, to_srgb
from pipelines.stages.pairs.pictures.jpeg import Jpeg, UnusualError, read_jpeg
from pipelines.stages.pairs.pictures.measures import entropy, perceptual_hash, sharpness
from pipelines.stages.pairs.pictures.raster import Raster
from pipelines.stages.pairs.pictures.resize import Geometry, plan, resize
from pipelines.stages.pairs.rows import RejectedError

_MEASURES = {"entropy": entropy, "sharpness": sharpness}
# Encoders' effort: the next step costs twice the time and saves 1 % (WebP), 2 % (PNG).
_WEBP_METHOD = 2
_PNG_COMPRESSION = 3


@dataclass(frozen=True)
class Picture:
    """An encoded picture and its measures.

    Attributes:
        data: the encoded bytes.
        width, height: pixels, as stored.
        original_width, original_height: pixels of the source picture, upright.
        format: format of the source picture, by Pillow's name.
        bucket: `WIDTHxHEIGHT` with `resize: buckets`, otherwise None.
        phash: perceptual hash of 64 bits, signed, if near duplicates are looked for; None for pictures that are nearly
            flat.
        entropy, sharpness: if a filter asks for them.
    """

    data: bytes
    width: int
    height: int
    original_width: int
    original_height: int
    format: str
    bucket: str | None = None
    phash: int | None = None
    entropy: float | None = None
    sharpness: float | None = None


def make_picture(data: bytes, config: PairsConfig) -> Picture:
    """Decode, turn upright, resize and encode again.

    Args:
        data: a file in any of the formats of `raster`, whatever its name is.
        config: the stage's section of the recipe: sizes, limits, filters and the format of the result.

    Raises:
        RejectedError: `too_large`, `not_an_image`, `too_small`, `decode_error`, `encode_error` or `filtered:NAME`.
    """
    if len(data) > config.max_image_bytes:
        raise RejectedError("too_large")
    if jpeg := read_jpeg(data):
        try:
            return _make(data, jpeg, config)
        except UnusualError:
            # Pillow decodes more kinds of JPEG, only slower.
            pass
    return _make(data, Raster(data, config), config)


def _make(data: bytes, source: Jpeg | Raster, config: PairsConfig) -> Picture:
    size = (source.width, source.height)
    width, height = size if source.turn < 5 else size[::-1]
    _check_size(width, height, config)
    geometry = plan(width, height, config)
    pixels = source.load(geometry.whole if source.turn < 5 else geometry.whole[::-1], config)
    stored = resize(pixels, geometry, source.turn)
    if source.profile is not None:
        # After resizing: far fewer pixels to convert.
        stored = to_srgb(stored, source.profile)
    measured = {name: measure(stored) for name, measure in _MEASURES.items() if name in config.filters}
    check_values(measured, config)
    # Encoding an unchanged JPEG again would only lose quality.
    if not (config.pass_through and _is_unchanged(source, geometry, config)):
        data = encode(stored, config)
    return Picture(
        data,
        *geometry.stored,
        original_width=width,
        original_height=height,
        format=source.format,
        bucket=geometry.bucket,
        phash=perceptual_hash(stored) if config.near_duplicates is not None else None,
        entropy=measured.get("entropy"),
        sharpness=measured.get("sharpness"),
    )


def _check_size(width: int, height: int, config: PairsConfig) -> None:
    if width * height > config.max_image_pixels:
        raise RejectedError("too_large")
    shorter, longer = sorted((width, height))
    if shorter < max(config.min_size, 1):
        raise RejectedError("too_small")
    if config.filters:
        check_values({"width": width, "height": height, "size": shorter, "aspect": longer / shorter}, config)


def _is_unchanged(source: Jpeg | Raster, geometry: Geometry, config: PairsConfig) -> bool:
    """Tell whether the file as it is would be a valid result."""
    return (
        geometry.whole == geometry.stored == (source.width, source.height)
        and source.turn == 1
        and not needs_conversion(source.profile)
        and source.is_exactly(config.encode)
    )


def encode(pixels: np.ndarray, config: PairsConfig) -> bytes:
    """Encode uint8 (H, W, 3) RGB as `config.encode`.

    Raises:
        RejectedError: `encode_error`.
    """
    try:
        if config.encode == "jpg":
            # Full colour resolution if quality is asked for: at training sizes subsampled colour blurs edges.
            subsampling = "444" if config.quality >= 90 else "420"
            return simplejpeg.encode_jpeg(pixels, config.quality, "RGB", subsampling)
        if config.encode == "webp":
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "WEBP", quality=config.quality, method=_WEBP_METHOD)
            return buffer.getvalue()
        options = [cv2.IMWRITE_PNG_COMPRESSION, _PNG_COMPRESSION]
        return cv2.imencode(".png", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), options)[1].tobytes()
    except (ValueError, OSError, cv2.error):
        raise RejectedError("encode_error") from None
