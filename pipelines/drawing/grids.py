"""Grids of pictures, with or without captions: previews, contact sheets and samples for people to look at.

A picture is a (H, W, 3) uint8 array, RGB.
"""

import importlib.util
import io
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, ImageOps

from pipelines.drawing.printable import printable

Image8 = NDArray[np.uint8]

GAP = 4
CAPTION_LINES = 3
MAX_CAPTION_CHARACTERS = 400  # more never fit, and measuring a web page's worth of text takes long
MIN_FONT_PIXELS = 10
MAX_FONT_PIXELS = 18
LINE_HEIGHT = 1.25
PAPER, INK, MOUNT = (255, 255, 255), (40, 40, 40), (238, 238, 238)


def grid(
    images: Image8,
    columns: int,
    captions: Sequence[str] | None = None,
    *,
    scale: int = 1,
    font_pixels: int | None = None,
    caption_lines: int = CAPTION_LINES,
) -> Image8:
    """Lay pictures out row by row on white paper, each with its caption underneath.

    Args:
        images: (N, H, W, 3) uint8 RGB, N >= 1.
        columns: pictures per row; fewer pictures than that make a narrower grid.
        captions: one per picture. They may hold anything: control characters are made visible, and characters that
            DejaVu Sans lacks are shown as boxes.
        scale: factor by which small pictures are enlarged; each pixel becomes a square of scale x scale.
        font_pixels: font size of the captions; None for one that suits the pictures.
        caption_lines: lines to which a caption is wrapped; a longer one ends in an ellipsis.

    Returns:
        (height, width, 3) uint8. The same arguments give the same bytes.

    Raises:
        ValueError: images of another shape or dtype, no picture at all, or another number of captions.
    """
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or not len(images):
        raise ValueError(f"images must be (N, H, W, 3) uint8 with N >= 1; got {images.shape} {images.dtype}")
    if columns < 1 or scale < 1:
        raise ValueError(f"columns and scale must be at least 1; got columns={columns}, scale={scale}")
    if captions is not None and len(captions) != len(images):
        raise ValueError(f"captions must be one per picture ({len(images)}); got {len(captions)}")
    count, height, width = len(images), images.shape[1] * scale, images.shape[2] * scale
    columns = min(columns, count)
    font_pixels = font_pixels or min(max(width // 8, MIN_FONT_PIXELS), MAX_FONT_PIXELS)
    line_pixels = int(font_pixels * LINE_HEIGHT)
    lines = [_wrap(caption, width, font_pixels, caption_lines) for caption in captions or [""] * count]
    rows = [range(start, min(start + columns, count)) for start in range(0, count, columns)]
    heights = [height + GAP + line_pixels * max(len(lines[index]) for index in row) for row in rows]
    canvas = Image.new("RGB", (columns * (width + GAP) + GAP, sum(heights) + GAP), PAPER)
    draw = ImageDraw.Draw(canvas)
    y = GAP
    for row, row_height in zip(rows, heights):
        for column, index in enumerate(row):
            x = GAP + column * (width + GAP)
            picture = Image.fromarray(images[index]).resize((width, height), Image.Resampling.NEAREST)
            canvas.paste(picture, (x, y))
            for number, line in enumerate(lines[index]):
                place = (x + width / 2, y + height + number * line_pixels)
                draw.text(place, line, fill=INK, font=_font(font_pixels), anchor="ma")
        y += row_height
    return np.asarray(canvas)


def mounted(image: Image.Image, side: int) -> Image8:
    """Draw an RGB picture as large as a square cell allows, (side, side, 3) uint8; on grey if it has another shape."""
    fitted = ImageOps.contain(image, (side, side), Image.Resampling.BICUBIC)
    cell = Image.new("RGB", (side, side), MOUNT)
    cell.paste(fitted, ((side - fitted.width) // 2, (side - fitted.height) // 2))
    return np.asarray(cell)


def stacked(images: Sequence[Image8]) -> Image8:
    """Return pictures one below the other on white paper, as wide as the widest."""
    width = max(image.shape[1] for image in images)
    padded = [np.pad(each, ((0, 0), (0, width - each.shape[1]), (0, 0)), constant_values=255) for each in images]
    return np.concatenate(padded)


def encode_png(image: Image8) -> bytes:
    """Encode a (H, W, 3) uint8 picture as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", optimize=False, compress_level=6)
    return buffer.getvalue()


def _wrap(caption: str, width: int, font_pixels: int, most: int) -> list[str]:
    """Break a caption into at most `most` lines no wider than `width` pixels; a word that is too wide is cut."""
    font = _font(font_pixels)
    lines: list[str] = []
    for word in printable(caption[:MAX_CAPTION_CHARACTERS]).split():
        joined = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(joined) <= width:
            lines[-1] = joined
        elif len(lines) == most:
            lines[-1] = f"{lines[-1]}…"
            break
        else:
            lines.append(word)
    return [_cut(line, width, font) for line in lines]


def _cut(line: str, width: int, font: ImageFont.FreeTypeFont) -> str:
    if font.getlength(line) <= width:
        return line
    line = line.removesuffix("…")
    while line and font.getlength(f"{line}…") > width:
        line = line[:-1]
    return f"{line}…"


@lru_cache
def _font(pixels: int) -> ImageFont.FreeTypeFont:
    # The font that comes with matplotlib: the same on every machine, while Pillow's own one knows no accents. Found
    # without importing matplotlib, which would cost each Ray worker half a second and a folder for its settings.
    package = importlib.util.find_spec("matplotlib")
    assert package is not None, "matplotlib is one of our dependencies"
    assert package.origin is not None
    return ImageFont.truetype(Path(package.origin).parent / "mpl-data/fonts/ttf/DejaVuSans.ttf", pixels)
