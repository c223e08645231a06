"""What a metric sees: images as a PNG would hold them, at the size its network takes.

Shapes: images: (B, 3, H, W) in [-1, 1]; pixels: (B, 3, H, W) uint8; resized: (B, 3, size, size) float32 in [0, 255].
"""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from ldm_core.images import to_uint8

Resize = Literal["clean", "tensorflow"]

# Overshoot that is taken for rounding and clamped: half an 8-bit level is 1 / 255 in [-1, 1].
RANGE_SLACK = 1 / 255


def quantize(images: Tensor) -> Tensor:
    """Check images and round them to 8 bits: published scores are those of saved pictures, so every metric starts here.

    Args:
        images: (B, 3, H, W) floating point in [-1, 1].

    Returns:
        (B, 3, H, W) uint8.

    Raises:
        ValueError: for another shape or dtype, or a value that is not finite or outside the range.
    """
    if images.dim() != 4 or images.shape[1] != 3 or images.numel() == 0 or not images.is_floating_point():
        raise ValueError(
            f"metrics take floating-point images (B, 3, H, W) in [-1, 1], got {tuple(images.shape)} {images.dtype}"
        )
    low, high = (bound.item() for bound in images.float().aminmax())
    # Written so that NaN, which compares as False, is refused too.
    if not (low >= -1 - RANGE_SLACK and high <= 1 + RANGE_SLACK):
        raise ValueError(
            f"images must be finite and in [-1, 1], got {low:.4g} to {high:.4g}: scale pixels, clamp samples"
        )
    return to_uint8(images)


def resize_for_inception(pixels: Tensor, size: int, mode: Resize) -> Tensor:
    """Resize pictures to a square for the Inception network.

    Args:
        pixels: (B, 3, H, W) uint8.
        size: height and width of the result.
        mode: "clean" is the antialiased bicubic of PIL, unrounded (Parmar et al. 2022, clean-fid); "tensorflow" is the
            bilinear without antialiasing of TensorFlow 1, which the original FID and the paper's numbers use.

    Returns:
        (B, 3, size, size) float32 in [0, 255].
    """
    if mode == "tensorflow":
        # Lazy: torch-fidelity is optional. Who resizes for Inception has it already, as the network comes from it.
        from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

        return interpolate_bilinear_2d_like_tensorflow1x(pixels.float(), size=(size, size), align_corners=False)
    return _bicubic(pixels.double(), (size, size)).clamp(0, 255).float()


def crop_for_clip(pixels: Tensor, size: int) -> Tensor:
    """Crop pictures to their central square and resize it by antialiased bicubic, rounded, as PIL does for CLIP.

    Args:
        pixels: (B, 3, H, W) uint8.
        size: height and width of the result.

    Returns:
        (B, 3, size, size) float32 whole numbers in [0, 255].
    """
    side = min(pixels.shape[-2:])
    top, left = (pixels.shape[-2] - side) // 2, (pixels.shape[-1] - side) // 2
    square = pixels[..., top : top + side, left : left + side].double()
    # PIL resizes the rows, then the columns, and rounds after each.
    for shape in ((side, size), (size, size)):
        square = _bicubic(square, shape).round().clamp(0, 255)
    return square.float()


def _bicubic(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize by PIL's bicubic. Pass float64: PIL computes its weights in it."""
    return F.interpolate(pixels, size=size, mode="bicubic", antialias=True)
