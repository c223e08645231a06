"""Resizing: each mode gives the sizes it promises, nothing is enlarged unasked, and scaled decoding is honest."""

import io
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

from pipelines.stages.pairs.pictures.resize import bucket_sizes, nearest_bucket, scale_to, turned
from tests.pipelines.stages.pairs.picture_files import encoded, made, make, psnr, scene, status_of


@pytest.mark.parametrize(
    ("mode", "size", "upscale", "expected"),
    [
        ("center_crop", (300, 100), False, (64, 64)),
        ("center_crop", (63, 100), True, (64, 64)),
        ("keep_ratio", (300, 100), False, (192, 64)),
        ("keep_ratio", (641, 479), False, (86, 64)),
        ("keep_ratio", (50, 40), False, (50, 40)),
        ("keep_ratio", (50, 40), True, (80, 64)),
        ("border", (300, 100), False, (64, 64)),
        ("border", (10, 20), False, (64, 64)),
        ("none", (300, 100), True, (300, 100)),
        ("buckets", (300, 100), False, (80, 48)),
        ("buckets", (100, 100), False, (64, 64)),
        ("buckets", (70, 100), False, (48, 80)),
    ],
)
def test_each_mode_gives_its_size(mode: str, size: tuple[int, int], upscale: bool, expected: tuple[int, int]) -> None:
    options: dict[str, Any] = {"resize": mode, "image_size": 64, "upscale": upscale, "buckets": {"step": 16}}
    picture = made(encoded(scene(0, size)), **options)
    assert (picture.width, picture.height) == expected
    assert picture.bucket == (f"{expected[0]}x{expected[1]}" if mode == "buckets" else None)


@pytest.mark.parametrize("mode", ["center_crop", "buckets"])
def test_modes_of_fixed_size_leave_small_pictures_out(mode: str) -> None:
    options = {"resize": mode, "image_size": 64, "buckets": {"step": 16}}
    assert status_of(encoded(scene(0, (63, 200))), **options) == ("too_small" if mode == "center_crop" else "ok")
    assert status_of(encoded(scene(0, (40, 40))), **options) == "too_small"


def test_border_lays_the_whole_picture_on_white() -> None:
    wide = make(encoded(Image.new("RGB", (100, 50), (9, 99, 199))), resize="border")
    assert (wide[:8] == 255).all()
    assert (wide[8:24] == (9, 99, 199)).all()
    assert (wide[24:] == 255).all()
    # Too small, it keeps its size.
    small = make(encoded(Image.new("RGB", (10, 4), "black")), resize="border")
    assert (small == 0).all(axis=2).sum() == 40


def test_buckets_are_as_large_as_they_may_be() -> None:
    sizes = bucket_sizes(512, 64, 2.0)
    assert (512, 512) in sizes
    assert {(w, h) for h, w in sizes} == set(sizes)
    for w, h in sizes:
        assert w % 64 == h % 64 == 0
        assert max(w, h) <= 2 * min(w, h)
        assert 0.85 * 512**2 < w * h <= 512**2
    assert nearest_bucket(4000, 3000, sizes) == (576, 448)
    assert nearest_bucket(3000, 4000, sizes) == (448, 576)


@pytest.mark.parametrize("mode", ["center_crop", "keep_ratio", "border", "buckets"])
@pytest.mark.parametrize("size", [(10_000, 1), (1, 10_000)])
def test_extreme_shapes_do_not_explode(mode: str, size: tuple[int, int]) -> None:
    options = {"resize": mode, "image_size": 256, "upscale": True}
    assert status_of(encoded(Image.new("L", size)), **options) == ("too_large" if mode == "keep_ratio" else "ok")
    options = {"resize": mode, "image_size": 256}
    expected = "ok" if mode in ("keep_ratio", "border") else "too_small"
    assert status_of(encoded(Image.new("L", size)), **options) == expected


def test_the_centre_is_kept_of_a_very_long_picture() -> None:
    image = Image.new("RGB", (4000, 40), "white")
    image.paste("red", (1990, 0, 2010, 40))
    pixels = make(encoded(image), resize="center_crop")
    red = (pixels[..., 1] < 128).all(axis=0)
    assert red.tolist() == [False] * 8 + [True] * 16 + [False] * 8


def test_turning_agrees_with_pillow() -> None:
    image = scene(3, (12, 7))
    for turn in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = turn
        upright = Image.open(io.BytesIO(encoded(image, exif=exif)))
        assert (turned(np.array(image), turn) == np.asarray(ImageOps.exif_transpose(upright))).all(), turn


@pytest.mark.parametrize("reduction", [1.05, 1.3, 1.7, 2.0, 2.6, 3.4, 7.0, 19.0])
def test_reducing_comes_close_to_lanczos(reduction: float) -> None:
    image = scene(1, (800, 600))
    size = (round(800 / reduction), round(600 / reduction))
    expected = np.asarray(image.resize(size, Image.Resampling.LANCZOS))
    assert psnr(scale_to(np.array(image), size), expected) > 38


def test_what_a_smaller_picture_cannot_hold_does_not_come_back_as_a_pattern() -> None:
    # Stripes at nearly the highest frequency of 512 pixels; at 300 they must be nearly grey.
    stripes = np.where(np.sin(np.arange(512) * np.pi * 0.93) > 0, 255, 0).astype(np.uint8)
    pixels = np.repeat(np.tile(stripes, (512, 1))[..., None], 3, axis=2)
    plain = cv2.resize(pixels, (300, 300), interpolation=cv2.INTER_CUBIC)
    assert scale_to(pixels, (300, 300)).std() < 0.6 * plain.std()


def _photographs(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(folder.rglob("*.jpg"))[:60]]


def _megapixel(data: bytes) -> bytes:
    image = Image.open(io.BytesIO(data)).convert("RGB")
    return encoded(image.resize((1152, 864), Image.Resampling.LANCZOS), "JPEG", quality=88)


@pytest.mark.shared
@pytest.mark.parametrize(
    ("folder", "image_size", "megapixel"),
    [
        ("coco_cc", 256, False),
        ("pixabay_cc0", 256, False),
        ("pixabay_cc0", 256, True),
        ("pixabay_cc0", 128, False),
    ],
)
def test_scaled_decoding_is_close_to_full_decoding(
    shared_data: Path, folder: str, image_size: int, megapixel: bool
) -> None:
    options = {"resize": "keep_ratio", "image_size": image_size}
    figures: dict[str, list[float]] = {"smallest": [], "next": []}
    for data in _photographs(shared_data / folder)[:: 3 if megapixel else 1]:
        data = _megapixel(data) if megapixel else data
        full = make(data, jpeg_scale="full", **options)
        for scale, values in figures.items():
            values.append(psnr(make(data, jpeg_scale=scale, **options), full))
    assert np.median(figures["smallest"]) >= 40
    assert np.percentile(figures["smallest"], 5) >= 35
    assert np.median(figures["next"]) >= 50
