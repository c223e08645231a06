"""Pictures of every format but plain JPEG, decoded by Pillow: told by content, bounded in memory, converted to RGB.

Only common raster formats are tried, and whatever a decoder raises becomes a status of the row.
"""

from __future__ import annotations

import io
import struct
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from pipelines.stages.pairs.config import PairsConfig
from pipelines.stages.pairs.pictures.color import converted, needs_conversion
from pipelines.stages.pairs.pictures.formats import DECODED
from pipelines.stages.pairs.pictures.jpeg import MARGIN, has_too_many_scans, orientation
from pipelines.stages.pairs.pictures.resize import LEFT_TO_CUBIC, Size, shrink
from pipelines.stages.pairs.rows import RejectedError

# The first bytes of these formats, to tell a broken picture from a file that is none.
_MAGIC = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*")
# The memory that decoding one picture may take.
MAX_DECODER_BYTES = 640 << 20
# Measured peaks of Pillow's decoders, in bytes a pixel; 4 for those not listed.
_BYTES_PER_PIXEL = {"WEBP": 20, "AVIF": 12, "JPEG2000": 24, "JPEG": 12, "MPO": 12}
# The same if the pixels are then converted all at once and not in bands.
_WHOLE_BYTES_PER_PIXEL = 16
# Larger pictures are converted and reduced in bands of about this many pixels.
_BAND_PIXELS = 4 << 20
_TILE_WIDTH, _TILE_LENGTH = 322, 323
# Pillow's own limit holds for the whole process and only warns. Ours is the recipe's and is checked on opening.
Image.MAX_IMAGE_PIXELS = None


class Raster:
    """A picture that Pillow has opened.

    Attributes:
        width, height: pixels as stored, before turning.
        turn: EXIF orientation, 1 to 8.
        format: as Pillow names it.
    """

    # The ICC profile is applied on loading: it may be one for CMYK or grey, which are gone afterwards.
    profile = None

    def __init__(self, data: bytes, config: PairsConfig) -> None:
        """Read the header.

        Raises:
            RejectedError: `not_an_image`, `decode_error` or `too_large`.
        """
        self._data = data
        try:
            self._image: Image.Image = Image.open(io.BytesIO(data), formats=DECODED)
        except UnidentifiedImageError:
            raise RejectedError("decode_error" if _looks_like_one(data) else "not_an_image") from None
        except Exception:
            # Decoders raise anything on damaged input: SyntaxError, struct.error, IndexError, MemoryError.
            raise RejectedError("decode_error") from None
        self.format = self._image.format or ""
        self.width, self.height = self._image.size
        pixels = self.width * self.height
        if pixels > config.max_image_pixels or pixels * _BYTES_PER_PIXEL.get(self.format, 4) > MAX_DECODER_BYTES:
            raise RejectedError("too_large")
        if self.format == "TIFF" and _tile_pixels(self._image) * 8 > MAX_DECODER_BYTES:
            raise RejectedError("too_large")
        if self.format in ("JPEG", "MPO") and has_too_many_scans(data):
            raise RejectedError("too_large")
        if self.format == "PNG":
            # PNG orientation may follow the pixel data. Decode now, strictly: Pillow's own look-ahead ignores errors.
            self._load(self._image)
        self.turn = self._orientation()
        self._icc = self._image.info.get("icc_profile")

    def load(self, least: Size, config: PairsConfig) -> np.ndarray:
        """Decode the first frame, over white, to uint8 (H, W, 3) RGB.

        The result is at least MARGIN times as large as `least` if the file is.

        Raises:
            RejectedError: `decode_error`, or `too_large` if decoding would take too much memory.
        """
        factor = int(min(self.width / least[0], self.height / least[1]) / LEFT_TO_CUBIC)
        is_whole = factor <= 1 or self._image.mode[0] in "IF"
        if is_whole and self.width * self.height * _WHOLE_BYTES_PER_PIXEL > MAX_DECODER_BYTES:
            raise RejectedError("too_large")
        image = self._decoded(least, config)
        try:
            if image.mode in ("I", "F") or image.mode.startswith("I;"):
                return _deep_to_rgb(image)
            if image.width * image.height <= _BAND_PIXELS:
                return _to_rgb(image, self._icc)
            return _reduced(image, self._icc, max(factor, 1))
        except Exception:
            raise RejectedError("decode_error") from None

    def is_exactly(self, encode: str) -> bool:
        """Tell whether the file is an 8-bit RGB picture of the format `encode`, not animated, and nothing more."""
        image = self._image
        if image.mode != "RGB" or "transparency" in image.info or getattr(image, "is_animated", False):
            return False
        if needs_conversion(self._icc):
            return False
        if encode == "png" and self.format == "PNG":
            return self._data[24:26] == b"\x08\x02" and _png_end(self._data) == len(self._data)
        if encode == "webp" and self.format == "WEBP":
            return int.from_bytes(self._data[4:8], "little") + 8 == len(self._data)
        return False

    def _decoded(self, least: Size, config: PairsConfig) -> Image.Image:
        image = self._image
        if config.jpeg_scale != "full":
            margin = MARGIN if config.jpeg_scale == "smallest" else 2 * MARGIN
            image.draft(None, (int(least[0] * margin), int(least[1] * margin)))
        try:
            self._load(image)
        except RejectedError:
            if image.size == (self.width, self.height):
                raise
            # Lossless JPEGs cannot be decoded at a smaller scale.
            image = Image.open(io.BytesIO(self._data), formats=DECODED)
            self._load(image)
        return image

    @staticmethod
    def _load(image: Image.Image) -> None:
        try:
            image.load()
        except Exception:
            raise RejectedError("decode_error") from None

    def _orientation(self) -> int:
        if self.format == "TIFF":  # Pillow turns these itself.
            return 1
        try:
            return orientation(self._image.getexif())
        except Exception:  # A broken EXIF block does not make the picture unreadable.
            return 1


def _tile_pixels(image: Image.Image) -> int:
    """Return the pixels of a TIFF's tile, which is decoded whole, however small the picture is; 0 without tiles."""
    tags: Any = getattr(image, "tag_v2", {})
    try:
        return int(tags.get(_TILE_WIDTH, 0)) * int(tags.get(_TILE_LENGTH, 0))
    except (TypeError, ValueError):
        return 0


def _looks_like_one(data: bytes) -> bool:
    return data.startswith(_MAGIC) or data[8:12] == b"WEBP" or data[4:12] == b"ftypavif"


def _reduced(image: Image.Image, profile: bytes | None, factor: int) -> np.ndarray:
    """Convert a large image to RGB and reduce it by a whole factor, one band of rows at a time to save memory."""
    rows = max(_BAND_PIXELS // image.width // factor, 1) * factor
    starts = list(range(0, image.height, rows))
    # A last band of fewer rows than the factor would reduce to nothing: it joins the one before.
    if len(starts) > 1 and image.height - starts[-1] < factor:
        starts.pop()
    bands = []
    for start, stop in zip(starts, [*starts[1:], image.height]):
        band = image.crop((0, start, image.width, stop))
        bands.append(shrink(_to_rgb(band, profile), factor))
    return np.concatenate(bands)


def _to_rgb(image: Image.Image, profile: bytes | None) -> np.ndarray:
    """Convert an image of 8 bits a channel to uint8 (H, W, 3) sRGB, what is transparent to white."""
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGB", rgba.size, "white")
        white.paste(converted(rgba.convert("RGB"), profile), mask=rgba.getchannel("A"))
        return np.array(white)
    if image.mode not in ("RGB", "L", "CMYK"):
        image = image.convert("RGB")
    return np.array(converted(image, profile).convert("RGB"))


def _deep_to_rgb(image: Image.Image) -> np.ndarray:
    """Convert grey of 16 bits or of floating point to 8-bit RGB.

    Files do not say what white is: the smallest usual range that holds all values is assumed.
    """
    values = np.nan_to_num(np.asarray(image, dtype=np.float32), posinf=0.0, neginf=0.0)
    largest = float(values.max(initial=0.0))
    usual = (1.0, 255.0, 65535.0) if image.mode == "F" else (65535.0,)
    full = next((limit for limit in usual if largest <= limit), largest)
    grey = np.clip(values * (255.0 / full), 0, 255)
    return np.repeat(np.rint(grey).astype(np.uint8)[..., None], 3, axis=2)


def _png_end(data: bytes) -> int:
    """Return where the IEND chunk ends; -1 without one."""
    position = 8
    while position + 12 <= len(data):
        length, name = struct.unpack_from(">I4s", data, position)
        position += 12 + length
        if name == b"IEND":
            return position
    return -1
