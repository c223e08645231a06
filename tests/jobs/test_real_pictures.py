"""The shipped recipe for a person's own pictures, at a tiny size, on real pictures with real captions."""

from pathlib import Path

import pytest

from jobs.recipes import recipe_path
from ldm_core import checkpoint
from ldm_core.networks.autoencoder import build_first_stage
from pipelines.inspection.verify import verify_path
from pipelines.run.plan import Selection
from pipelines.run.recipe import load_recipe
from pipelines.run.results import RunResult
from pipelines.run.walk import run
from tests.in_this_process import in_this_process

pytestmark = [pytest.mark.e2e, pytest.mark.shared, pytest.mark.usefixtures("ray_cluster")]

TINY = (
    # To start a second one takes longer than the work.
    "pairs.workers=1",
    "pairs.limit=120",
    "pairs.image_size=32",
    "pairs.rows_per_shard=60",
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
TRAINED = ("autoencoder.training.steps=6", "autoencoder.training.batch_size=4")


@pytest.fixture
def imported(tmp_path: Path) -> tuple[str, ...]:
    """Return what has the recipe import a first stage: to train it takes longest, and one test here does."""
    recipe = load_recipe(recipe_path("small"), ("pairs.source=anything",))
    assert recipe.autoencoder is not None
    checkpoint.save(build_first_stage(recipe.autoencoder.model), tmp_path / "first_stage")
    return (f"autoencoder.weights={tmp_path}/first_stage", "autoencoder.training=null")


def run_small(pictures: Path, root: Path, *overrides: str, last: str | None = None) -> RunResult:
    """Run the small recipe, at a tiny size, on 120 of the pictures; check what it left behind."""
    source = (f"root={root}", f"pairs.source={pictures}/metadata.jsonl", "pairs.columns.image=file")
    with in_this_process():
        result = run(load_recipe(recipe_path("small"), (*source, *TINY, *overrides)), Selection(last=last))
    assert {row.state for row in result.rows} <= {"run", "skipped"}
    pairs = result.artifacts["pairs"].details
    assert pairs["input_rows"] == 120
    assert pairs["samples"] >= 100
    assert result.artifacts["latents"].details["samples"] == pairs["samples"]
    assert all(report.ok for report in verify_path(str(root)))
    return result


def test_the_small_recipe_runs_on_real_pictures(shared_data: Path, tmp_path: Path) -> None:
    overrides = ("pairs.columns.text=name", "condition.transformer.layers=1", *TRAINED)
    result = run_small(shared_data / "fluent_emoji_3d", tmp_path, *overrides)
    assert result.artifacts["export"].details["layouts"] == ["ldm", "diffusers"]


def test_photographs_with_many_captions_each_become_latents(
    shared_data: Path, tmp_path: Path, imported: tuple[str, ...]
) -> None:
    run_small(shared_data / "coco_cc", tmp_path / "root", "pairs.columns.text=captions", *imported, last="latents")


def test_the_small_recipe_learns_classes_of_real_photographs_without_captions(
    shared_data: Path, tmp_path: Path, imported: tuple[str, ...]
) -> None:
    overrides = ("pairs.captions=optional", "condition=class", *imported)
    artifacts = run_small(shared_data / "clothing_cc0", tmp_path / "root", *overrides).artifacts
    names = artifacts["latents"].storage.read_json("classes.json")
    assert "dress" in names
    assert set(artifacts["evaluate"].details["training_captions"]) <= set(names)
    assert artifacts["export"].details["layouts"] == ["ldm"]
