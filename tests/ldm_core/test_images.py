"""8-bit pixels to [-1, 1] and back."""

import pytest
import torch

from ldm_core.images import to_uint8, to_unit_range

LEVELS = torch.arange(256, dtype=torch.uint8)


def test_every_8_bit_level_comes_back_from_the_unit_range() -> None:
    images = to_unit_range(LEVELS)
    assert images.dtype == torch.float32
    assert (images[0], images[-1]) == (-1.0, 1.0)
    assert torch.equal(to_uint8(images), LEVELS)


def test_images_become_the_nearest_level_and_stay_in_range() -> None:
    assert to_uint8(torch.tensor([-1.5, -0.999, 0.0, 0.5, 1.003, 7.0])).tolist() == [0, 0, 128, 191, 255, 255]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_level_is_the_nearest_one_in_any_floating_dtype(dtype: torch.dtype) -> None:
    images = to_unit_range(LEVELS).to(dtype)
    nearest = (images.double() + 1).mul(127.5).round().to(torch.uint8)
    assert torch.equal(to_uint8(images), nearest)


def test_the_memory_layout_of_pixels_is_kept() -> None:
    # Convolution kernels differ by layout, so that a copy here would change the last bits of latents.
    pixels = torch.zeros(2, 4, 5, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
    assert to_unit_range(pixels).stride() == pixels.stride()
