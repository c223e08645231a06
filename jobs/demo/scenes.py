"""Scenes of one coloured shape on a light background, and the choice of those that training never sees.

They are drawn in the vocabulary of the detector that is to read them back from generated pictures (`evaluate.detector`
of the demo's recipe): its tables of colours, shapes, sizes and positions are imported, so that the two cannot disagree.
"""

import itertools
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipelines.stages.evaluate.shapes.outlines import PALETTE, POSITIONS, SHAPES, SIZES, draw_matte, outline

# Distance from the center as a fraction of the picture's side: small shapes have more room.
OFFSETS = {"small": 0.25, "large": 0.18}
MARGIN = 0.02
NOVEL_PAIRS = 4
HELD_OUT_OF_SEEN_PAIRS = 96


@dataclass(frozen=True, order=True)
class Scene:
    """The content of a picture: one of 8 colours, 6 shapes, 2 sizes and 5 positions."""

    colour: str
    shape: str
    size: str
    position: str

    def as_dict(self) -> dict[str, str]:
        return asdict(self)


@dataclass(frozen=True)
class HeldOut:
    """A scene that training never sees. `novel_pair`: its colour and shape never meet in training."""

    scene: Scene
    novel_pair: bool


def all_scenes() -> list[Scene]:
    """Return the 480 combinations in a fixed order."""
    return [Scene(*values) for values in itertools.product(PALETTE, SHAPES, SIZES, POSITIONS)]


def held_out_combinations(seed: int) -> list[HeldOut]:
    """Return the 136 scenes that are kept for evaluation, well mixed.

    40 belong to 4 novel (colour, shape) pairs, with 4 different colours and shapes; the other 96 are spread
    evenly over the 44 remaining pairs and over the 10 (size, position) combinations, so that training meets
    each of these many times.
    """
    random = np.random.default_rng([seed, 1])
    colours = random.permutation(list(PALETTE)).tolist()
    shapes = random.permutation(list(SHAPES)).tolist()
    novel = list(zip(colours, shapes, strict=False))[:NOVEL_PAIRS]
    seen = [pair for pair in itertools.product(PALETTE, SHAPES) if pair not in novel]
    layouts = list(itertools.product(SIZES, POSITIONS))

    held_out = [HeldOut(Scene(*pair, *layout), novel_pair=True) for pair in novel for layout in layouts]
    pair_order, layout_order = random.permutation(len(seen)), random.permutation(len(layouts))
    for index in range(HELD_OUT_OF_SEEN_PAIRS):
        pair, layout = seen[pair_order[index % len(seen)]], layouts[layout_order[index % len(layouts)]]
        held_out.append(HeldOut(Scene(*pair, *layout), novel_pair=False))
    return [held_out[i] for i in random.permutation(len(held_out))]


def training_scenes(seed: int, count: int) -> list[Scene]:
    """Return `count` scenes for training: all that are not held out, equally often (give or take one)."""
    excluded = {item.scene for item in held_out_combinations(seed)}
    allowed = [scene for scene in all_scenes() if scene not in excluded]
    random = np.random.default_rng([seed, 2])
    rounds = [random.permutation(len(allowed)) for _ in range(-(-count // len(allowed)))]
    return [allowed[i] for i in itertools.islice(itertools.chain.from_iterable(rounds), count)]


def render(scene: Scene, seed: int, side: int = 128) -> Image.Image:
    """Draw a scene as an RGB picture of side x side pixels; the same arguments give the same pixels.

    The seed decides the background's tint, gradient and faint grain, and nudges colour, size and position.
    """
    random = np.random.default_rng(seed)
    matte = np.asarray(_matte(scene, random, side), np.float32)[..., None] / 255
    colour = np.clip(np.array(PALETTE[scene.colour]) + random.uniform(-8, 8, 3), 0, 255)
    pixels = _background(random, side) * (1 - matte) + colour * matte
    return Image.fromarray(np.clip(pixels + 0.5, 0, 255).astype(np.uint8))


def render_cutout(scene: Scene, seed: int, side: int = 128) -> Image.Image:
    """Draw the same scene without its background: RGBA, transparent around the shape."""
    random = np.random.default_rng(seed)
    cutout = Image.new("RGBA", (side, side), PALETTE[scene.colour])
    cutout.putalpha(_matte(scene, random, side))
    return cutout


def _matte(scene: Scene, random: np.random.Generator, side: int) -> Image.Image:
    diameter = SIZES[scene.size] * random.uniform(0.95, 1.05)
    center = 0.5 + OFFSETS[scene.size] * np.array(POSITIONS[scene.position]) + random.uniform(-0.02, 0.02, 2)
    # A large triangle at the top would stick out: it is moved in, never cut.
    extent = outline(scene.shape) * diameter
    center = np.clip(center, MARGIN - extent.min(axis=0), 1 - MARGIN - extent.max(axis=0))
    x, y = center * side
    return draw_matte(scene.shape, diameter=diameter * side, center=(x, y), height=side, width=side)


def _background(random: np.random.Generator, side: int) -> NDArray[np.float32]:
    tint = random.uniform(238, 250, 3)
    slope = random.uniform(-5, 5, 2)
    ramp = np.linspace(-0.5, 0.5, side)
    gradient = slope[0] * ramp[:, None] + slope[1] * ramp[None, :]
    grain = random.normal(0, random.uniform(0, 1), (side, side))
    return (tint + (gradient + grain)[..., None]).astype(np.float32)
