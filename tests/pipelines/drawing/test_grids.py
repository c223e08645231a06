"""Grids of pictures, measured pixel by pixel."""

import io

import numpy as np
import pytest
from PIL import Image

from pipelines.drawing.grids import GAP, encode_png, grid


def pictures(count: int, side: int = 16) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 200, (count, side, side, 3), dtype=np.uint8)


def test_every_picture_stands_in_its_cell_unchanged() -> None:
    images = pictures(5)
    laid_out = grid(images, 3)
    assert laid_out.shape == (2 * (16 + GAP) + GAP, 3 * (16 + GAP) + GAP, 3)
    for index, image in enumerate(images):
        y, x = (GAP + place * (16 + GAP) for place in divmod(index, 3))
        np.testing.assert_array_equal(laid_out[y : y + 16, x : x + 16], image)


def test_fewer_pictures_than_columns_make_a_narrow_grid() -> None:
    assert grid(pictures(2), 8).shape[1] == 2 * (16 + GAP) + GAP


def test_scale_repeats_pixels() -> None:
    images = pictures(1)
    scaled = grid(images, 1, scale=3)[GAP : GAP + 48, GAP : GAP + 48]
    np.testing.assert_array_equal(scaled, images[0].repeat(3, axis=0).repeat(3, axis=1))


def test_captions_are_drawn_below_and_never_wider_than_their_picture() -> None:
    images = pictures(2, side=64)
    plain, captioned = grid(images, 2), grid(images, 2, ["red circle", "x" * 500])
    assert captioned.shape[0] > plain.shape[0]
    between = captioned[:, GAP + 64 : GAP + 64 + GAP]
    assert (between == 255).all()
    assert (captioned[GAP + 64 :] < 128).any()


@pytest.mark.parametrize("caption", ["", "\x00\n\t", "日本語 café 🎈", "‮ right to left ‬", "<script>", "a " * 5000])
def test_any_caption_can_be_drawn(caption: str) -> None:
    once, again = (grid(pictures(1), 1, [caption], scale=4) for _ in range(2))
    np.testing.assert_array_equal(once, again)


def test_png_holds_the_grid_exactly() -> None:
    laid_out = grid(pictures(3), 2)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(encode_png(laid_out)))), laid_out)


@pytest.mark.parametrize(
    "images", [np.zeros((1, 8, 8, 3)), np.zeros((8, 8, 3), np.uint8), np.zeros((0, 8, 8, 3), np.uint8)]
)
def test_other_arrays_are_refused(images: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"images must be \(N, H, W, 3\) uint8 with N >= 1; got"):
        grid(images, 1)


def test_one_caption_a_picture() -> None:
    with pytest.raises(ValueError, match=r"one per picture \(2\); got 1"):
        grid(pictures(2), 1, ["only one"])
