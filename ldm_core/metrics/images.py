"""What a metric sees: pictures as a PNG would hold them, at the size its network takes.

Shapes: images: (B, 3, H, W) in [-1, 1]; levels: (B, 3, H, W) uint8; resized: (B, 3, size, size) float32 in [0, 255].
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Resize = Literal["clean", "tensorflow"]

# Less than half an 8-bit level: what rounding still takes to the last one.
RANGE_SLACK = 1 / 255


def to_levels(images: Tensor) -> Tensor:
    """The 8-bit values of images. Published scores are those of saved pictures, so every metric starts from these.

    Args:
        images: (B, 3, H, W) floating point in [-1, 1].

    Returns:
        (B, 3, H, W) uint8.

    Raises:
        ValueError: when the shape or dtype is another, or a value is not finite or outside the range.
    """
    if images.dim() != 4 or images.shape[1] != 3 or images.numel() == 0 or not images.is_floating_point():
        raise ValueError(
            f"metrics take floating-point images (B, 3, H, W) in [-1, 1], got {tuple(images.shape)} {images.dtype}"
        )
    low, high = (bound.item() for bound in images.float().aminmax())
    if not (low >= -1 - RANGE_SLACK and high <= 1 + RANGE_SLACK):
        raise ValueError(
            f"images must be finite and in [-1, 1], got {low:.4g} to {high:.4g}: scale pixels, clamp samples"
        )
    return images.float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)


def from_levels(levels: Tensor) -> Tensor:
    """(B, 3, H, W) uint8 -> float32 in [-1, 1], the inverse of `to_levels`."""
    return levels.float().div(127.5).sub(1)


def resize_for_inception(levels: Tensor, size: int, mode: Resize) -> Tensor:
    """Resize pictures to a square for the Inception network.

    Args:
        levels: (B, 3, H, W) uint8.
        size: of the result.
        mode: "clean" is the antialiased bicubic of PIL, unrounded (Parmar et al. 2022, clean-fid); "tensorflow" is the
            bilinear without antialiasing of TensorFlow 1, which the original FID and the paper's numbers use.

    Returns:
        (B, 3, size, size) float32 in [0, 255].
    """
    if mode == "tensorflow":
        from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

        return interpolate_bilinear_2d_like_tensorflow1x(levels.float(), size=(size, size), align_corners=False)
    return _bicubic(levels.double(), (size, size)).clamp(0, 255).float()


def crop_for_clip(levels: Tensor, size: int) -> Tensor:
    """The central square of pictures, resized by antialiased bicubic and rounded, as PIL does for CLIP.

    Args:
        levels: (B, 3, H, W) uint8.
        size: of the result.

    Returns:
        (B, 3, size, size) float32 whole numbers in [0, 255].
    """
    side = min(levels.shape[-2:])
    top, left = (levels.shape[-2] - side) // 2, (levels.shape[-1] - side) // 2
    square = levels[..., top : top + side, left : left + side].double()
    # PIL goes over the rows, then over the columns, and rounds after each.
    for shape in ((side, size), (size, size)):
        square = _bicubic(square, shape).round().clamp(0, 255)
    return square.float()


def _bicubic(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """PIL's bicubic, whose weights are float64 as the pixels must be here."""
    return F.interpolate(pixels, size=size, mode="bicubic", antialias=True)
