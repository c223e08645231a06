"""Scenes and captions: the same from the same seed, and held out evenly."""

import itertools
from collections import Counter

import numpy as np
import pytest

from jobs.demo.captions import TEMPLATES, caption, prompt
from jobs.demo.scenes import Scene, all_scenes, held_out_combinations, render, render_cutout, training_scenes
from pipelines.stages.evaluate.shapes.outlines import PALETTE, POSITIONS, SHAPES, SIZES

SEED = 0


def test_a_scene_is_drawn_the_same_from_the_same_seed_and_differs_with_another() -> None:
    scene = Scene("red", "star", "large", "left")
    assert render(scene, 7).tobytes() == render(scene, 7).tobytes()
    assert render(scene, 7).tobytes() != render(scene, 8).tobytes()
    assert render(scene, 7, side=96).size == (96, 96)


def test_no_shape_is_cut_by_the_border() -> None:
    for i, scene in enumerate(all_scenes()):
        border = np.asarray(render_cutout(scene, i).getchannel("A"))
        assert not border[[0, -1]].any(), scene
        assert not border[:, [0, -1]].any(), scene


def test_backgrounds_are_light() -> None:
    for i, scene in enumerate(all_scenes()[::40]):
        corners = np.asarray(render(scene, i))[[0, 0, -1, -1], [0, -1, 0, -1]]
        assert corners.min() > 215


@pytest.mark.parametrize("seed", [0, 1])
def test_held_out_scenes_are_many_distinct_and_the_same_each_time(seed: int) -> None:
    held_out = held_out_combinations(seed)
    assert held_out == held_out_combinations(seed)
    assert len({item.scene for item in held_out}) == len(held_out) == 136
    assert sum(not item.novel_pair for item in held_out) == 96


def test_four_pairs_of_colour_and_shape_never_meet_in_training() -> None:
    novel = {(i.scene.colour, i.scene.shape) for i in held_out_combinations(SEED) if i.novel_pair}
    seen = {(scene.colour, scene.shape) for scene in training_scenes(SEED, 4000)}
    assert len(novel) == 4
    assert len({colour for colour, _ in novel}) == len({shape for _, shape in novel}) == 4
    assert novel | seen == set(itertools.product(PALETTE, SHAPES))
    assert not novel & seen


def test_training_never_sees_a_held_out_scene_and_all_others_equally_often() -> None:
    scenes = Counter(training_scenes(SEED, 4000))
    held_out = {item.scene for item in held_out_combinations(SEED)}
    assert not held_out & set(scenes)
    assert set(scenes) | held_out == set(all_scenes())
    assert set(scenes.values()) <= {4000 // 344, 4000 // 344 + 1}


@pytest.mark.parametrize(
    ("attribute", "values"), [("colour", PALETTE), ("shape", SHAPES), ("size", SIZES), ("position", POSITIONS)]
)
def test_every_word_stays_common_in_training(attribute: str, values: tuple[str, ...]) -> None:
    counts = Counter(getattr(scene, attribute) for scene in set(training_scenes(SEED, 4000)))
    share = [counts[value] / (344 / len(values)) for value in values]
    assert min(share) > 0.7
    assert max(share) < 1.3


def test_every_caption_says_all_four_things() -> None:
    for seed in range(400):
        scene = all_scenes()[seed]
        text = caption(scene, seed)
        assert text == caption(scene, seed)
        for word in (scene.colour, scene.shape, scene.size, scene.position):
            assert word in text


def test_captions_vary_and_a_few_are_not_ascii() -> None:
    scene = Scene("blue", "ring", "small", "top")
    texts = [caption(scene, seed) for seed in range(2000)]
    assert len({text for text in texts if text.isascii()}) == len(TEMPLATES)
    assert 0.02 < sum(not text.isascii() for text in texts) / len(texts) < 0.06


def test_prompts_are_plain_english() -> None:
    assert prompt(Scene("orange", "cross", "large", "center")) == "a large orange cross in the center"
