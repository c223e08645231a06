"""A scene as the bytes of one picture file, in the formats that real web sites serve."""

import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
from PIL import Image

from jobs.demo.scenes import Scene, render, render_cutout

SIDE = 128
TINY_SIDE = 8
JPEG_QUALITY = 92
ORIENTATION_TAG = 0x0112
ROTATE_90_TO_SHOW = 6


def jpeg(scene: Scene, seed: int) -> bytes:
    """Encode an RGB JPEG of 128 x 128 pixels, as nearly all rows point at."""
    return _save(render(scene, seed, SIDE), "JPEG", quality=JPEG_QUALITY)


def tiny(scene: Scene, seed: int) -> bytes:
    """Encode a thumbnail of 8 x 8 pixels, too small to train on."""
    return _save(render(scene, seed, SIDE).resize((TINY_SIDE, TINY_SIDE)), "JPEG", quality=JPEG_QUALITY)


def cmyk(scene: Scene, seed: int) -> bytes:
    """Encode a JPEG in print colours."""
    return _save(render(scene, seed, SIDE).convert("CMYK"), "JPEG", quality=JPEG_QUALITY)


def exif_rotated(scene: Scene, seed: int) -> bytes:
    """Encode a JPEG as phones do: the pixels lie on their side, and EXIF says how to turn them."""
    exif = Image.Exif()
    exif[ORIENTATION_TAG] = ROTATE_90_TO_SHOW
    stored = render(scene, seed, SIDE).transpose(Image.Transpose.ROTATE_90)
    return _save(stored, "JPEG", quality=JPEG_QUALITY, exif=exif)


def palette(scene: Scene, seed: int) -> bytes:
    """Encode a PNG of at most 64 indexed colours."""
    return _save(render(scene, seed, SIDE).quantize(64), "PNG")


def rgba(scene: Scene, seed: int) -> bytes:
    """Encode a PNG whose background is transparent."""
    return _save(render_cutout(scene, seed, SIDE), "PNG")


def deep(scene: Scene, seed: int) -> bytes:
    """Encode a PNG of 16 bits a channel. Pillow reads but cannot write these, so the chunks are put together here.

    Source: W3C Portable Network Graphics, sections 5.3 and 11.2.
    """
    pixels = np.asarray(render(scene, seed, SIDE)).astype(">u2") * 257
    # Each row of pixels is preceded by its filter type; 0 means unfiltered.
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", SIDE, SIDE, 16, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )


def _save(image: Image.Image, image_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


Encoding = Callable[[Scene, int], bytes]
