"""The ledger keys of the shipped recipes stay those under which everybody's finished artifacts are stored.

So do those of recipes that people wrote, and reports printed, for an earlier version. A key is a hash of what a recipe
sets otherwise than by default, the source, the format version and the keys before it. A change that is meant to change
nothing, such as a renamed field, can change a key all the same; then every root out there computes that stage again.
After an intended change rewrite the file:

    python -m tests.jobs.test_golden_keys
"""

import json
import os
import tempfile
from pathlib import Path

import pytest
import yaml

from jobs.recipes import FOLDER, recipe_path
from pipelines.run.plan import PlannedStage, plan
from pipelines.run.recipe import load_recipe

GOLDEN = Path(__file__).with_name("golden_keys.json")
SHIPPED = sorted(path.stem for path in FOLDER.glob("*.yaml"))
# Word for word as they were then: not to be edited when a recipe is.
EARLIER = {
    f"version 0.1: {path.stem}": path
    for path in sorted(Path(__file__).with_name("recipes_of_version_0_1").glob("*.yaml"))
}
RECIPES = [*SHIPPED, *EARLIER]
REWRITE = "python -m tests.jobs.test_golden_keys"
PICTURES = {"red.png": b"a red circle's bytes", "blue.png": b"a blue square's bytes"}
CAPTIONS = {"red.png": ["a red circle", "ein roter Kreis"], "blue.png": ["a blue square", "青い四角"]}


def plan_of(recipe: str, folder: Path) -> list[PlannedStage]:
    """Return the plan of a recipe, for which nothing has run, on a source written to `folder`."""
    path = EARLIER.get(recipe) or recipe_path(recipe)
    return plan(load_recipe(path, (f"root={folder}/root", *_inputs(path, folder))))


def _inputs(path: Path, folder: Path) -> list[str]:
    """Write what a recipe leaves to its user, or names; return the settings that say where it is."""
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    if (values.get("evaluate") or {}).get("prompts_file"):
        return [f"pairs.source={_write_web_table(folder)}", f"evaluate.prompts_file={_write_prompts(folder)}"]
    given = [f"pairs.source={_write_pictures(folder)}", "pairs.columns.image=file", "pairs.columns.text=captions"]
    if (values.get("autoencoder") or {}).get("weights"):
        given.append(f"autoencoder.weights={_write_bytes(folder / 'pretrained.safetensors', b'weights')}")
    if values["pairs"].get("scoring"):
        _write_bytes(folder / "clip" / "model.safetensors", b"the model's bytes")
        given.append(f"pairs.scoring.clip={folder / 'clip'}")
    return given


def _write_pictures(folder: Path) -> Path:
    """Write pictures with a table beside them. Their bytes count; planning decodes none of them."""
    for name, data in PICTURES.items():
        (folder / name).write_bytes(data)
    return _write_rows(folder / "metadata.jsonl", [{"file": name, "captions": CAPTIONS[name]} for name in PICTURES])


def _write_web_table(folder: Path) -> Path:
    """Write a table of URLs. Planning downloads nothing."""
    rows = [{"URL": f"http://pictures.example/{name}", "TEXT": texts[0]} for name, texts in CAPTIONS.items()]
    return _write_rows(folder / "laion.jsonl", rows)


def _write_prompts(folder: Path) -> Path:
    return _write_rows(folder / "prompts.jsonl", [{"prompt": "a red circle", "color": "red", "shape": "circle"}])


def _write_rows(path: Path, rows: list[dict[str, object]]) -> Path:
    return _write_bytes(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())


def _write_bytes(path: Path, data: bytes) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    return path


def keys(walk: list[PlannedStage]) -> dict[str, str]:
    """Return the key of every stage by its name."""
    return {planned.stage.name: planned.key for planned in walk}


def golden_keys() -> dict[str, dict[str, str]]:
    """Return the keys in the file, by recipe and stage."""
    golden: dict[str, dict[str, str]] = json.loads(GOLDEN.read_text())
    return golden


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_keys_of_a_recipe_stay_what_they_are(recipe: str, tmp_path: Path) -> None:
    golden = golden_keys().get(recipe, {})
    walk = plan_of(recipe, tmp_path)
    assert {planned.state for planned in walk} == {"run"}
    if keys(walk) != golden:
        pytest.fail(_message(recipe, golden, walk), pytrace=False)


def _message(recipe: str, golden: dict[str, str], walk: list[PlannedStage]) -> str:
    """Say which keys changed, what that costs, what to do, and what the first of them is made of."""
    found = keys(walk)
    changed = [name for name in {**found, **golden} if found.get(name) != golden.get(name)]
    first = changed[0]
    made_of = next((planned.identity for planned in walk if planned.stage.name == first), None)
    return (
        f"the key of {first} in the recipe {recipe} changed from {golden.get(first)} to {found.get(first)}: every "
        f"finished artifact of {', '.join(changed)} is lost, these stages will run again.\n"
        "If that is intended, raise the stage's format version (when its bytes change meaning) and rewrite the file: "
        f"{REWRITE}\n"
        "If not, see which part of this is not what it was before the change:\n"
        f"{json.dumps(made_of, indent=1, sort_keys=True)}"
    )


def test_every_recipe_in_the_file_is_one_of_these() -> None:
    assert list(golden_keys()) == RECIPES


def test_the_resolved_recipe_has_the_keys_of_the_short_one() -> None:
    assert golden_keys()["version 0.1: small_resolved"] == golden_keys()["small"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_keys_do_not_depend_on_where_the_source_is_or_when_it_was_written(recipe: str, tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "a longer name" / "other"
    before = []
    for folder in (one, other):
        folder.mkdir(parents=True)
        before.append(keys(plan_of(recipe, folder)))
    for file in other.rglob("*"):
        os.utime(file, (1_000_000_000, 1_000_000_000))
    assert before[0] == before[1] == keys(plan_of(recipe, other))


@pytest.mark.parametrize("recipe", RECIPES)
def test_another_source_changes_the_key_of_every_stage_but_an_import(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CAPTIONS, "red.png", ["another caption", "ein roter Kreis"])
    changed = keys(plan_of(recipe, tmp_path))
    kept = ["autoencoder"] if recipe == "version 0.1: imported" else []
    assert [name for name, key in golden_keys()[recipe].items() if changed[name] == key] == kept


def rewrite() -> None:
    """Write the keys of today as the golden ones."""
    golden = {}
    for recipe in RECIPES:
        with tempfile.TemporaryDirectory() as folder:
            golden[recipe] = keys(plan_of(recipe, Path(folder)))
    GOLDEN.write_text(json.dumps(golden, indent=2) + "\n")


if __name__ == "__main__":
    rewrite()
