"""The detector reads rendered pictures back, sharp or degraded, and refuses what shows no single shape."""

import io
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from jobs.demo.scenes import Scene, all_scenes, render
from pipelines.stages.evaluate.shapes.detector import alignment, detect
from pipelines.stages.evaluate.shapes.outlines import PALETTE, SHAPES, outline

SIDE = 64
Pixels = NDArray[np.uint8]


def picture(scene: Scene, seed: int, side: int = SIDE) -> Pixels:
    return np.asarray(render(scene, seed).resize((side, side), Image.Resampling.LANCZOS))


def clipped(values: NDArray[np.float64]) -> Pixels:
    return np.clip(values, 0, 255).astype(np.uint8)


def sharp(pixels: Pixels) -> Pixels:
    return pixels


def blurred(pixels: Pixels) -> Pixels:
    return clipped(ndimage.gaussian_filter(pixels.astype(np.float64), (1, 1, 0)))


def noisy(pixels: Pixels) -> Pixels:
    return clipped(pixels + np.random.default_rng(0).normal(0, 12, pixels.shape))


def through_a_lossy_codec(pixels: Pixels) -> Pixels:
    """Halve the resolution and back, add blotches of 8 pixels, and encode as a JPEG of low quality."""
    image = Image.fromarray(pixels)
    image = image.resize((SIDE // 2, SIDE // 2), Image.Resampling.BOX).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    blotches = ndimage.zoom(np.random.default_rng(0).normal(0, 10, (8, 8, 3)), (SIDE / 8, SIDE / 8, 1), order=1)
    buffer = io.BytesIO()
    Image.fromarray(clipped(np.asarray(image) + blotches)).save(buffer, "JPEG", quality=40)
    return np.asarray(Image.open(buffer))


@pytest.mark.parametrize("degrade", [sharp, blurred, noisy, through_a_lossy_codec])
def test_at_least_99_percent_of_rendered_pictures_are_read_right(degrade: Callable[[Pixels], Pixels]) -> None:
    scenes = all_scenes() if degrade is sharp else all_scenes()[::2]
    pictures = [degrade(picture(scene, seed=5000 + i)) for i, scene in enumerate(scenes)]
    report = alignment(pictures, [scene.as_dict() for scene in scenes])
    assert report.samples == len(scenes)
    assert report.accuracy >= 0.99, report.confusion
    assert report.attributes["size"] >= 0.99
    assert report.attributes["position"] >= 0.99


@pytest.mark.parametrize("side", [48, 96, 128])
def test_pictures_of_other_sizes_are_read_too(side: int) -> None:
    scenes = all_scenes()[::9]
    report = alignment([picture(s, i, side) for i, s in enumerate(scenes)], [s.as_dict() for s in scenes])
    assert report.accuracy == 1.0


def test_a_picture_of_something_else_counts_as_wrong() -> None:
    asked = {"colour": "red", "shape": "circle"}
    drawn = Scene("red", "square", "large", "center")
    report = alignment([picture(drawn, 1), picture(Scene("red", "circle", "large", "left"), 2)], [asked, asked])
    assert report.accuracy == 0.5
    assert [item.right for item in report.items] == [False, True]
    assert report.attributes == {"colour": 1.0, "shape": 0.5}
    assert report.confusion["shape"] == {"circle": {"square": 1, "circle": 1}}


def test_pictures_without_one_clear_shape_are_not_recognised() -> None:
    blank = np.full((SIDE, SIDE, 3), 240, np.uint8)
    static = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    two = np.minimum(
        picture(Scene("red", "circle", "small", "left"), 1), picture(Scene("blue", "circle", "small", "right"), 1)
    )
    stripe = blank.copy()
    stripe[28:34] = (220, 35, 40)
    for pixels in (blank, static, two, stripe):
        detection = detect(pixels)
        assert (detection.colour, detection.shape) == (None, None)
    report = alignment([blank], [{"colour": "red", "shape": "star"}])
    assert report.confusion["colour"] == {"red": {"none": 1}}


def test_a_speck_beside_the_object_does_not_hide_it() -> None:
    pixels = picture(Scene("green", "star", "large", "left"), 3).copy()
    pixels[50:53, 58:61] = (30, 30, 30)
    detection = detect(pixels)
    assert (detection.colour, detection.shape, detection.position) == ("green", "star", "left")


def test_palette_and_shapes_cover_the_demo() -> None:
    assert len(PALETTE) == 8
    assert len(SHAPES) == 6
    for shape in SHAPES:
        assert np.abs(outline(shape).mean(axis=0)).max() < 1e-9


def test_wrong_input_is_refused_with_what_was_received() -> None:
    with pytest.raises(ValueError, match=r"\(H, W, 3\) uint8; got \(8, 8\) float64"):
        detect(np.zeros((8, 8)))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least one; got 0 and 0"):
        alignment([], [])
    with pytest.raises(ValueError, match=r"shape must be one of circle, .*; got 'blob'"):
        outline("blob")
