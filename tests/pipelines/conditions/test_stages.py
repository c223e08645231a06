"""Every kind of condition through all stages, sampling and export included."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.errors import UserError
from pipelines.inspection.verify import verify_path
from pipelines.run.recipe import parse_recipe
from pipelines.run.results import RunResult
from pipelines.run.walk import run
from pipelines.shards.format import decode_npy, read_shard
from pipelines.stages.diffusion.config import DiffusionConfig, SamplingConfig
from pipelines.stages.diffusion.find_model import open_model
from pipelines.stages.diffusion.sampling import sample_prompts
from pipelines.stages.diffusion.work import model_config
from pipelines.store.ledger import Artifact
from tests.tiny import tiny_recipe, write_pictures

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("ray_cluster")]
NAMES = ("circle", "square")
SAMPLING = SamplingConfig(num_steps=2)


def recipe(source: Path, root: Path, condition: dict[str, Any], **diffusion: Any) -> dict[str, Any]:
    """Return a recipe for pictures without captions; one worker each, and a few steps."""
    values = tiny_recipe(source, root=str(root), condition=condition, tracking={"enabled": False})
    values["pairs"] |= {"captions": "optional", "columns": {"image": "file"}}
    for stage in ("autoencoder", "diffusion"):
        values[stage]["training"] = values[stage]["training"] | {"steps": 4, "workers": 1, "sample_every_steps": 4}
    values["diffusion"] |= diffusion
    values["evaluate"] |= {"prompts": [], "training_captions": 3, "sampling": {"num_steps": 2}}
    return values


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("conditions")


@pytest.fixture(scope="module")
def source(root: Path) -> Path:
    """A table with a class for every picture, and no captions."""
    table = write_pictures(root / "pictures", 40)
    rows = [json.loads(line) for line in table.read_text().splitlines()]
    labelled = [{"file": row["file"], "label": NAMES[number % 2]} for number, row in enumerate(rows)]
    table.write_text("".join(json.dumps(row) + "\n" for row in labelled))
    return table


@pytest.fixture(scope="module")
def of_classes(root: Path, source: Path) -> RunResult:
    values = recipe(source, root / "root", {"kind": "class"})
    values["evaluate"]["prompts"] = list(NAMES)
    return run(parse_recipe(values))


@pytest.fixture(scope="module")
def unconditional(root: Path, source: Path, of_classes: RunResult) -> RunResult:
    values = recipe(source, root / "root", {"kind": "none"})
    values["diffusion"]["unet"] = {**values["diffusion"]["unet"], "context_dim": None}
    return run(parse_recipe(values))


def samples(latents: Artifact) -> Iterator[dict[str, Any]]:
    for record in latents.shards():
        yield from read_shard(Path(latents.storage.path(record.name)))


def test_pictures_without_captions_are_samples_and_their_classes_are_cached(of_classes: RunResult) -> None:
    assert of_classes.artifacts["pairs"].details["samples"] == 40
    latents = of_classes.artifacts["latents"]
    assert latents.storage.read_json("classes.json") == list(NAMES)
    for sample in samples(latents):
        facts = json.loads(sample["json"])
        assert (facts["captions"], sorted(sample)) == ([], ["__key__", "class.npy", "json", "latent.npy"])
        assert NAMES[int(decode_npy(sample["class.npy"]))] == facts["label"]


def test_a_class_conditional_model_is_evaluated_by_class_and_exported(of_classes: RunResult) -> None:
    details = of_classes.artifacts["evaluate"].details
    assert details["prompts"] == list(NAMES)
    assert set(details["training_captions"]) <= set(NAMES)
    exported = of_classes.artifacts["export"]
    assert exported.details["layouts"] == ["ldm"]
    assert "diffusers" in exported.details["diffusers_skipped"]
    model, prompts, _ = open_model(exported.storage.url, "cpu")
    pictures = sample_prompts(model, prompts, ["circle", "square", ""], [0, 0, 0], SAMPLING)
    assert pictures.shape == (3, 32, 32, 3)
    with pytest.raises(UserError, match="'cat' is none; its classes are circle, square"):
        sample_prompts(model, prompts, ["cat"], [0], SAMPLING)


def test_an_unconditional_model_takes_over_the_latents_and_is_evaluated_without_prompts(
    unconditional: RunResult, of_classes: RunResult
) -> None:
    assert {row.name: row.state for row in unconditional.rows}["autoencoder"] == "cached"
    before, after = of_classes.artifacts["latents"], unconditional.artifacts["latents"]
    for one, other in zip(samples(before), samples(after), strict=True):
        assert sorted(other) == ["__key__", "json", "latent.npy"]
        assert other["latent.npy"] == one["latent.npy"]
    assert unconditional.artifacts["evaluate"].details["training_captions"] == [""] * 3
    assert set(unconditional.artifacts["diffusion"].details["parameters"]) == {"unet", "first_stage"}
    assert unconditional.artifacts["export"].details["layouts"] == ["ldm", "diffusers"]


def test_guidance_leaves_an_unconditional_model_as_it_is_and_a_prompt_is_refused(unconditional: RunResult) -> None:
    model, prompts, _ = open_model(unconditional.artifacts["diffusion"].storage.url, "cpu")
    guided, plain = (
        sample_prompts(model, prompts, [""], [3], SAMPLING.model_copy(update={"guidance_scale": scale}))
        for scale in (7.0, 1.0)
    )
    np.testing.assert_array_equal(guided, plain)
    with pytest.raises(UserError, match="is unconditional and takes no prompts, got 'a cat': leave them out"):
        sample_prompts(model, prompts, ["a cat"], [0], SAMPLING)


def test_all_of_it_verifies(root: Path, unconditional: RunResult) -> None:
    assert all(report.ok for report in verify_path(str(root / "root")))


def test_a_cache_of_another_condition_is_refused(of_classes: RunResult, unconditional: RunResult) -> None:
    artifacts, config = unconditional.artifacts, unconditional.artifacts["diffusion"].manifest.config
    with pytest.raises(UserError, match="made for condition class, but the recipe's is none: run `ldm run RECIPE"):
        model_config(DiffusionConfig.model_validate(config), of_classes.artifacts["latents"], artifacts["autoencoder"])
