"""8-bit pixels and the range that networks work in, and masks.

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


def to_bool(mask: Tensor) -> Tensor:
    """Convert a mask of 1 (to be filled in) and 0 (kept), of any dtype, to bool, of the same shape and device.

    A mask of bool is returned unread; values of any other on a GPU are waited for.

    Raises:
        ValueError: the mask holds anything else.
    """
    if mask.dtype == torch.bool:
        return mask
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError(
            "a mask must hold only 1 (to be filled) and 0 (kept), got values between "
            f"{mask.min().item():.3g} and {mask.max().item():.3g}: threshold it after resizing"
        )
    return mask.bool()
