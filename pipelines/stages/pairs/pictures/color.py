"""Conversion of colours to sRGB by a picture's own ICC profile."""

from __future__ import annotations

import io
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms

# Real profiles have up to about 2.5 MB (CMYK). The limit also bounds the memory of the cache below.
MAX_PROFILE_BYTES = 4 << 20
_SPACES = {"RGB": "RGB", "L": "GRAY", "CMYK": "CMYK"}


def converted(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Convert an RGB, L or CMYK image to sRGB; unchanged if the profile is sRGB, broken or for another mode."""
    transform = _transform_for(profile, image.mode)
    return image if transform is None else transform.apply(image)


def needs_conversion(profile: bytes | None) -> bool:
    """Tell whether an RGB picture with this profile looks different without it."""
    return _transform_for(profile, "RGB") is not None


def to_srgb(pixels: np.ndarray, profile: bytes | None) -> np.ndarray:
    """Convert uint8 (H, W, 3) RGB to sRGB, as `converted` does."""
    transform = _transform_for(profile, "RGB")
    return pixels if transform is None else np.asarray(transform.apply(Image.fromarray(pixels)))


def _transform_for(profile: bytes | None, mode: str) -> ImageCms.ImageCmsTransform | None:
    return _transform(profile, mode) if profile and len(profile) <= MAX_PROFILE_BYTES else None


# Building a transform takes longer than applying it, and most pictures share a few profiles.
@lru_cache(maxsize=16)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if source.profile.xcolor_space.strip() != _SPACES.get(mode):
            return None
        if mode == "RGB" and "srgb" in (source.profile.profile_description or "").casefold():
            return None
        return ImageCms.buildTransform(
            source,
            ImageCms.createProfile("sRGB"),
            mode,
            "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
    except (ImageCms.PyCMSError, OSError, ValueError):
        return None
