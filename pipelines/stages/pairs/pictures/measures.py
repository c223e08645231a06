"""Measures of a stored picture: perceptual hash, entropy and sharpness."""

from __future__ import annotations

import cv2
import numpy as np

_SIDE, _LOW = 32, 8
# Standard deviation of the reduced grey values below which the hash would only describe noise.
_FLAT = 2.0


def perceptual_hash(pixels: np.ndarray) -> int | None:
    """Compute 64 bits (as a signed integer) that hardly change when a picture is re-encoded, resized or toned.

    The picture is reduced to 32x32 grey values. Each bit says whether one of the 8x8 lowest frequencies of their
    cosine transform, without the constant ones, is above the median of the 64.

    Args:
        pixels: uint8 (H, W, 3) RGB.

    Returns:
        The hash; None for pictures that are nearly flat.
    """
    small = cv2.resize(grey(pixels), (_SIDE, _SIDE), interpolation=cv2.INTER_AREA).astype(np.float32)
    if small.std() < _FLAT:
        return None
    low = cv2.dct(small)[1 : _LOW + 1, 1 : _LOW + 1].ravel()
    return int(np.packbits(low > np.median(low)).view(">i8")[0])


def entropy(pixels: np.ndarray) -> float:
    """Compute the entropy of the grey values: 0 to 8 bits."""
    counts = np.bincount(grey(pixels).ravel(), minlength=256)
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log2(shares)).sum())


def sharpness(pixels: np.ndarray) -> float:
    """Compute the variance of the Laplacian of the grey values (0 to 255)."""
    return float(cv2.Laplacian(grey(pixels), cv2.CV_64F).var())


def grey(pixels: np.ndarray) -> np.ndarray:
    """Convert uint8 (H, W, 3) RGB to uint8 (H, W) grey."""
    return cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
