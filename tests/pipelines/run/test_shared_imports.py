"""An imported first stage is its weights and its model: recipes under one root share it, and the latents it made."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm_core import checkpoint, presets
from ldm_core.networks.autoencoder import build_first_stage
from pipelines.run import plan as planning
from pipelines.run.plan import PlannedStage, Selection, plan
from pipelines.run.recipe import Recipe
from pipelines.run.report import build_report
from pipelines.run.walk import run
from pipelines.store.commits import ArtifactWriter
from pipelines.store.ledger import Artifact
from pipelines.store.storage import Storage
from tests.tiny import tiny_recipe, write_pictures
from tests.tiny_artifacts import pairs_artifact


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    torch.manual_seed(1)
    checkpoint.save(build_first_stage(presets.first_stage("tiny-kl-f8")), tmp_path / "pretrained")
    return tmp_path / "pretrained"


def recipe(folder: Path, weights: Path | None = None, *, pictures: str = "one", **changes: Any) -> Recipe:
    """Return the tiny recipe on a set of pictures of that name, with an imported first stage if it has weights."""
    table = folder / pictures / "metadata.jsonl"
    if not table.exists():
        write_pictures(table.parent, 3 + len(pictures))
    values = tiny_recipe(table, tracking={"enabled": False}, root=str(folder / "root"))
    if weights:
        values["autoencoder"] = {"model": "tiny-kl-f8", "weights": str(weights)}
    values["autoencoder"] |= changes.pop("autoencoder", {})
    return Recipe.model_validate(values | changes)


def planned(recipe: Recipe, name: str) -> PlannedStage:
    return next(stage for stage in plan(recipe) if stage.stage.name == name)


def finish_all(recipe: Recipe) -> None:
    """Write artifacts of one file, finished, for every stage of a recipe."""
    for stage in plan(recipe):
        folder = Storage(recipe.root) / stage.stage.name / stage.key
        writer = ArtifactWriter(stage.stage.name, stage.key, folder)
        writer.commit_once("a", lambda path: path.write_bytes(b"a"))
        writer.finish(
            format_version=stage.stage.format_version,
            config={},
            identity=stage.identity,
            upstream={},
            details={},
            seconds=0,
            code_version="test",
        )


def states(recipe: Recipe) -> dict[str, str]:
    return {stage.stage.name: stage.state for stage in plan(recipe)}


OTHERS: list[dict[str, Any]] = [
    {"seed": 7},
    {"autoencoder": {"kl_weight": 1.0}},
    {"autoencoder": {"reconstruction_loss": "l2"}},
]


@pytest.mark.parametrize("changes", OTHERS)
def test_an_import_and_its_latents_stay_cached_whatever_else_a_recipe_says(
    tmp_path: Path, weights: Path, changes: dict[str, Any]
) -> None:
    finish_all(recipe(tmp_path, weights))
    found = states(recipe(tmp_path, weights, **changes))
    assert (found["autoencoder"], found["latents"]) == ("cached", "cached")
    assert found["diffusion"] == ("run" if "seed" in changes else "cached")


def test_other_pairs_share_the_import_and_not_the_latents(tmp_path: Path, weights: Path) -> None:
    finish_all(recipe(tmp_path, weights))
    found = states(recipe(tmp_path, weights, pictures="other"))
    assert (found["pairs"], found["autoencoder"], found["latents"]) == ("run", "cached", "run")


def test_an_import_is_identified_by_its_weights_and_its_model_alone(tmp_path: Path, weights: Path) -> None:
    before = planned(recipe(tmp_path, weights), "autoencoder")
    assert before.identity.keys() == {"stage", "format_version", "config", "inputs"}
    assert before.identity["config"].keys() == {"model"}
    assert before.identity["inputs"].keys() == {"weights"}
    wider = {"model": {"preset": "tiny-kl-f8", "base_channels": 32}}
    assert planned(recipe(tmp_path, weights, autoencoder=wider), "autoencoder").key != before.key
    (weights / "model.safetensors").write_bytes(b"others")
    assert planned(recipe(tmp_path, weights), "autoencoder").key != before.key


@pytest.mark.parametrize("changes", [*OTHERS, {"pictures": "other"}])
def test_a_first_stage_that_is_trained_is_all_that_it_was_trained_on(tmp_path: Path, changes: dict[str, Any]) -> None:
    finish_all(recipe(tmp_path))
    found = states(recipe(tmp_path, **changes))
    assert (found["autoencoder"], found["latents"]) == ("run", "run")


def test_inputs_are_digested_once_in_a_plan(tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digested: Counter[str] = Counter()

    def counting(stage: Any) -> Any:
        def inputs(config: Any) -> dict[str, str]:
            digested[stage.name] += 1
            found: dict[str, str] = stage.inputs(config)
            return found

        return dataclasses.replace(stage, inputs=inputs)

    monkeypatch.setattr(planning, "STAGES", tuple(counting(stage) for stage in planning.STAGES))
    plan(recipe(tmp_path, weights))
    assert digested == dict.fromkeys(planning.STAGE_NAMES, 1)


def finished_pairs(recipe: Recipe, rows: int) -> Artifact:
    """Make the pairs that a recipe asks for, without Ray and of noise."""
    return pairs_artifact(Path(recipe.root), rows=(rows,), name=planned(recipe, "pairs").key)


def test_two_recipes_on_one_root_share_an_import_that_claims_neither(
    ray_cluster: None, tmp_path: Path, weights: Path
) -> None:
    one, other = recipe(tmp_path, weights), recipe(tmp_path, weights, pictures="other", seed=7)
    pairs = finished_pairs(one, 9)
    finished_pairs(other, 12)
    first = run(one, Selection(only="autoencoder")).artifacts["autoencoder"]
    assert first.manifest.upstream == {}
    assert "psnr_db" not in first.details, "it is no property of the weights"
    assert first.details["import_check"]["pairs"] == pairs.reference
    second = run(other, Selection(only="autoencoder"))
    assert [row.state for row in second.rows][:2] == ["cached", "cached"]
    assert second.artifacts["autoencoder"].key == first.key
    page = build_report(Storage(other.root), other.to_yaml(), second.rows, second.artifacts)
    assert f"dB on pairs {pairs.key}" in page
    assert "reconstruction PSNR" not in page
    # Built again beside the other pairs, it is the same: its picture is a log.
    shown = first.storage.read_bytes("reconstructions.png")
    again = run(other, Selection(only="autoencoder", force=("autoencoder",))).artifacts["autoencoder"]
    assert again.key == first.key
    assert again.storage.read_bytes("reconstructions.png") == shown
    assert states(one)["autoencoder"] == "cached"
