"""A recipe's condition: how it is written, what it is refused for, and which keys it enters."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.recipes import recipe_path
from pipelines.errors import MisuseError
from pipelines.run.plan import Selection, check, plan
from pipelines.run.recipe import Recipe, load_recipe, parse_recipe
from tests.tiny import tiny_recipe, write_pictures

DEMO = recipe_path("demo")
CLASSES = ("condition=class", "pairs.captions=optional")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("condition=clas",), "condition: no kind of condition 'clas'; did you mean 'class'?"),
        (("condition=5",), "condition: must be a kind of condition, or `kind` and settings, got 5"),
        (("condition.tokenizer.siz=64",), "unknown key 'condition.tokenizer.siz'; did you mean 'size'?"),
        (("condition.kind=class", "condition.colum=x"), "unknown key 'condition.colum'; did you mean 'column'?"),
        (("condition.tokenizer.size=3",), "condition.tokenizer.size: Input should be greater than or equal to 64"),
        (("latents.condition=none",), "unknown key 'latents.condition'"),
        (("condition=none", "diffusion.text.layers=1"), "diffusion.text is of condition text, but the recipe's"),
        (
            ("condition.transformer.layers=2", "diffusion.text.layers=1"),
            "diffusion.text is the former name of condition.transformer, which is there too: leave it out",
        ),
        (("condition=class", "condition.classes=[a, b, a]"), "classes must differ, but 'a' is named twice"),
    ],
)
def test_a_wrong_condition_is_refused_in_one_line(overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(MisuseError) as caught:
        load_recipe(DEMO, overrides)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_settings_of_a_text_condition_where_version_0_1_had_them_mean_the_same() -> None:
    values = yaml.safe_load(DEMO.read_text())
    condition = values.pop("condition")
    values["latents"]["tokenizer"] = condition["tokenizer"]
    values["diffusion"] |= {"text": condition["transformer"], "caption_dropout": 0.2}
    moved = parse_recipe(values)
    assert moved == load_recipe(DEMO, ("condition.dropout=0.2",))
    assert parse_recipe(moved.resolved()) == moved


def test_settings_of_a_text_condition_are_refused_where_there_is_another(tmp_path: Path) -> None:
    values = yaml.safe_load(DEMO.read_text()) | {"condition": "class"}
    values["latents"]["tokenizer"] = {"size": 64}
    with pytest.raises(
        MisuseError, match=r"latents\.tokenizer is of condition text, but the recipe's condition is class"
    ):
        parse_recipe(values)


def test_an_override_wins_over_the_file_wherever_the_file_says_it(tmp_path: Path) -> None:
    values = yaml.safe_load(DEMO.read_text())
    values["latents"]["tokenizer"] = values.pop("condition")["tokenizer"]
    (tmp_path / "old.yaml").write_text(yaml.safe_dump(values))
    for name in ("condition.tokenizer", "latents.tokenizer"):
        assert load_recipe(tmp_path / "old.yaml", (f"{name}.size=100",)).condition.tokenizer.size == 100


def test_another_kind_in_an_override_takes_the_place_of_the_whole_condition() -> None:
    recipe = load_recipe(DEMO, ("condition.kind=class", "condition.column=colour"))
    assert recipe.condition.model_dump() == {"kind": "class", "column": "colour", "classes": None, "dropout": 0.1}
    # In any order.
    assert load_recipe(DEMO, ("condition.column=colour", "condition=class")) == recipe
    assert load_recipe(DEMO, ("condition=none",)).condition.model_dump() == {"kind": "none"}
    assert load_recipe(DEMO, ("condition=text",)) == load_recipe(DEMO)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("condition=none",), "diffusion.unet.context_dim must be null for condition none, got 128"),
        ((*CLASSES, "diffusion.unet.context_dim=null"), "must be the width of a class's embedding, got null: set it"),
        (
            (*CLASSES, "condition.dropout=0"),
            "diffusion.preview.guidance_scale must be 1 for a model trained with condition.dropout=0, got 2.0",
        ),
        (
            ("condition.dropout=0",),
            "diffusion.preview.guidance_scale must be 1 for a model trained with condition.dropout=0, got 2.0",
        ),
        (("pairs.captions=optional",), "condition text needs a caption with every picture: set pairs.captions to"),
    ],
)
def test_a_condition_that_does_not_fit_the_rest_is_refused_before_anything_runs(
    overrides: tuple[str, ...], message: str
) -> None:
    recipe = load_recipe(DEMO, overrides)
    with pytest.raises(MisuseError) as caught:
        check(recipe, Selection())
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    check(recipe, Selection(only="pairs"))


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures") / "pictures", 4)


def keys(table: Path, **condition: Any) -> dict[str, str]:
    values = tiny_recipe(table, root=str(table.parent / "root"))
    values["condition"] = {**values["condition"], **condition}
    return _keys(parse_recipe(values))


def _keys(recipe: Recipe) -> dict[str, str]:
    return {planned.stage.name: planned.key for planned in plan(recipe)}


def test_what_is_trained_beside_the_unet_leaves_the_latents_cached(table: Path) -> None:
    before = keys(table)
    for change in ({"dropout": 0.2}, {"transformer": {"width": 32, "layers": 2}}):
        after = keys(table, **change)
        changed = [name for name, key in before.items() if after[name] != key]
        assert changed == ["diffusion", "evaluate", "export"]


def test_what_is_cached_is_part_of_the_latents_key(table: Path) -> None:
    before, after = keys(table), keys(table, tokenizer={"size": 256, "max_length": 12})
    assert [name for name, key in before.items() if after[name] != key] == [
        "latents",
        "diffusion",
        "evaluate",
        "export",
    ]


def test_every_kind_has_keys_of_its_own_and_the_same_pairs(table: Path) -> None:
    values = tiny_recipe(table, root=str(table.parent / "root"))
    found = []
    for kind in ("text", "class", "none"):
        values["condition"] = {"kind": kind} if kind != "text" else values["condition"]
        values["diffusion"]["unet"]["context_dim"] = None if kind == "none" else 32
        found.append(_keys(parse_recipe(values)))
    assert len({each["pairs"] for each in found}) == 1
    assert len({each["latents"] for each in found}) == len({each["diffusion"] for each in found}) == 3
