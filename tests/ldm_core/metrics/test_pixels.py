"""PSNR and SSIM against their definitions, written out as loops."""

import numpy as np
import pytest
import torch
from torch import Tensor

from ldm_core.metrics import psnr, ssim


@pytest.fixture
def pair() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(2, 3, 14, 16, generator=generator) * 2 - 1
    y = (x + 0.3 * torch.randn(x.shape, generator=generator)).clamp(-1, 1)
    return x, y


def ssim_of_one_channel(x: np.ndarray, y: np.ndarray) -> float:
    """Compute Wang et al. 2004, Eq. (13) to (16), window by window on values in [0, 255]."""
    axis = np.arange(11) - 5
    window = np.exp(-(axis[:, None] ** 2 + axis[None] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    scores = []
    for top in range(x.shape[0] - 10):
        for left in range(x.shape[1] - 10):
            a, b = x[top : top + 11, left : left + 11], y[top : top + 11, left : left + 11]
            mean_a, mean_b = (window * a).sum(), (window * b).sum()
            variance_a, variance_b = (window * (a - mean_a) ** 2).sum(), (window * (b - mean_b) ** 2).sum()
            covariance = (window * (a - mean_a) * (b - mean_b)).sum()
            scores.append(
                (2 * mean_a * mean_b + c1)
                * (2 * covariance + c2)
                / ((mean_a**2 + mean_b**2 + c1) * (variance_a + variance_b + c2))
            )
    return float(np.mean(scores))


def test_psnr_of_a_constant_error_is_twenty_log10_of_the_range_over_it() -> None:
    x = torch.zeros(2, 3, 4, 4)
    y = x + torch.tensor([0.2, 0.02]).view(2, 1, 1, 1)
    # 20 log10(2 / error)
    torch.testing.assert_close(psnr(x, y), torch.tensor([20.0, 40.0]))
    assert torch.isinf(psnr(x, x)).all()


def test_ssim_is_the_definition_on_pixels_from_black_to_white(pair: tuple[Tensor, Tensor]) -> None:
    x, y = pair
    as_bytes = [(image.double().numpy() + 1) * 127.5 for image in (x, y)]
    expected = [
        np.mean([ssim_of_one_channel(as_bytes[0][i, c], as_bytes[1][i, c]) for c in range(3)]) for i in range(2)
    ]
    assert ssim(x, y).tolist() == pytest.approx(expected, abs=1e-5)


def test_equal_images_are_perfectly_similar_and_noise_is_not(pair: tuple[Tensor, Tensor]) -> None:
    x, y = pair
    torch.testing.assert_close(ssim(x, x), torch.ones(2))
    assert (ssim(x, y) < 0.99).all()


def test_images_that_cannot_be_compared_are_refused() -> None:
    with pytest.raises(ValueError, match="batches \\(B, C, H, W\\) of one shape"):
        psnr(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 9))
    with pytest.raises(ValueError, match=r"at least 11 pixels a side, got \(8, 8\)"):
        ssim(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8))
