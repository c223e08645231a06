"""Captions of a scene, in several turns of phrase; some are not plain ASCII."""

import numpy as np

from jobs.demo.scenes import Scene

PLACES = {
    "left": "on the left",
    "right": "on the right",
    "top": "at the top",
    "bottom": "at the bottom",
    "center": "in the center",
}
# All have the same words to be learned; their order and what stands between them differ.
TEMPLATES = (
    "a {size} {colour} {shape} {place}",
    "{colour} {shape}, {position}, {size}",
    "there is a {size} {colour} {shape} {place}",
    "{size} {colour} {shape} {place} of the picture",
    "{place}, a {size} {colour} {shape}",
    "a {shape} that is {colour} and {size}, {place}",
    "a picture of a {size} {colour} {shape} {place}",
    "one {colour} {shape}, {size}, {place}",
)
FLOURISHES = (
    "{caption} ✨",
    "café-style: {caption}",
    "写真: {caption}",
    "{caption} — naïve art",
    "{caption} 🎨 (größe egal)",
)
FLOURISH_SHARE = 0.04


def caption(scene: Scene, seed: int) -> str:
    """Return a caption; the seed chooses the turn of phrase, and for a few a non-ASCII flourish."""
    random = np.random.default_rng([seed, 3])
    text = _fill(TEMPLATES[random.integers(len(TEMPLATES))], scene)
    if random.random() < FLOURISH_SHARE:
        text = FLOURISHES[random.integers(len(FLOURISHES))].format(caption=text)
    return text


def prompt(scene: Scene) -> str:
    """Return the plainest caption of a scene, as the trained model is asked for it."""
    return _fill(TEMPLATES[0], scene)


def _fill(template: str, scene: Scene) -> str:
    return template.format(**scene.as_dict(), place=PLACES[scene.position])
