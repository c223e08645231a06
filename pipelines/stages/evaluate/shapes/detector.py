"""Read colour, shape, position and size of one object from the pixels of a picture, without any learned part.

The outlines serve as templates. A picture is right only if its colour and its shape both are.

    image: (H, W, 3) uint8 RGB, one object on a light background
    matte: (H, W) float in [0, 1], how much of a pixel the object covers
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from pipelines.stages.evaluate.shapes.outlines import PALETTE, POSITIONS, SHAPES, SIZES, area_of, draw_matte

MIN_CONTRAST = 30.0
MIN_AREA_FRACTION = 0.01
MIN_CONFIDENCE = 0.65
CENTER_RADIUS = 0.08
TEMPLATE_BLUR = 1.2

Image8 = NDArray[np.uint8]


@dataclass(frozen=True)
class Detection:
    """The result of `detect`. Colour, shape, position and size are None if it recognised nothing.

    Attributes:
        confidence: overlap of the object with the best template (intersection over union, 0 to 1), times the share of
            the foreground that belongs to the object.
    """

    colour: str | None
    shape: str | None
    position: str | None
    size: str | None
    confidence: float


NOTHING = Detection(colour=None, shape=None, position=None, size=None, confidence=0.0)


@dataclass(frozen=True)
class AlignmentItem:
    """One picture: what was asked for, what was seen, and whether colour and shape both agree."""

    expected: dict[str, Any]
    detection: Detection
    right: bool


@dataclass(frozen=True)
class AlignmentReport:
    """Shares of pictures that show what was asked for.

    Attributes:
        accuracy: share of pictures with the right colour and the right shape, 0 to 1.
        samples: number of pictures.
        attributes: for each of colour, shape, position and size, the share that is right.
        items: one per picture, in order.
        confusion: for colour and shape, `{expected: {seen: count}}`, with "none" for pictures that were not recognised.
    """

    accuracy: float
    samples: int
    attributes: dict[str, float]
    items: tuple[AlignmentItem, ...]
    confusion: dict[str, dict[str, dict[str, int]]]


def detect(image: Image8) -> Detection:
    """Read the colour, shape, position and size of the one object in a picture, from its pixels alone.

    Args:
        image: (H, W, 3) uint8 RGB with a light background; about 32 pixels per side is the least that works.

    Raises:
        ValueError: the image is not (H, W, 3) uint8.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"image must be (H, W, 3) uint8; got {image.shape} {image.dtype}; convert it to 8-bit RGB")
    contrast = image.astype(np.float64) - _background(image)
    found = _largest_component(contrast)
    if found is None:
        return NOTHING
    component, share = found
    # The outer third of a small shape is mixed with the background: its colour is read where it is strongest.
    strength = np.linalg.norm(contrast, axis=2)
    core = component & (strength >= np.quantile(strength[component], 0.5))
    matte = _matte(contrast, component, np.median(contrast[core], axis=0))
    total = matte.sum()
    y, x = (float((matte * grid).sum() / total) + 0.5 for grid in np.indices(matte.shape))
    shape, overlap, diameter = _best_template(matte, center=(x, y), area=float(total))
    confidence = round(overlap * share, 4)
    if confidence < MIN_CONFIDENCE:
        return Detection(colour=None, shape=None, position=None, size=None, confidence=confidence)
    height, width = matte.shape
    return Detection(
        colour=_nearest_colour(np.median(image[core], axis=0)),
        shape=shape,
        position=_position(x / width - 0.5, y / height - 0.5),
        size=min(SIZES, key=lambda name: abs(SIZES[name] - diameter / min(height, width))),
        confidence=confidence,
    )


def _background(image: Image8) -> NDArray[np.float64]:
    """Return the background as a plane per channel, fitted to the border without what an object covers of it."""
    height, width, _ = image.shape
    rows, columns = np.indices((height, width))
    planes = np.stack([np.ones((height, width)), rows / height, columns / width], axis=2)
    edge = max(2, min(height, width) // 24)
    border = np.ones((height, width), bool)
    border[edge:-edge, edge:-edge] = False
    x, y = planes[border], image[border].astype(np.float64)
    keep = np.linalg.norm(y - np.median(y, axis=0), axis=1) < MIN_CONTRAST * 1.5
    for _ in range(2):
        fit = np.linalg.lstsq(x[keep], y[keep], rcond=None)[0]
        keep = np.linalg.norm(y - x @ fit, axis=1) < MIN_CONTRAST * 1.5
    return np.asarray(planes @ fit)


def _largest_component(contrast: NDArray[np.float64]) -> tuple[NDArray[np.bool_], float] | None:
    """Return a mask of the largest region that differs from the background, and its share of all such regions."""
    smooth = np.linalg.norm(ndimage.gaussian_filter(contrast, (0.7, 0.7, 0)), axis=2)
    # The smallest shape covers more than 4 % of a picture, so this quantile lies inside it.
    peak = float(np.quantile(smooth, 0.975))
    if peak < MIN_CONTRAST:
        return None
    labels, count = ndimage.label(smooth > 0.5 * peak)
    areas = np.bincount(labels.ravel(), minlength=count + 1)[1:]
    if not count or areas.max() < MIN_AREA_FRACTION * labels.size:
        return None
    return labels == 1 + int(areas.argmax()), float(areas.max() / areas.sum())


def _matte(
    contrast: NDArray[np.float64], component: NDArray[np.bool_], object_contrast: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return how far each pixel's colour is between the background's (0) and the object's (1); 0 away from it."""
    alpha = contrast @ object_contrast / float(object_contrast @ object_contrast)
    near = ndimage.binary_dilation(component, iterations=max(1, component.shape[0] // 48))
    return np.where(near, np.clip(alpha, 0, 1), 0.0)


def _best_template(matte: NDArray[np.float64], *, center: tuple[float, float], area: float) -> tuple[str, float, float]:
    """Return the shape whose template of equal area and centroid overlaps most: (shape, soft overlap, diameter)."""
    best = ("", -1.0, 0.0)
    height, width = matte.shape
    for shape in SHAPES:
        diameter = float(np.sqrt(area / area_of(shape)))
        for scale in (0.94, 1.0, 1.06):
            drawn = draw_matte(shape, diameter=diameter * scale, center=center, height=height, width=width)
            sharp = np.asarray(drawn, np.float64) / 255
            # An autoencoder makes a small star soft: compared with crisp templates, it would be nearest to a circle.
            for template in (sharp, ndimage.gaussian_filter(sharp, TEMPLATE_BLUR)):
                overlap = float(np.minimum(matte, template).sum() / np.maximum(matte, template).sum())
                if overlap > best[1]:
                    best = (shape, overlap, diameter)
    return best


def _nearest_colour(rgb: NDArray[np.float64]) -> str:
    # Lightness counts for less than hue and chroma: generated pictures drift in brightness first.
    weights = np.array([0.5, 1.0, 1.0])
    seen = _lab(rgb)
    return min(PALETTE, key=lambda name: float(np.linalg.norm(weights * (seen - _lab(np.array(PALETTE[name]))))))


def _lab(rgb: NDArray[Any]) -> NDArray[np.float64]:
    """Convert an 8-bit sRGB colour to CIE L*a*b* with white point D65 (IEC 61966-2-1, CIE 15)."""
    value = rgb / 255
    linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = to_xyz @ linear / np.array([0.9505, 1.0, 1.0890])
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def _position(dx: float, dy: float) -> str:
    if max(abs(dx), abs(dy)) < CENTER_RADIUS:
        return "center"
    return max(POSITIONS, key=lambda name: POSITIONS[name][0] * dx + POSITIONS[name][1] * dy)


def alignment(images: Sequence[Image8], expected: Sequence[Mapping[str, Any]]) -> AlignmentReport:
    """Report how often pictures show what was asked for, as the detector sees it.

    Args:
        images: pictures, (H, W, 3) uint8 RGB each.
        expected: a row for each picture, with at least "colour" and "shape", and with "position" and "size" if they
            were asked for; rows of the demo's `prompts.jsonl` as they are.

    Raises:
        ValueError: there is no picture, or not one row per picture.
    """
    if len(images) != len(expected) or not len(images):
        raise ValueError(f"alignment needs one row per picture, at least one; got {len(images)} and {len(expected)}")
    items = []
    for image, row in zip(images, expected, strict=True):
        seen = detect(image)
        right = seen.colour == row["colour"] and seen.shape == row["shape"]
        items.append(AlignmentItem(expected=dict(row), detection=seen, right=right))
    return AlignmentReport(
        accuracy=sum(item.right for item in items) / len(items),
        samples=len(items),
        attributes={
            name: _share_right(items, name) for name in ("colour", "shape", "position", "size") if name in expected[0]
        },
        items=tuple(items),
        confusion={name: _confusion(items, name) for name in ("colour", "shape")},
    )


def _share_right(items: Iterable[AlignmentItem], name: str) -> float:
    return float(np.mean([getattr(item.detection, name) == item.expected[name] for item in items]))


def _confusion(items: Iterable[AlignmentItem], name: str) -> dict[str, dict[str, int]]:
    table: dict[str, dict[str, int]] = {}
    for item in items:
        row = table.setdefault(item.expected[name], {})
        seen = getattr(item.detection, name) or "none"
        row[seen] = row.get(seen, 0) + 1
    return table
