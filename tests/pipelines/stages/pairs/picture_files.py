"""Pictures for tests: smooth ones with structure, and what `make_picture` makes of a file."""

import io
from typing import Any

import numpy as np
from PIL import Image

from pipelines.stages.pairs.artifact import decode_image
from pipelines.stages.pairs.config import PairsConfig
from pipelines.stages.pairs.pictures.transcode import Picture, make_picture
from pipelines.stages.pairs.rows import RejectedError


def scene(seed: int, size: tuple[int, int] = (320, 240)) -> Image.Image:
    """Draw a picture with large and small structure, another for each seed."""
    random = np.random.default_rng(seed)
    layers = np.zeros((size[1], size[0], 3), np.float32)
    for cells, weight in ((4, 90.0), (12, 45.0), (40, 20.0)):
        noise = random.standard_normal((cells, cells, 3)).astype(np.float32)
        bands = [Image.fromarray(noise[..., c]).resize(size, Image.Resampling.BICUBIC) for c in range(3)]
        layers += weight * np.stack([np.asarray(band) for band in bands], axis=-1)
    return Image.fromarray(np.clip(layers + 128, 0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def made(data: bytes, **options: Any) -> Picture:
    return make_picture(data, PairsConfig.model_validate({"source": "x", "image_size": 32, "encode": "png", **options}))


def make(data: bytes, **options: Any) -> np.ndarray:
    """Return the stored pixels."""
    picture = made(data, **options)
    pixels = decode_image(picture.data)
    assert pixels.shape == (picture.height, picture.width, 3)
    return pixels


def status_of(data: bytes, **options: Any) -> str:
    try:
        make(data, **options)
    except RejectedError as error:
        return error.status
    return "ok"


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Return PSNR in dB; 99 for equal pictures."""
    error = np.mean((a.astype(np.float64) - b) ** 2)
    return float(10 * np.log10(255**2 / error)) if error else 99.0
