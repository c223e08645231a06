"""What JPEG's scaled decoding costs in quality: our pictures against those that were decoded in full."""

from __future__ import annotations

import io
import statistics
from collections.abc import Iterable
from typing import Literal

import numpy as np
from PIL import Image

from pipelines.stages.pairs.config import PairsConfig
from pipelines.stages.pairs.pictures.transcode import make_picture

Scale = Literal["smallest", "next", "full"]


def psnr_by_scale(photographs: Iterable[bytes], image_size: int) -> dict[str, dict[str, float]]:
    """Return PSNR in dB (median, 5th percentile, least) of what the stage makes at each scale, before it is encoded.

    Args:
        photographs: JPEG files.
        image_size: pixels of the shorter side.
    """
    found: dict[str, list[float]] = {"smallest": [], "next": []}
    for data in photographs:
        full = _pixels(data, "full", image_size)
        found["smallest"].append(psnr_db(full, _pixels(data, "smallest", image_size)))
        found["next"].append(psnr_db(full, _pixels(data, "next", image_size)))
    return {scale: _summary(values) for scale, values in found.items()}


def psnr_db(expected: np.ndarray, got: np.ndarray) -> float:
    """Return the peak signal-to-noise ratio of 8-bit pictures; 99 if they are equal."""
    error = float(np.mean((expected.astype(np.float64) - got) ** 2))
    return min(99.0, 10 * np.log10(255**2 / error)) if error else 99.0


def _pixels(data: bytes, scale: Scale, image_size: int) -> np.ndarray:
    # PNG, so that what is compared is decoding and resizing alone.
    config = PairsConfig(source="-", image_size=image_size, resize="keep_ratio", encode="png", jpeg_scale=scale)
    with Image.open(io.BytesIO(make_picture(data, config).data)) as image:
        return np.asarray(image.convert("RGB"))


def _summary(values: list[float]) -> dict[str, float]:
    return {
        "photographs": len(values),
        "median_db": statistics.median(values),
        "p5_db": float(np.percentile(values, 5)),
        "least_db": min(values),
    }
