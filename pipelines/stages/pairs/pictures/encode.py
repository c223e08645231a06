"""Pixels to the bytes that are stored."""

from __future__ import annotations

import io

import cv2
import numpy as np
import simplejpeg
from PIL import Image

from pipelines.stages.pairs.config import PairsConfig
from pipelines.stages.pairs.rows import RejectedError

# Encoders' effort: the next step costs twice the time and saves 1 % (WebP), 2 % (PNG).
_WEBP_METHOD = 2
_PNG_COMPRESSION = 3


def encode(pixels: np.ndarray, config: PairsConfig) -> bytes:
    """Encode uint8 (H, W, 3) RGB as `config.encode`.

    Raises:
        RejectedError: `encode_error`.
    """
    try:
        if config.encode == "jpg":
            # Full colour resolution where quality is asked for: at training sizes subsampled colour blurs edges.
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
