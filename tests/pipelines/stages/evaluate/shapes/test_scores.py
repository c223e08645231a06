"""Scores of pictures whose prompts say what to expect."""

import numpy as np
import pytest
from PIL import Image

from pipelines.errors import UserError
from pipelines.stages.evaluate.prompts import Prompt
from pipelines.stages.evaluate.shapes.outlines import PALETTE, draw_matte
from pipelines.stages.evaluate.shapes.scores import alignment_scores, require_expectations


def picture(colour: str, shape: str) -> np.ndarray:
    matte = draw_matte(shape, diameter=34, center=(32, 32), height=64, width=64)
    return np.asarray(
        Image.composite(Image.new("RGB", (64, 64), PALETTE[colour]), Image.new("RGB", (64, 64), "white"), matte)
    )


def expecting(colour: str, shape: str, **fields: object) -> Prompt:
    return Prompt(f"a {colour} {shape}", {"colour": colour, "shape": shape, **fields})


def test_right_means_colour_and_shape() -> None:
    prompts = [expecting("red", "circle"), expecting("red", "circle"), expecting("red", "circle"), Prompt("unknown")]
    images = np.stack(
        [picture(*scene) for scene in (("red", "circle"), ("blue", "circle"), ("red", "star"), ("red", "ring"))]
    )
    scores = alignment_scores(prompts, images)
    assert (scores["accuracy"], scores["samples"]) == (pytest.approx(1 / 3), 3)
    assert [item["right"] for item in scores["items"]] == [True, False, False]
    assert scores["items"][1]["colour"] == "blue"


def test_boolean_fields_of_the_prompts_make_groups() -> None:
    prompts = [expecting("red", "circle", novel_pair=novel) for novel in (True, True, False)]
    images = np.stack([picture("red", "circle"), picture("green", "star"), picture("red", "circle")])
    assert alignment_scores(prompts, images)["groups"] == {
        "novel_pair": {"true": {"accuracy": 0.5, "samples": 2}, "false": {"accuracy": 1.0, "samples": 1}}
    }


def test_prompts_without_expectations_are_refused_before_sampling() -> None:
    require_expectations([Prompt("plain"), expecting("red", "circle")])
    with pytest.raises(UserError, match="needs prompts that say what to expect"):
        require_expectations([Prompt("plain"), Prompt("half", {"colour": "red"})])
