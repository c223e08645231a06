"""The detector's vocabulary, its colours, shapes, sizes and positions, and how each shape is drawn.

These tables are the detector's: its thresholds were chosen for them. Who wants pictures that it can read, such as the
demo, draws them from these tables.
"""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

# Hues are at least 20 degrees apart: a colour that a lossy autoencoder has washed out still has one nearest name.
PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (220, 35, 40),
    "orange": (250, 135, 20),
    "yellow": (240, 215, 25),
    "green": (40, 160, 60),
    "cyan": (30, 195, 215),
    "blue": (40, 75, 215),
    "purple": (125, 40, 175),
    "pink": (250, 130, 190),
}
SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "star", "cross", "ring")
SIZES: dict[str, float] = {"small": 0.4, "large": 0.6}
"""Nominal diameter as a fraction of the picture's shorter side."""
POSITIONS: dict[str, tuple[float, float]] = {
    "left": (-1.0, 0.0),
    "right": (1.0, 0.0),
    "top": (0.0, -1.0),
    "bottom": (0.0, 1.0),
    "center": (0.0, 0.0),
}
"""Direction of the object's centroid from the center of the picture, x to the right and y downwards."""

RING_HOLE = 0.48
SUPERSAMPLING = 4


def outline(shape: str) -> NDArray[np.float64]:
    """Return the vertices (N, 2) of a shape of nominal diameter 1 with its centroid at the origin, y downwards.

    The radii differ so that all shapes look equally large. The outline of a ring is its outer edge.

    Raises:
        ValueError: the shape is not one of SHAPES.
    """
    if shape in ("circle", "ring"):
        return _polygon(np.full(96, 0.5))
    if shape == "square":
        return _polygon(np.full(4, 0.62), turn=np.pi / 4)
    if shape == "triangle":
        return _polygon(np.full(3, 0.62))
    if shape == "star":
        return _polygon(np.tile([0.64, 0.27], 5))
    if shape == "cross":
        arm, half = 0.52, 0.165
        quarter = np.array([(half, -arm), (half, -half), (arm, -half)])
        turns = [np.array([[c, -s], [s, c]]) for c, s in ((1, 0), (0, 1), (-1, 0), (0, -1))]
        return np.concatenate([quarter @ turn.T for turn in turns])
    raise ValueError(f"shape must be one of {', '.join(SHAPES)}; got {shape!r}")


def _polygon(radii: NDArray[np.float64], turn: float = 0.0) -> NDArray[np.float64]:
    angles = turn + np.arange(len(radii)) * 2 * np.pi / len(radii)
    return np.stack([radii * np.sin(angles), -radii * np.cos(angles)], axis=1)


def draw_matte(shape: str, *, diameter: float, center: tuple[float, float], height: int, width: int) -> Image.Image:
    """Draw a shape, antialiased: an "L" picture of width x height pixels, 255 in pixels that the shape covers.

    Args:
        shape: one of SHAPES.
        diameter: nominal diameter in pixels.
        center: (x, y) of the centroid in pixels.
        height: height of the picture in pixels.
        width: width of the picture in pixels.
    """
    canvas = Image.new("L", (width * SUPERSAMPLING, height * SUPERSAMPLING))
    draw = ImageDraw.Draw(canvas)
    vertices, middle = outline(shape) * diameter, np.asarray(center)
    # Pillow's coordinates count from the centers of pixels, hence the half pixel.
    draw.polygon([tuple(v) for v in (vertices + middle) * SUPERSAMPLING - 0.5], fill=255)
    if shape == "ring":
        draw.polygon([tuple(v) for v in (vertices * RING_HOLE + middle) * SUPERSAMPLING - 0.5], fill=0)
    return canvas.resize((width, height), Image.Resampling.BOX)


@lru_cache
def area_of(shape: str) -> float:
    """Return the area of a shape of nominal diameter 1, by the shoelace formula."""
    x, y = outline(shape).T
    size = float(abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2)
    return size * (1 - RING_HOLE**2) if shape == "ring" else size
