"""8-bit pixels and the range that networks work in.

Any shape and layout: values alone change. images: floating point in [-1, 1]; pixels: uint8, 0 ... 255.
"""

import torch
from torch import Tensor


def to_unit_range(pixels: Tensor) -> Tensor:
    """Convert uint8 pixels to float32 in [-1, 1], of the same shape and memory layout."""
    return pixels.float().div(127.5).sub(1)


def to_uint8(images: Tensor) -> Tensor:
    """Convert floating-point images in [-1, 1] to the nearest uint8 pixels; values beyond the range are clamped.

    The inverse of `to_unit_range`, whatever floating dtype the images have.
    """
    # float32 first: bfloat16 has 8 bits of mantissa, too few to round to the right one of 256 levels.
    return images.float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)
