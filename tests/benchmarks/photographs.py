"""JPEGs of 1152 x 864 as the web has them: collages of real photographs, which keep the detail of their own size.

The photographs at hand are smaller than a megapixel; enlarged, they would lack the fine detail that decoding costs time
for. Four crops side by side have it.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np

WIDTH, HEIGHT = 1152, 864
QUALITIES = (80, 92)
# Shorter ones would have to be enlarged for a quarter of the picture by more than a third.
_SHORTEST_SIDE = 320
_SUFFIXES = {".jpg", ".jpeg", ".png"}

Draw = Callable[[np.random.Generator], np.ndarray]


def make_photographs(folder: Path, originals: Path | None, count: int) -> list[Path]:
    """Render photographs into `folder/NNNNN.jpg`, or take those that are there.

    Args:
        folder: a cache; filled whole or not at all.
        originals: photographs to make them from, in any folder below; None for pictures of noise with a photograph's
            spectrum.
        count: of distinct pictures.
    """
    if len(list(folder.glob("*.jpg"))) != count:
        draw = _crops_of(_load(originals)) if originals else _noise
        shutil.rmtree(folder, ignore_errors=True)
        unfinished = folder.with_name(f"{folder.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        for number in range(count):
            (unfinished / f"{number:05d}.jpg").write_bytes(render(np.random.default_rng(number), draw))
        unfinished.rename(folder)
    return sorted(folder.glob("*.jpg"))


def render(random: np.random.Generator, draw: Draw) -> bytes:
    """Render one JPEG (4:2:0, quality 80 to 92) of four drawings."""
    rows = [np.concatenate([_retouched(draw(random), random) for _ in range(2)], axis=1) for _ in range(2)]
    quality = int(random.integers(QUALITIES[0], QUALITIES[1] + 1))
    return bytes(cv2.imencode(".jpg", np.concatenate(rows), [cv2.IMWRITE_JPEG_QUALITY, quality])[1])


def _load(folder: Path) -> list[np.ndarray]:
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES)
    images = (cv2.imread(str(path), cv2.IMREAD_COLOR) for path in files if "hostile" not in path.parts)
    return [image for image in images if image is not None and min(image.shape[:2]) >= _SHORTEST_SIDE]


def _crops_of(images: list[np.ndarray]) -> Draw:
    """Return crops of 4:3 at random places, resized to a quarter of the picture."""
    if not images:
        raise SystemExit(f"no photograph with a shorter side of {_SHORTEST_SIDE} pixels or more in --photographs")

    def draw(random: np.random.Generator) -> np.ndarray:
        image = images[random.integers(len(images))]
        height, width = image.shape[:2]
        scale = min(width / 4, height / 3) * random.uniform(0.85, 1.0)
        w, h = int(4 * scale), int(3 * scale)
        left, top = random.integers(width - w + 1), random.integers(height - h + 1)
        crop = image[top : top + h, left : left + w]
        return cv2.resize(
            crop, (WIDTH // 2, HEIGHT // 2), interpolation=cv2.INTER_AREA if w > WIDTH // 2 else cv2.INTER_CUBIC
        )

    return draw


def _noise(random: np.random.Generator) -> np.ndarray:
    """Return noise whose amplitude falls with the frequency, as that of natural pictures does."""
    h, w = HEIGHT // 2, WIDTH // 2
    frequency = np.hypot(np.fft.fftfreq(h)[:, None], np.fft.rfftfreq(w)[None])
    frequency[0, 0] = 1.0
    spectrum = np.fft.rfft2(random.standard_normal((h, w, 3)), axes=(0, 1)) / frequency[..., None] ** 1.3
    waves = np.fft.irfft2(spectrum, (h, w), axes=(0, 1))
    return np.clip(128 + 48 * waves / waves.std(), 0, 255).astype(np.uint8)


def _retouched(image: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Return the picture, flipped or not, with a little more or less light and contrast."""
    flipped = image[:, ::-1] if random.random() < 0.5 else image
    return cv2.convertScaleAbs(flipped, alpha=random.uniform(0.85, 1.15), beta=random.uniform(-12, 12))
