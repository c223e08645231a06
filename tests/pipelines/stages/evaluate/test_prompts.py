"""What evaluation asks for."""

import json
from pathlib import Path

import pytest

from pipelines.errors import UserError
from pipelines.stages.evaluate.config import EvaluateConfig
from pipelines.stages.evaluate.prompts import Prompt, load_prompts, prompts_digest
from pipelines.stages.pairs.artifact import load_captioned_pictures, training_places
from pipelines.stages.pairs.held_out import held_out_places
from tests.tiny_artifacts import first_caption, pairs_artifact


def config(path: Path, **fields: object) -> EvaluateConfig:
    return EvaluateConfig(prompts_file=str(path), **fields)


def test_prompts_of_the_recipe_come_before_those_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a red circle\n\nein grüner Kreis\n", encoding="utf-8")
    prompts = load_prompts(config(tmp_path / "p.txt", prompts=("first",)))
    assert prompts == [Prompt("first"), Prompt("a red circle"), Prompt("ein grüner Kreis")]


def test_rows_say_what_to_expect(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "red", "colour": "red", "novel_pair": True}) + "\n")
    assert load_prompts(config(tmp_path / "p.jsonl")) == [Prompt("red", {"colour": "red", "novel_pair": True})]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": "red"}\n{"prompt"\n', r"p\.jsonl line 2 is not JSON"),
        ('{"caption": "red"}\n', r"p\.jsonl line 1 needs a string `prompt`, got \{\"caption\": \"red\"\}"),
        ("[1]\n", r"p\.jsonl line 1 needs a string `prompt`"),
        ("\n", r"p\.jsonl holds no prompts"),
        ("\xff\xfe", r"p\.jsonl is not UTF-8"),
    ],
)
def test_file_that_cannot_be_read_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "p.jsonl").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=message) as caught:
        load_prompts(config(tmp_path / "p.jsonl"))
    assert "\n" not in str(caught.value)


def test_missing_file_is_said_when_the_key_is_made(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.txt is missing"):
        prompts_digest(config(tmp_path / "none.txt"))


def test_key_knows_the_file_by_its_contents(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).write_text("red\n")
    a, b = (config(tmp_path / name) for name in "ab")
    assert prompts_digest(a) == prompts_digest(b)
    assert a.identity() == b.identity()
    (tmp_path / "b").write_text("blue\n")
    assert prompts_digest(a) != prompts_digest(b)


@pytest.mark.parametrize(
    ("count", "expected"), [(0, []), (3, [0, 1, 3]), (8, [0, 1, 2, 3, 4, 5, 6, 7]), (99, range(9))]
)
def test_training_captions_are_spread_over_the_first_shards(tmp_path: Path, count: int, expected: list[int]) -> None:
    pairs = pairs_artifact(tmp_path, rows=(5, 0, 4))
    every = load_captioned_pictures(
        pairs, [(shard, row) for shard, rows in ((0, 5), (2, 4)) for row in range(rows)], first_caption
    )
    chosen = load_captioned_pictures(pairs, training_places(pairs, count), first_caption)
    assert [picture.caption for picture in chosen] == [every[number].caption for number in expected]
    assert all(picture.image.shape == (32, 32, 3) for picture in chosen)


def test_training_captions_are_of_samples_that_are_trained_on(tmp_path: Path) -> None:
    pairs = pairs_artifact(tmp_path, rows=(100, 0, 100), side=8)
    held_out = held_out_places(pairs)
    assert len(held_out) == 3
    assert not set(training_places(pairs, 197)) & set(held_out)
    assert len(training_places(pairs, 300)) == 197
