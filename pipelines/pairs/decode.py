"""From the bytes of any picture to the bytes that are stored: decoded by content, bounded, upright, RGB, resized.

The input is hostile: sizes are checked before pixels are decoded, only common raster formats are tried, and whatever a
decoder raises becomes a status of the row.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image, UnidentifiedImageError

from pipelines.pairs.config import PairsConfig
from pipelines.pairs.rows import RejectedError

# Formats that are pictures on the web and in data sets. Pillow knows many more, some of which start other programs
# (EPS), have seen little testing, or decode before their size can be checked (ICO).
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF", "JPEG2000", "PPM", "TGA")
_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Pillow's own limit is one for the whole process and only warns; ours is the recipe's and is checked below.
Image.MAX_IMAGE_PIXELS = None


@dataclass(frozen=True)
class Picture:
    """An encoded picture as it is stored, and the size (pixels, upright) of what it was made from."""

    data: bytes
    width: int
    height: int
    original_width: int
    original_height: int


def make_picture(data: bytes, config: PairsConfig) -> Picture:
    """Decode, turn upright, resize and encode again.

    JPEGs are decoded at the smallest of the scales 1, 1/2, 1/4, 1/8 that is still at least the target size. The first
    frame of an animation counts. Transparency is laid over white. With `center_crop` pictures smaller than
    `image_size` are enlarged, because training needs one size; with `keep_ratio` nothing is.

    Args:
        data: the file, in any format of FORMATS, whatever its name said.
        config: sizes, limits and the format of the result.

    Raises:
        RejectedError: `too_large`, `not_an_image`, `too_small`, `decode_error` or `encode_error`.
    """
    if len(data) > config.max_image_bytes:
        raise RejectedError("too_large")
    try:
        opened = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        raise RejectedError("not_an_image") from None
    except Exception:  # Decoders raise anything on damaged input: SyntaxError, struct.error, IndexError, MemoryError …
        raise RejectedError("decode_error") from None
    with opened as image:
        width, height = image.size
        if width * height > config.max_image_pixels:
            raise RejectedError("too_large")
        if min(width, height) < max(config.min_size, 1):
            raise RejectedError("too_small")
        try:
            pixels = _load(image, data, config)
            turn = _orientation(pixels)
            upright = _resize(_to_rgb(pixels), config)
            if turn in _UPRIGHT:
                upright = upright.transpose(_UPRIGHT[turn])
        except Exception:
            raise RejectedError("decode_error") from None
    if turn >= 5:
        width, height = height, width
    try:
        encoded = _encode(upright, config)
    except (OSError, ValueError):
        # keep_ratio may leave a side that is longer than the format can hold.
        raise RejectedError("encode_error") from None
    return Picture(encoded, *upright.size, original_width=width, original_height=height)


def _load(image: Image.Image, data: bytes, config: PairsConfig) -> Image.Image:
    full = image.size
    image.draft(None, (config.image_size, config.image_size))
    try:
        image.load()
    except Exception:
        if image.size == full:
            raise
        # Lossless JPEGs cannot be decoded at a smaller scale.
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        image.load()
    return image


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # A broken EXIF block does not make the picture unreadable.
        return 1
    return value if isinstance(value, int) else 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        return _deep_to_rgb(image)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGB", rgba.size, "white")
        white.paste(rgba, mask=rgba.getchannel("A"))
        return white
    return image.convert("RGB")


def _deep_to_rgb(image: Image.Image) -> Image.Image:
    """Grey of 16 bits or of floating point to 8 bits; the range is the smallest usual one that holds all values."""
    values = np.nan_to_num(np.asarray(image, dtype=np.float32), posinf=0.0, neginf=0.0)
    largest = float(values.max(initial=0.0))
    usual = (1.0, 255.0, 65535.0) if image.mode == "F" else (65535.0,)
    full = next((limit for limit in usual if largest <= limit), largest)
    grey = np.clip(values * (255.0 / full), 0, 255)
    return Image.fromarray(np.rint(grey).astype(np.uint8), "L").convert("RGB")


def _resize(image: Image.Image, config: PairsConfig) -> Image.Image:
    target = config.image_size
    if config.resize == "center_crop":
        side = min(image.size)
        left, top = (image.width - side) / 2, (image.height - side) / 2
        box = (left, top, left + side, top + side)
        # reducing_gap: a cheap box filter first, then Lanczos from at least three times the target size.
        return image.resize((target, target), Image.Resampling.LANCZOS, box=box, reducing_gap=3.0)
    scale = target / min(image.size)
    if scale >= 1:
        return image
    size = (max(round(image.width * scale), target), max(round(image.height * scale), target))
    return image.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)


def _encode(image: Image.Image, config: PairsConfig) -> bytes:
    buffer = io.BytesIO()
    if config.encode == "jpg":
        # Full colour resolution where quality is asked for: at training sizes subsampled colour blurs edges.
        subsampling = 0 if config.quality >= 90 else 2
        image.save(buffer, "JPEG", quality=config.quality, subsampling=subsampling)
    elif config.encode == "webp":
        image.save(buffer, "WEBP", quality=config.quality, method=4)
    else:
        image.save(buffer, "PNG", compress_level=6)
    return buffer.getvalue()
