"""The shipped recipe for a person's own pictures, at a tiny size, on real pictures with real captions."""

from pathlib import Path

import pytest

from jobs.recipes import recipe_path
from pipelines.inspection.verify import verify_path
from pipelines.run.plan import Selection
from pipelines.run.recipe import load_recipe
from pipelines.run.walk import run

TINY = (
    # Each worker imports torch, for a few steps.
    "autoencoder.training.workers=1",
    "latents.workers=1",
    "diffusion.training.workers=1",
    "evaluate.workers=1",
    "pairs.limit=120",
    "pairs.image_size=32",
    "pairs.rows_per_shard=60",
    "autoencoder.training.steps=6",
    "autoencoder.training.batch_size=4",
    "diffusion.unet.latent_size=4",
    "diffusion.unet.model_channels=32",
    "diffusion.training.steps=6",
    "diffusion.training.batch_size=4",
    "diffusion.training.sample_every_steps=6",
    "diffusion.preview.num_steps=2",
    "evaluate.sampling.num_steps=2",
    "evaluate.training_captions=4",
    "tracking.enabled=false",
)


@pytest.mark.e2e
@pytest.mark.shared
@pytest.mark.parametrize(
    ("folder", "text", "last"), [("fluent_emoji_3d", "name", "export"), ("coco_cc", "captions", "latents")]
)
@pytest.mark.usefixtures("ray_cluster")
def test_the_small_recipe_runs_on_real_pictures(
    folder: str, text: str, last: str, shared_data: Path, tmp_path: Path
) -> None:
    overrides = (
        f"root={tmp_path}",
        f"pairs.source={shared_data}/{folder}/metadata.jsonl",
        "pairs.columns.image=file",
        f"pairs.columns.text={text}",
        "condition.transformer.layers=1",
        *TINY,
    )
    result = run(load_recipe(recipe_path("small"), overrides), Selection(last=last))
    assert {row.state for row in result.rows} <= {"run", "skipped"}
    pairs = result.artifacts["pairs"].details
    assert pairs["input_rows"] == 120
    assert pairs["samples"] >= 100
    assert result.artifacts["latents"].details["samples"] == pairs["samples"]
    if last == "export":
        assert result.artifacts["export"].details["layouts"] == ["ldm", "diffusers"]
    assert all(report.ok for report in verify_path(str(tmp_path)))


@pytest.mark.e2e
@pytest.mark.shared
@pytest.mark.usefixtures("ray_cluster")
def test_the_small_recipe_learns_classes_of_real_photographs_without_captions(
    shared_data: Path, tmp_path: Path
) -> None:
    overrides = (
        f"root={tmp_path}",
        f"pairs.source={shared_data}/clothing_cc0/metadata.jsonl",
        "pairs.columns.image=file",
        "pairs.captions=optional",
        "condition=class",
        *TINY,
    )
    result = run(load_recipe(recipe_path("small"), overrides))
    artifacts = result.artifacts
    assert artifacts["pairs"].details["samples"] >= 100
    names = artifacts["latents"].storage.read_json("classes.json")
    assert "dress" in names
    assert set(artifacts["evaluate"].details["training_captions"]) <= set(names)
    assert artifacts["export"].details["layouts"] == ["ldm"]
    assert all(report.ok for report in verify_path(str(tmp_path)))
