"""Hashes of one picture's versions are near, those of different pictures far; flat pictures have none."""

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from tests.pipelines.stages.pairs.picture_files import encoded, made, scene, status_of


def phash(image: Image.Image, kind: str = "BMP", **options: object) -> int:
    value = made(encoded(image, kind, **options), image_size=64, near_duplicates=4, upscale=True).phash
    assert value is not None
    assert -(2**63) <= value < 2**63
    return value


def distance(a: int, b: int) -> int:
    return ((a ^ b) & (2**64 - 1)).bit_count()


def versions(image: Image.Image) -> list[int]:
    smaller = image.resize((image.width * 3 // 4, image.height * 3 // 4), Image.Resampling.LANCZOS)
    return [
        phash(image, "JPEG", quality=60),
        phash(image, "WEBP", quality=60),
        phash(smaller),
        phash(ImageEnhance.Brightness(image).enhance(1.05)),
        phash(ImageEnhance.Contrast(image).enhance(0.9)),
        phash(ImageEnhance.Color(image).enhance(0.8)),
    ]


def test_versions_are_near_and_others_far() -> None:
    scenes = [scene(seed) for seed in range(8)]
    for image in scenes:
        assert max(distance(phash(image), other) for other in versions(image)) <= 4
    assert min(distance(a, b) for a, b in combinations(map(phash, scenes), 2)) > 12


@pytest.mark.shared
def test_photographs_are_told_apart(shared_data: Path) -> None:
    images = [Image.open(path).convert("RGB") for path in sorted((shared_data / "pixabay_cc0").rglob("*.jpg"))[:40]]
    far = [distance(a, b) for a, b in combinations(map(phash, images), 2)]
    near = [distance(phash(image), other) for image in images[:10] for other in versions(image)]
    assert np.percentile(far, 1) > 12
    assert np.percentile(near, 95) <= 4


def test_nearly_flat_pictures_have_no_hash() -> None:
    for image in (Image.new("RGB", (80, 80), "white"), Image.new("RGB", (80, 80), (10, 11, 12))):
        assert made(encoded(image), near_duplicates=4).phash is None
    assert made(encoded(scene(0))).phash is None


def test_filters_see_the_size_upright_and_the_content() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    lying = encoded(scene(0, (80, 60)), "JPEG", exif=exif)
    for name, value in {"width": 60, "height": 80, "size": 60, "aspect": 80 / 60}.items():
        assert status_of(lying, filters={name: {"min": value, "max": value}}) == "ok"
        assert status_of(lying, filters={name: {"min": value + 1}}) == f"filtered:{name}"
    flat, busy = encoded(Image.new("RGB", (80, 80))), encoded(scene(0))
    assert status_of(flat, filters={"entropy": {"min": 3}}) == "filtered:entropy"
    assert status_of(flat, filters={"sharpness": {"min": 1}}) == "filtered:sharpness"
    picture = made(busy, filters={"entropy": {"min": 3}, "sharpness": {"min": 1}})
    assert picture.entropy is not None
    assert picture.sharpness is not None
    assert 3 < picture.entropy <= 8
    assert made(busy).entropy is None


def test_size_filters_come_before_the_pixels() -> None:
    broken = encoded(scene(0), "JPEG")[:2000]
    assert status_of(broken, filters={"width": {"min": 1000}}) == "filtered:width"
