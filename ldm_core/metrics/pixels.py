"""PSNR and SSIM: how close a reconstruction is to its image, pixel by pixel (paper, Table 8).

Shapes: x, y: (B, C, H, W) images in [-1, 1]; results: (B,).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

DATA_RANGE = 2.0
WINDOW_SIZE = 11
WINDOW_STD = 1.5


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio of each image in dB; infinite for equal images.

    Args:
        x, y: (B, C, H, W) in [-1, 1].

    Returns:
        (B,) float32.

    Raises:
        ValueError: if the shapes differ.
    """
    _check_images(x, y)
    mean_squared_error = (x.float() - y.float()).square().flatten(1).mean(dim=1)
    return 10.0 * torch.log10(DATA_RANGE**2 / mean_squared_error)


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """Return the structural similarity of each image (Wang et al. 2004, Eq. 13), the mean over channels and windows.

    The window is their 11x11 Gaussian of standard deviation 1.5, placed only where it lies inside the image.

    Args:
        x, y: (B, C, H, W) in [-1, 1], H and W at least 11.

    Returns:
        (B,) float32 in [-1, 1]; 1 for equal images.

    Raises:
        ValueError: if the shapes differ or an image is smaller than the window.
    """
    _check_images(x, y)
    if min(x.shape[-2:]) < WINDOW_SIZE:
        raise ValueError(f"SSIM needs images of at least {WINDOW_SIZE} pixels a side, got {tuple(x.shape[-2:])}")
    # Pixels from 0 to 1: the luminance term is not invariant to a shift, and zero must mean black.
    x, y = (x.float() + 1) / 2, (y.float() + 1) / 2
    mean_x, mean_y = _windowed_mean(x), _windowed_mean(y)
    variance_x = _windowed_mean(x * x) - mean_x.square()
    variance_y = _windowed_mean(y * y) - mean_y.square()
    covariance = _windowed_mean(x * y) - mean_x * mean_y
    # Their K_1 and K_2 for pixels up to L = 1 keep both quotients finite where the image is black or flat.
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x.square() + mean_y.square() + c1)
    structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    return (luminance * structure).flatten(1).mean(dim=1)


def _windowed_mean(images: Tensor) -> Tensor:
    """Return Gaussian-weighted means over all windows of each channel: the window is separable, one axis at a time."""
    offsets = torch.arange(WINDOW_SIZE, dtype=torch.float32, device=images.device) - WINDOW_SIZE // 2
    window = torch.exp(-offsets.square() / (2 * WINDOW_STD**2))
    window = window / window.sum()
    channels = images.shape[1]
    rows = window.view(1, 1, -1, 1).expand(channels, 1, -1, 1)
    columns = window.view(1, 1, 1, -1).expand(channels, 1, 1, -1)
    return F.conv2d(F.conv2d(images, rows, groups=channels), columns, groups=channels)


def _check_images(x: Tensor, y: Tensor) -> None:
    if x.shape != y.shape or x.dim() != 4:
        raise ValueError(
            f"metrics compare batches (B, C, H, W) of one shape, got {tuple(x.shape)} and {tuple(y.shape)}"
        )
