"""Every kind of condition through all stages, sampling and export included."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ldm_core import checkpoint, presets
from ldm_core.networks.autoencoder import build_first_stage
from ldm_core.pretrained import text_encoder
from pipelines.errors import UserError
from pipelines.inspection.verify import verify_path
from pipelines.run.recipe import parse_recipe
from pipelines.run.results import RunResult
from pipelines.run.walk import run
from pipelines.shards.format import decode_npy, read_with_facts
from pipelines.stages.diffusion.config import DiffusionConfig, SamplingConfig
from pipelines.stages.diffusion.find_model import open_model
from pipelines.stages.diffusion.sampling import sample_prompts
from pipelines.stages.diffusion.work import model_config
from pipelines.store.ledger import Artifact
from tests.in_this_process import in_this_process
from tests.pipelines.conditions.encoders import MINILM, clip
from tests.tiny import tiny_recipe, write_pictures
from tests.torch_state import SEED

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("ray_cluster")]
NAMES = ("circle", "square")
SAMPLING = SamplingConfig(num_steps=2)


def recipe(source: Path, root: Path, condition: dict[str, Any], **diffusion: Any) -> dict[str, Any]:
    """Return a recipe for pictures without captions, and a few steps.

    The first stage is imported: to train one takes most of the time, and has nothing to do with conditions.
    """
    values = tiny_recipe(source, root=str(root), condition=condition, tracking={"enabled": False})
    values["pairs"] |= {"captions": "optional", "columns": {"image": "file"}}
    first_stage = source.parent / "first_stage"
    torch.manual_seed(SEED)
    checkpoint.save(build_first_stage(presets.first_stage("tiny-kl-f8")), first_stage)
    values["autoencoder"] = {"model": "tiny-kl-f8", "weights": str(first_stage)}
    values["diffusion"]["training"] |= {"steps": 4, "workers": 1, "sample_every_steps": 4}
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
    with in_this_process():
        return run(parse_recipe(values))


@pytest.fixture(scope="module")
def unconditional(root: Path, source: Path, of_classes: RunResult) -> RunResult:
    values = recipe(source, root / "root", {"kind": "none"})
    values["diffusion"]["unet"] = {**values["diffusion"]["unet"], "context_dim": None}
    with in_this_process():
        return run(parse_recipe(values))


@pytest.fixture(scope="module")
def frozen(root: Path) -> RunResult:
    """A model of captions through a real encoder that is not trained."""
    encoder = {"path": str(MINILM), "max_length": 16}
    values = recipe(write_pictures(root / "captioned", 40), root / "frozen", {"kind": "frozen_text"})
    values["condition"]["encoders"] = [encoder]
    values["pairs"] |= {"captions": "required", "columns": {"image": "file", "text": "captions"}}
    values["diffusion"]["unet"] = {**values["diffusion"]["unet"], "context_dim": 384}
    values["evaluate"]["prompts"] = ["a large red circle"]
    with in_this_process():
        return run(parse_recipe(values))


@pytest.fixture(scope="module")
def two_encoders(root: Path, frozen: RunResult) -> RunResult:
    """A model of the same pictures through that encoder and a CLIP."""
    encoders = [{"path": str(MINILM), "max_length": 77}, {"path": str(clip(root / "clip"))}]
    values = recipe(root / "captioned/metadata.jsonl", root / "frozen", {"kind": "frozen_text", "encoders": encoders})
    values["pairs"] |= {"captions": "required", "columns": {"image": "file", "text": "captions"}}
    values["diffusion"]["unet"] = {**values["diffusion"]["unet"], "context_dim": 384 + 32}
    values["evaluate"]["prompts"] = ["a large red circle"]
    with in_this_process():
        return run(parse_recipe(values))


def samples(latents: Artifact) -> Iterator[dict[str, Any]]:
    for record in latents.shards():
        yield from read_with_facts(latents.storage, record.name)


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
    assert "ldm" in unconditional.artifacts["export"].details["layouts"]


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


def test_a_model_of_a_frozen_encoder_trains_on_its_cache_and_is_sampled_with_it(frozen: RunResult) -> None:
    latents, diffusion = frozen.artifacts["latents"], frozen.artifacts["diffusion"]
    for sample in samples(latents):
        assert sorted(sample) == ["__key__", "json", "latent.npy", "text.npy", "text_lengths.npy"]
        lengths = decode_npy(sample["text_lengths.npy"])
        assert len(lengths) == len(json.loads(sample["json"])["captions"]) == 2
        assert decode_npy(sample["text.npy"]).shape == (lengths.sum(), 384)
    assert diffusion.details["parameters"]["frozen_text"] > 20_000_000
    history = diffusion.storage.read_json("history.json")
    assert history
    assert frozen.artifacts["evaluate"].details["prompts"] == ["a large red circle"]
    exported = frozen.artifacts["export"]
    assert "FrozenTextConfig" in exported.details["diffusers_skipped"]
    model, prompts, _ = open_model(exported.storage.url, "cpu")
    assert sample_prompts(model, prompts, ["a small star"], [0], SAMPLING).shape == (1, 32, 32, 3)


def test_an_averaged_model_of_a_frozen_encoder_has_its_weights_as_they_were(frozen: RunResult) -> None:
    model, _, _ = open_model(frozen.artifacts["diffusion"].storage.url, "cpu")
    assert model.conditioner is not None
    given = text_encoder(MINILM).conditioner.state_dict()
    found = model.conditioner.state_dict()
    assert all(torch.equal(found[name], weight) for name, weight in given.items())


def test_a_model_of_two_frozen_encoders_goes_through_all_stages(two_encoders: RunResult) -> None:
    states = {row.name: row.state for row in two_encoders.rows}
    assert (states["pairs"], states["autoencoder"], states["latents"]) == ("cached", "cached", "run")
    for sample in samples(two_encoders.artifacts["latents"]):
        lengths, of_clip = (decode_npy(sample[name]) for name in ("text_lengths.npy", "text2_lengths.npy"))
        assert decode_npy(sample["text.npy"]).shape == (lengths.sum(), 384)
        assert of_clip.tolist() == [77] * len(lengths)
    exported = two_encoders.artifacts["export"]
    assert "JoinedTextConfig" in exported.details["diffusers_skipped"]
    assert {"model.safetensors", "tokenizer.json", "tokenizer_2.json"} <= set(exported.files.names)
    model, prompts, _ = open_model(exported.storage.url, "cpu")
    pictures = sample_prompts(model, prompts, ["a small star", ""], [0, 0], SAMPLING)
    assert pictures.shape == (2, 32, 32, 3)
    assert (pictures[0] != pictures[1]).any()
